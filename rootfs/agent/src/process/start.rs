//! Starting a process: its program, and the pipes or the terminal that it runs on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::unistd::{Pid, pipe2};
use thaw_wire::message::{FileWork, Process as Order, Program, Size};

use super::{CLEAN, FILES};
use crate::interpreter::Place;
use crate::sys::child::{self, Setup};

/// Room in the pipes of work on files, which moves much: the kernel's own limit for one pipe.
const WIDE_PIPE: i32 = 1 << 20;

/// Environment of a terminal: what every terminal program understands.
const TERM: &str = "xterm-256color";

/// Our ends of a process that runs, none of which blocks.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) pid: Pid,
    /// Standard output and error, or the terminal and nothing.
    pub(super) outputs: [Option<OwnedFd>; 2],
    /// Standard input, or the terminal again.
    pub(super) input: OwnedFd,
}

pub(super) fn winsize(size: Size) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn set_non_blocking(fd: impl AsFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}

/// A larger pipe is faster; one that cannot be had works as well.
fn widen(fd: impl AsFd) {
    if let Err(error) = fcntl(fd, FcntlArg::F_SETPIPE_SZ(WIDE_PIPE)) {
        crate::console::say(&format!("a pipe stays narrow: {error}"));
    }
}

/// The agent, for work on files: wherever it was started from, this is it.
fn itself() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(FILES);
    command
}

/// Where a process starts.
fn cwd<'a>(order: &'a Order, place: &'a Place) -> &'a Path {
    let wanted = order.cwd.as_ref();
    wanted.map_or(place.home.as_path(), AsRef::as_ref)
}

/// The file that a process is to write, if that is its work.
pub(super) fn written(order: &Order, place: &Place) -> Option<PathBuf> {
    match &order.program {
        Program::Files {
            work: FileWork::Write { path, .. },
        } => Some(cwd(order, place).join(path)),
        _ => None,
    }
}

fn setup(place: &Place, takes_terminal: bool) -> io::Result<Setup> {
    let cgroup = match &place.cgroup {
        Some(path) => Some(File::options().write(true).open(path)?.into()),
        None => None,
    };
    Ok(Setup {
        descriptors: Vec::new(),
        cgroup,
        drop_doorbell: place.holds_doorbell,
        takes_terminal,
    })
}

/// Starts the removal of what a broken off transfer to this file left, in a process that nobody waits
/// for: the file system may be one that answers late or never.
///
/// # Errors
/// The system cannot start it.
pub fn clean(path: &Path, place: &Place) -> io::Result<()> {
    let mut command = itself();
    command
        .arg(CLEAN)
        .arg(path)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    child::spawn(command, setup(place, false)?).map(drop)
}

/// The program, not started yet.
fn command(order: &Order) -> io::Result<Command> {
    match &order.program {
        Program::Command { argv } => {
            let Some((program, rest)) = argv.split_first() else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "there is no program",
                ));
            };
            let mut command = Command::new(program);
            command.args(rest);
            Ok(command)
        }
        Program::Files { work } => {
            let mut command = itself();
            command.arg(serde_json::to_string(work)?);
            Ok(command)
        }
    }
}

/// Starts a process with the session's environment and its own.
///
/// # Errors
/// There is no such program, or the system cannot start it.
pub(super) fn start(
    order: &Order,
    place: &Place,
    session: &BTreeMap<String, String>,
) -> io::Result<Started> {
    let mut command = command(order)?;
    command.env_clear().envs(&place.env).envs(session);
    if order.terminal.is_some() {
        command.env("TERM", TERM);
    }
    command.envs(&order.env);
    command.current_dir(cwd(order, place));
    let setup = setup(place, order.terminal.is_some())?;
    let (outputs, input) = match order.terminal {
        Some(size) => terminal(&mut command, size)?,
        None => {
            let is_wide = matches!(order.program, Program::Files { .. });
            pipes(&mut command, is_wide)?
        }
    };
    let child = child::spawn(command, setup)?;
    Ok(Started {
        pid: Pid::from_raw(child.id() as i32),
        outputs,
        input,
    })
}

type Ends = ([Option<OwnedFd>; 2], OwnedFd);

fn terminal(command: &mut Command, size: Size) -> io::Result<Ends> {
    let pair = openpty(Some(&winsize(size)), None)?;
    // The child has the terminal under three numbers and no more: one that it does not know of would
    // keep the terminal open for whatever it leaves behind.
    for fd in [&pair.master, &pair.slave] {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    set_non_blocking(&pair.master)?;
    command
        .stdin(Stdio::from(pair.slave.try_clone()?))
        .stdout(Stdio::from(pair.slave.try_clone()?))
        .stderr(Stdio::from(pair.slave));
    let input = pair.master.try_clone()?;
    Ok(([Some(pair.master), None], input))
}

fn pipes(command: &mut Command, is_wide: bool) -> io::Result<Ends> {
    let (their_input, input) = pipe2(OFlag::O_CLOEXEC)?;
    let (stdout, their_stdout) = pipe2(OFlag::O_CLOEXEC)?;
    let (stderr, their_stderr) = pipe2(OFlag::O_CLOEXEC)?;
    for fd in [&input, &stdout, &stderr] {
        set_non_blocking(fd)?;
    }
    if is_wide {
        widen(&input);
        widen(&stdout);
    }
    command
        .stdin(Stdio::from(their_input))
        .stdout(Stdio::from(their_stdout))
        .stderr(Stdio::from(their_stderr));
    Ok(([Some(stdout), Some(stderr)], input))
}
