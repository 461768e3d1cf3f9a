//! One piece of work on a guest's files, and what its end means over HTTP.

use hyper::StatusCode;
use thaw_wire::message::{Exit, FileWork, Process, Program};

use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::session::{ProcessEvent, ProcessHandle, SessionId};

/// Longest path: the guest kernel's own limit.
const MOST_PATH: usize = 4096;

/// Most bytes of a guest's own words that are passed on.
const MOST_WORDS: usize = 1024;

/// The session that a path or form names. Whatever is no id names nothing.
pub(in crate::http::routes) fn session_id(text: &str) -> Result<SessionId, ApiError> {
    uuid::Uuid::try_parse(text)
        .ok()
        .and_then(|id| SessionId::parse(&id.as_hyphenated().to_string()))
        .ok_or_else(|| ApiError::not_found("Session not found"))
}

/// A path that a guest's kernel could take.
pub(super) fn path(text: &str) -> Result<String, ApiError> {
    let bad = |why: &str| ApiError::new(StatusCode::BAD_REQUEST, format!("The path {why}"));
    if text.is_empty() {
        return Err(bad("is empty"));
    }
    if text.contains('\0') {
        return Err(bad("has a NUL character"));
    }
    if text.len() >= MOST_PATH {
        return Err(bad("is longer than 4095 bytes"));
    }
    Ok(text.to_owned())
}

/// Work that runs.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) process: ProcessHandle,
    words: Vec<u8>,
}

/// What a piece of work does next.
pub(super) enum Step {
    /// It gave these bytes.
    Bytes(Vec<u8>),
    /// It is done.
    Done,
}

impl Work {
    /// Starts a piece of work in the caller's session.
    pub(super) async fn start(
        app: &App,
        caller: &Caller,
        session: &SessionId,
        work: FileWork,
    ) -> Result<Self, ApiError> {
        let process = Process {
            program: Program::Files { work },
            env: Default::default(),
            cwd: None,
            terminal: None,
            name: None,
        };
        let backend = &app.backend;
        let process = backend.open(&caller.tenant, caller.limits, session, process);
        Ok(Self {
            process: process.await?,
            words: Vec::new(),
        })
    }

    /// The next step.
    ///
    /// # Errors
    /// The work failed, for the client to read.
    pub(super) async fn next(&mut self) -> Result<Step, ApiError> {
        loop {
            match self.process.next().await {
                ProcessEvent::Stdout(bytes) if bytes.is_empty() => {}
                ProcessEvent::Stdout(bytes) => return Ok(Step::Bytes(bytes)),
                ProcessEvent::Stderr(bytes) => {
                    let room = MOST_WORDS.saturating_sub(self.words.len());
                    self.words.extend(bytes.iter().take(room));
                }
                ProcessEvent::Exit(exit) if exit.exit_code == 0 => return Ok(Step::Done),
                ProcessEvent::Exit(exit) => return Err(failure(&exit, &self.words)),
                ProcessEvent::Gone(why) => return Err(ApiError::new(StatusCode::CONFLICT, why)),
                // Only terminals sleep.
                ProcessEvent::Asleep => {
                    let why = "the VM was suspended";
                    return Err(ApiError::new(StatusCode::CONFLICT, why));
                }
            }
        }
    }

    /// Everything that it gives, if that is not more than `most` bytes.
    ///
    /// # Errors
    /// As [`Self::next`], or it is more.
    pub(super) async fn all(mut self, most: usize) -> Result<Vec<u8>, ApiError> {
        let mut all = Vec::new();
        while let Step::Bytes(bytes) = self.next().await? {
            if all.len() + bytes.len() > most {
                let detail = "The answer is too long; ask for less";
                return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, detail));
            }
            all.extend(bytes);
        }
        Ok(all)
    }
}

/// What a failure means to the client: the guest's error number decides the status.
fn failure(exit: &Exit, words: &[u8]) -> ApiError {
    use nix::libc;
    let said = String::from_utf8_lossy(words);
    let said = said.trim();
    let detail = match (&exit.note, said) {
        (Some(note), _) => note.clone(),
        (None, "") => format!("The VM could not do that (error {})", exit.exit_code),
        (None, said) => said.to_owned(),
    };
    let status = match exit.exit_code {
        libc::ENOENT => StatusCode::NOT_FOUND,
        libc::EACCES | libc::EPERM | libc::EROFS => StatusCode::FORBIDDEN,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::ENOMEM => StatusCode::PAYLOAD_TOO_LARGE,
        libc::EINVAL | libc::ENAMETOOLONG | libc::ELOOP => StatusCode::BAD_REQUEST,
        // It exists, is (no) directory, is not empty, is busy, was killed, ...: the state forbids it.
        _ => StatusCode::CONFLICT,
    };
    ApiError::new(status, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_s_errors_have_a_status_and_its_words() {
        let exit = |exit_code| Exit {
            exit_code,
            ..Exit::default()
        };
        let status = |code| failure(&exit(code), b"/x: why\n").status().as_u16();
        assert_eq!(status(2), 404);
        assert_eq!(status(13), 403);
        assert_eq!(status(17), 409);
        assert_eq!(status(28), 413);
        assert_eq!(status(36), 400);
        assert_eq!(status(255), 409);
    }

    #[test]
    fn paths_are_judged_before_a_guest_sees_them() {
        assert!(path("/tmp/x").is_ok() && path("../../etc/passwd").is_ok());
        assert!(path("").is_err() && path("a\0b").is_err() && path(&"x".repeat(4096)).is_err());
    }
}
