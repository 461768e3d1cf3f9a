//! A persistent shell.
//!
//! `bash -i` without a terminal: of all its modes only the interactive one goes back to its
//! prompt when a command is interrupted, loops of builtins included, with its state whole. The
//! prompt is ours: lines on standard input source a file with the user's command, then report
//! the status on a descriptor that commands do not have.
//!
//! `exit`, or an error under `set -e`, ends the shell; it writes its state down first, and the
//! next shell takes that up.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::{Done, Heard};

/// Descriptors that the shell has beside the usual three; high, so that scripts' own numbers stay free.
pub mod descriptor {
    use std::os::fd::RawFd;
    /// Statuses, to the agent.
    pub const STATUS: RawFd = 201;
    /// Commands' standard output.
    pub const STDOUT: RawFd = 202;
    /// Commands' standard error.
    pub const STDERR: RawFd = 203;
}

/// Unread status bytes are kept up to here; honest reports are under a hundred bytes.
const MAX_STATUS: usize = 64 * 1024;

/// The agent's end of a shell.
#[derive(Debug)]
pub struct Shell {
    lines: File,
    status: File,
    heard: Vec<u8>,
    home: PathBuf,
    serial: u64,
    prelude: String,
}

impl Shell {
    /// A shell over its two pipes, with its files in `home`.
    pub fn new(lines: OwnedFd, status: OwnedFd, home: &Path) -> Self {
        Self {
            lines: lines.into(),
            status: status.into(),
            heard: Vec::new(),
            home: home.to_owned(),
            serial: 0,
            prelude: String::new(),
        }
    }

    /// Writes the files that every shell sources and the first lines of this one.
    ///
    /// # Errors
    /// No room, or the shell is gone.
    pub fn begin(&mut self) -> io::Result<()> {
        use descriptor::{STATUS, STDERR, STDOUT};
        let home = self.home.display();
        fs::write(
            self.home.join("go"),
            format!(
                ". {home}/bash </dev/null >&{STDOUT} 2>&{STDERR} {STATUS}>&- {STDOUT}>&- {STDERR}>&-\n"
            ),
        )?;
        fs::write(
            self.home.join("bye"),
            format!(
                "{{ declare -p; declare -f; alias -p; printf 'cd -- %q\\n' \"$PWD\"; }} >{home}/state 2>/dev/null\n"
            ),
        )?;
        let state = self.home.join("state");
        let begin = format!(
            "set +o history +o histexpand; unset HISTFILE MAILCHECK PS1 PS2 PROMPT_COMMAND; PS1= PS2=\n\
             shopt -u checkwinsize\n\
             if [ -s {state} ]; then . {state}; rm -f {state}; fi\n\
             trap '. {home}/bye' EXIT\n",
            state = state.display(),
        );
        fs::write(self.home.join("begin"), begin)?;
        self.lines
            .write_all(format!(". {home}/begin 2>/dev/null\n").as_bytes())?;
        self.ask_status()
    }

