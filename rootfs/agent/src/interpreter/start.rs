//! Starting an interpreter.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Pid, pipe2};
use thaw_wire::message::Language;

use super::bash::{Shell, descriptor};
use super::channel::Channel;
use super::{Interpreter, Talk};
use crate::sys::child::{self, Setup};

/// The lowest number that a descriptor is moved to in a child; see [`crate::sys::child`].
pub const LOWEST_MOVED: i32 = 200;

/// Descriptors of a helper.
const COMMANDS: i32 = LOWEST_MOVED;
const ATTEND: i32 = 201;

/// Where interpreters live and run.
#[derive(Clone, Debug)]
pub struct Place {
    /// The directory of the runner's files.
    pub runner: PathBuf,
    /// A directory in memory that only the agent and the shell use.
    pub scratch: PathBuf,
    /// Where commands start.
    pub home: PathBuf,
    /// `cgroup.procs` of the commands' control group.
    pub cgroup: Option<PathBuf>,
    /// Whether this process may ring the doorbell, which children must not.
    pub holds_doorbell: bool,
    /// What every interpreter finds in its environment, whatever the session adds.
    pub env: BTreeMap<String, String>,
}

/// The program of a language, if the image has it.
fn program(language: Language, place: &Place) -> Option<PathBuf> {
    let (name, helper) = match language {
        Language::Python => ("python3", Some("main.py")),
        Language::Bash => ("bash", None),
        Language::Javascript => ("node", Some("node.js")),
    };
    if helper.is_some_and(|helper| !place.runner.join(helper).is_file()) {
        return None;
    }
    let path = place.env.get("PATH").map_or(crate::PATH, String::as_str);
    path.split(':')
        .map(|at| Path::new(at).join(name))
        .find(|at| at.is_file())
}

/// Whether the image has a language.
pub fn available(language: Language, place: &Place) -> bool {
    program(language, place).is_some()
}

/// A pipe whose read end does not block. (read end, write end)
fn output_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((read, write))
}

/// Starts the interpreter of a language with these environment variables.
///
/// # Errors
/// The image lacks it, or the system cannot start it.
pub fn start(
    language: Language,
    place: &Place,
    env: &BTreeMap<String, String>,
) -> io::Result<Interpreter> {
    let program = program(language, place).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("this image has no {language:?}"),
        )
    })?;
    let (stdout, their_stdout) = output_pipe()?;
    let (stderr, their_stderr) = output_pipe()?;
    let cgroup = match &place.cgroup {
        Some(path) => Some(File::options().write(true).open(path)?.into()),
        None => None,
    };
    let mut setup = Setup {
        descriptors: Vec::new(),
        cgroup,
        drop_doorbell: place.holds_doorbell,
        takes_terminal: false,
    };
    let mut command = Command::new(&program);
    command
        .env_clear()
        .envs(&place.env)
        .envs(env)
        .current_dir(&place.home);
    let talk = match language {
        Language::Bash => {
            let (their_lines, lines) = pipe2(OFlag::O_CLOEXEC)?;
            let (status, their_status) = output_pipe()?;
            command
                .args(["--norc", "--noprofile", "--noediting", "-i"])
                .arg0("bash")
                .env("PS1", "")
                .stdin(Stdio::from(their_lines))
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            setup.descriptors = vec![
                (their_status, descriptor::STATUS),
                (their_stdout, descriptor::STDOUT),
                (their_stderr, descriptor::STDERR),
            ];
            std::fs::create_dir_all(&place.scratch)?;
            Talk::Shell(Shell::new(lines, status, &place.scratch))
        }
        Language::Python | Language::Javascript => {
            let (commands, their_commands) = Channel::pair()?;
            let (attend, their_attend) = Channel::pair()?;
            let script = if language == Language::Python {
                "main.py"
            } else {
                "node.js"
            };
            command
                .arg(place.runner.join(script))
                .env("THAW_COMMANDS", COMMANDS.to_string())
                .env("THAW_ATTEND", ATTEND.to_string())
                .stdin(Stdio::null())
                .stdout(Stdio::from(their_stdout))
                .stderr(Stdio::from(their_stderr));
            setup.descriptors = vec![(their_commands, COMMANDS), (their_attend, ATTEND)];
            Talk::Helper { commands, attend }
        }
    };
    debug_assert!(
        setup
            .descriptors
            .iter()
            .all(|(fd, _)| fd.as_raw_fd() < LOWEST_MOVED)
    );
    let child = child::spawn(command, setup)?;
    let mut interpreter = Interpreter {
        pid: Pid::from_raw(child.id() as i32),
        pipes: [stdout, stderr],
        talk,
        ready: false,
    };
    if let Talk::Shell(shell) = &mut interpreter.talk {
        shell.begin()?;
    }
    Ok(interpreter)
}
