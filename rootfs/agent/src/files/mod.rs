//! Work on files, in a process of its own: a file system that hangs (a pipe, a FUSE mount of the
//! user's) hangs this process, never PID 1, and what it costs is the session's.

mod draft;
mod transfer;
mod tree;
mod watch;

use std::io;
use std::process::ExitCode;

use thaw_wire::message::FileWork;

/// Exit code of failures that have no error number.
const NO_NUMBER: u8 = 255;

/// Why work on a file failed.
#[derive(Debug)]
pub struct Failure {
    /// The file.
    path: String,
    error: io::Error,
}

/// Names the file that an error is about.
trait About<T> {
    fn about(self, path: &str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> About<T> for Result<T, E> {
    fn about(self, path: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure {
            path: path.to_owned(),
            error: error.into(),
        })
    }
}

/// Does the work that `text` describes (JSON of [`FileWork`]). The exit code is 0, or the system's
/// error number, with a text on standard error.
pub fn main(text: &str) -> ExitCode {
    let done = match serde_json::from_str(text) {
        Ok(work) => carry_out(&work),
        Err(error) => Err(io::Error::other(error)).about("the order"),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { path, error }) => {
            // "No such file or directory (os error 2)": the number is told by the exit code.
            let why = error.to_string();
            let why = why.split(" (os error").next().unwrap_or_default();
            eprintln!("{path}: {why}");
            // What the system would never see, such as a path with a NUL in it, is as invalid.
            let is_invalid = error.kind() == io::ErrorKind::InvalidInput;
            let number = error
                .raw_os_error()
                .or(is_invalid.then_some(libc::EINVAL))
                .and_then(|code| u8::try_from(code).ok());
            ExitCode::from(number.unwrap_or(NO_NUMBER))
        }
    }
}

/// Removes what transfers to this file left that something ended.
pub fn clean(path: &str) -> ExitCode {
    if let Ok((_, directory)) = transfer::locate(path) {
        draft::remove_stale(&directory);
    }
    ExitCode::SUCCESS
}

fn carry_out(work: &FileWork) -> Result<(), Failure> {
    match work {
        FileWork::Read { path } => transfer::read(path),
        FileWork::Write {
            path,
            mode,
            parents,
        } => transfer::write(path, *mode, *parents),
        FileWork::List {
            path,
            recursive,
            limit,
        } => tree::list(path, *recursive, *limit),
        FileWork::Changed { since_ns, limit } => tree::changed(*since_ns, *limit),
        FileWork::Stat { path } => tree::stat(path),
        FileWork::Mkdir { path, parents } => tree::mkdir(path, *parents),
        FileWork::Remove { path, recursive } => tree::remove(path, *recursive),
        FileWork::Rename { from, to } => std::fs::rename(from, to).about(from),
        FileWork::Watch { path, recursive } => watch::watch(path, *recursive),
    }
}
