//! The interpreters of a session: one of each language from the start, and more by name.

use nix::sys::epoll::EpollFlags;
use thaw_wire::message::Language;

use crate::command::Command;
use crate::interpreter::{Interpreter, LANGUAGES, OUTPUTS, Part, Place, index};

/// Named contexts of a VM: each is a process of some megabytes.
pub(super) const MOST_CONTEXTS: usize = 16;

/// Slots there can be.
pub(super) const MOST: usize = LANGUAGES.len() + MOST_CONTEXTS;

/// Longest name of a context.
const MOST_NAME: usize = 64;

/// One language's interpreter and command.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) language: Language,
    /// The context's name; none: what every session has from its start.
    pub(super) context: Option<String>,
    pub(super) interpreter: Option<Interpreter>,
    pub(super) command: Option<Command>,
    /// The interpreter's process is gone; its pipes may still hold output.
    pub(super) dead: bool,
    /// It hung up, which would be reported for ever: its death is waited for without listening.
    pub(super) deaf: bool,
    /// Nobody can write to these pipes any more; the same holds for them.
    pub(super) closed: [bool; OUTPUTS],
    /// State was lost while no command could say so.
    pub(super) lost: bool,
    /// What epoll was told about each part.
    pub(super) watched: [Option<EpollFlags>; Part::ALL.len()],
}

impl Slot {
    fn new(language: Language, context: Option<String>) -> Self {
        Self {
            language,
            context,
            interpreter: None,
            command: None,
            dead: false,
            deaf: false,
            closed: Default::default(),
            lost: false,
            watched: Default::default(),
        }
    }

    /// For the console: what this is.
    pub(super) fn name(&self) -> String {
        match &self.context {
            Some(name) => format!("{:?} in context {name}", self.language),
            None => format!("{:?}", self.language),
        }
    }

    /// Where its interpreter lives: as the session's, but with a scratch directory of its own.
    pub(super) fn place(&self, session: &Place) -> Place {
        let mut place = session.clone();
        if let Some(name) = &self.context {
            place.scratch = session.scratch.join("contexts").join(name);
        }
        place
    }
}

/// The slots that every session has, in the order of [`index`].
pub(super) fn defaults() -> Vec<Slot> {
    LANGUAGES
        .into_iter()
        .map(|language| Slot::new(language, None))
        .collect()
}

/// The slot of a language and context, made if it is new. Slots stay, so that their numbers do.
///
/// # Errors
/// What the name is not, or that there are too many, for the user.
pub(super) fn find(
    slots: &mut Vec<Slot>,
    language: Language,
    context: Option<&str>,
) -> Result<usize, String> {
    let Some(name) = context else {
        return Ok(index(language));
    };
    // It becomes the name of a directory.
    let fits = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    let is_name = (1..=MOST_NAME).contains(&name.len()) && name.bytes().all(fits);
    if !is_name || name == "." || name == ".." {
        return Err("a context's name is 1 to 64 of A-Z a-z 0-9 . _ -".into());
    }
    let is_it = |slot: &Slot| slot.language == language && slot.context.as_deref() == Some(name);
    if let Some(at) = slots.iter().position(is_it) {
        return Ok(at);
    }
    if slots.len() >= MOST {
        return Err(format!(
            "{MOST_CONTEXTS} contexts are the most one VM has; use one that is there"
        ));
    }
    slots.push(Slot::new(language, Some(name.to_owned())));
    Ok(slots.len() - 1)
}

/// Forgets the newest context if nothing came of it: what could not start must not count.
pub(super) fn forget_unused(slots: &mut Vec<Slot>) {
    slots.pop_if(|slot| {
        slot.context.is_some() && slot.interpreter.is_none() && slot.command.is_none()
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_context_that_never_ran_is_forgotten() {
        let mut slots = defaults();
        forget_unused(&mut slots);
        assert_eq!(slots.len(), LANGUAGES.len());
        assert_eq!(find(&mut slots, Language::Bash, Some("a")), Ok(3));
        forget_unused(&mut slots);
        assert_eq!(find(&mut slots, Language::Python, Some("b")), Ok(3));
    }

    #[test]
    fn contexts_are_found_again_apart_by_language_and_bounded() {
        let mut slots = defaults();
        let mut find = |language, name: &str| find(&mut slots, language, Some(name));
        assert_eq!(find(Language::Python, "a"), Ok(3));
        assert_eq!(find(Language::Bash, "a"), Ok(4));
        assert_eq!(find(Language::Python, "a"), Ok(3));
        for bad in ["", "a/b", "..", ".", "a b", &"x".repeat(65)] {
            assert!(find(Language::Python, bad).is_err(), "{bad}");
        }
        for number in 2..MOST_CONTEXTS {
            assert!(find(Language::Python, &format!("c{number}")).is_ok());
        }
        assert!(
            find(Language::Python, "one-more")
                .unwrap_err()
                .contains("16")
        );
        assert_eq!(find(Language::Bash, "a"), Ok(4));
    }
}