    /// Readable when there is a status.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.status.as_fd()
    }

    /// Starts a command.
    ///
    /// # Errors
    /// No room, or the shell is gone.
    pub fn execute(&mut self, source: &[u8], env: &BTreeMap<String, String>) -> io::Result<()> {
        fs::write(self.home.join("bash"), source)?;
        let home = self.home.display();
        let mut lines = String::new();
        let mut after = String::new();
        for (name, value) in env.iter().filter(|(name, _)| is_name(name)) {
            let saved = format!("__thaw_saved_{name}");
            writeln!(self.prelude, "if [[ -v {name} ]]; then {saved}=${name}; fi")
                .map_err(io::Error::other)?;
            export(&mut self.prelude, name, value);
            after.push_str(&format!(
                "if [[ -v {saved} ]]; then {name}=${saved}; unset {saved}; else unset {name}; fi\n"
            ));
        }
        if !self.prelude.is_empty() {
            fs::write(self.home.join("prelude"), std::mem::take(&mut self.prelude))?;
            lines.push_str(&format!(". {home}/prelude\n"));
        }
        self.serial += 1;
        lines.push_str(&format!(". {home}/go\n"));
        lines.push_str(&self.status_line());
        if !after.is_empty() {
            fs::write(self.home.join("after"), after)?;
            lines.push_str(&format!(". {home}/after\n"));
        }
        self.lines.write_all(lines.as_bytes())
    }

    /// What takes effect before the next command: randomness and environment of a new generation.
    pub fn renew(&mut self, seed: &[u8], env: &BTreeMap<String, String>) {
        let random = seed
            .iter()
            .take(4)
            .fold(0u32, |number, byte| number << 8 | u32::from(*byte));
        self.prelude.push_str(&format!(
            "RANDOM={random}\nread -r HOSTNAME </etc/hostname\n"
        ));
        for (name, value) in env.iter().filter(|(name, _)| is_name(name)) {
            export(&mut self.prelude, name, value);
        }
    }

    /// Asks for the status of the last command (again). Answers to superseded questions are
    /// dropped by their number.
    ///
    /// # Errors
    /// The shell is gone.
    pub fn ask_status(&mut self) -> io::Result<()> {
        let line = self.status_line();
        self.lines.write_all(line.as_bytes())
    }

    fn status_line(&self) -> String {
        let status = descriptor::STATUS;
        // One short write, so that the agent is woken once.
        format!("echo {} $?>&{status}\n", self.serial)
    }

    /// Reads statuses; `None` at the end of the stream.
    ///
    /// # Errors
    /// The pipe's failure, or a flood on it.
    pub fn hear(&mut self) -> io::Result<Option<Vec<Heard>>> {
        let mut bytes = [0; 512];
        match self.status.read(&mut bytes) {
            Ok(0) => return Ok(None),
            Ok(n) => self.heard.extend(&bytes[..n]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if self.heard.len() > MAX_STATUS {
            return Err(io::Error::other("a flood of statuses"));
        }
        let mut heard = Vec::new();
        while let Some((report, len)) = whole_report(&self.heard) {
            self.heard.drain(..len);
            // Serial 0 is the question that ended the shell's preparation. A shell that was started for
            // a command has been given that already, and is no less ready for it.
            if report.serial == 0 {
                heard.push(Heard::Ready);
            } else if report.serial == self.serial {
                heard.push(Heard::Done(Done {
                    exit_code: report.status,
                    ..Done::default()
                }));
            }
        }
        Ok(Some(heard))
    }
}

/// A line `serial status`.
#[derive(Debug, PartialEq)]
struct StatusReport {
    serial: u64,
    status: i32,
}

/// The first whole report and its length in bytes. Nonsense reads as zeroes: only the user's own
/// code can have written it.
fn whole_report(bytes: &[u8]) -> Option<(StatusReport, usize)> {
    let len = bytes.iter().position(|byte| *byte == b'\n')? + 1;
    let text = String::from_utf8_lossy(&bytes[..len]);
    let mut words = text.split_whitespace();
    let report = StatusReport {
        serial: words.next().and_then(|word| word.parse().ok()).unwrap_or(0),
        status: words.next().and_then(|word| word.parse().ok()).unwrap_or(0),
    };
    Some((report, len))
}

fn is_name(name: &str) -> bool {
    !name.starts_with(|first: char| first.is_ascii_digit())
        && !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

fn export(script: &mut String, name: &str, value: &str) {
    script.push_str(&format!(
        "export {name}='{}'\n",
        value.replace('\'', r"'\''")
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_when_it_is_whole() {
        let bytes = b"17 3\n18 0\n";
        let report = StatusReport {
            serial: 17,
            status: 3,
        };
        assert_eq!(whole_report(bytes), Some((report, 5)));
        assert_eq!(whole_report(&bytes[..4]), None);
        let nonsense = StatusReport {
            serial: 0,
            status: 0,
        };
        assert_eq!(whole_report(b"\xff x\n"), Some((nonsense, 4)));
    }

    #[test]
    fn values_are_quoted_and_names_are_checked() {
        let mut script = String::new();
        export(&mut script, "A", "it's $x");
        assert_eq!(script, "export A='it'\\''s $x'\n");
        assert!(is_name("A_1") && !is_name("1A") && !is_name("A;rm") && !is_name(""));
    }
}
