//! One process beside the commands: its descriptors, its input, its end.
//!
//! Everything here is non-blocking, and what is held for a process is bounded by the credit it was
//! given: [`INITIAL_CREDIT`] of input, nothing of output.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, pipe2};
use thaw_wire::frame::INITIAL_CREDIT;
use thaw_wire::message::{Exit, Process as Order, Program, Size};

use crate::interpreter::Place;
use crate::sys::child::{self, Setup};
use crate::sys::device;

/// What the agent calls itself when it works on files.
pub const FILES: &str = "thaw-files";

/// Output of a process that ended is waited for so long when something it left behind still holds
/// its pipes or its terminal.
const GRACE: Duration = Duration::from_millis(200);

/// After a hang-up, how long until the process is killed.
const HANGUP_WITHIN: Duration = Duration::from_secs(2);

/// Room in the pipes of work on files, which moves much: the kernel's own limit for one pipe.
const WIDE_PIPE: i32 = 1 << 20;

/// Environment of a terminal: what every terminal program understands.
const TERM: &str = "xterm-256color";

/// A descriptor of a process, in the order of the engine's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Its standard output, or the terminal.
    Stdout,
    /// Its standard error.
    Stderr,
    /// Its standard input, where that is a descriptor of its own.
    Stdin,
}

impl Part {
    /// Every part.
    pub const ALL: [Self; 3] = [Self::Stdout, Self::Stderr, Self::Stdin];
}

/// A running process.
#[derive(Debug)]
pub struct Process {
    /// Leader of its own session and process group.
    pub pid: Pid,
    /// Payload bytes that may be sent to the host.
    pub credit: u32,
    /// Standard output and error, or the terminal and nothing.
    outputs: [Option<OwnedFd>; 2],
    /// Standard input, or the terminal again.
    input: Option<OwnedFd>,
    is_terminal: bool,
    queue: VecDeque<Vec<u8>>,
    /// Bytes of the queue's first piece that are written.
    written: usize,
    input_ended: bool,
    /// Input taken and not granted again.
    owed: u32,
    status: Option<i32>,
    /// When what is left of its output is given up.
    give_up: Option<Instant>,
    kill_at: Option<Instant>,
    started: Instant,
}

fn winsize(size: Size) -> Winsize {
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
            // The agent itself: wherever it was started from, this is it.
            let mut command = Command::new("/proc/self/exe");
            command.arg0(FILES).arg(serde_json::to_string(work)?);
            Ok(command)
        }
    }
}

impl Process {
    /// Starts a process with the session's environment and its own.
    ///
    /// # Errors
    /// There is no such program, or the system cannot start it.
    pub fn start(
        order: &Order,
        place: &Place,
        session: &BTreeMap<String, String>,
    ) -> io::Result<Self> {
        let mut command = command(order)?;
        command.env_clear().envs(&place.env).envs(session);
        if order.terminal.is_some() {
            command.env("TERM", TERM);
        }
        command.envs(&order.env);
        command.current_dir(
            order
                .cwd
                .as_ref()
                .map_or(place.home.as_path(), AsRef::as_ref),
        );
        let cgroup = match &place.cgroup {
            Some(path) => Some(File::options().write(true).open(path)?.into()),
            None => None,
        };
        let setup = Setup {
            descriptors: Vec::new(),
            cgroup,
            drop_doorbell: place.holds_doorbell,
            takes_terminal: order.terminal.is_some(),
        };
        let (outputs, input) = match order.terminal {
            Some(size) => {
                let pair = openpty(Some(&winsize(size)), None)?;
                command
                    .stdin(Stdio::from(pair.slave.try_clone()?))
                    .stdout(Stdio::from(pair.slave.try_clone()?))
                    .stderr(Stdio::from(pair.slave));
                set_non_blocking(&pair.master)?;
                fcntl(
                    &pair.master,
                    FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
                )?;
                let input = pair.master.try_clone()?;
                ([Some(pair.master), None], input)
            }
            None => {
                let (their_input, input) = pipe2(OFlag::O_CLOEXEC)?;
                let (stdout, their_stdout) = pipe2(OFlag::O_CLOEXEC)?;
                let (stderr, their_stderr) = pipe2(OFlag::O_CLOEXEC)?;
                for fd in [&input, &stdout, &stderr] {
                    set_non_blocking(fd)?;
                }
                if matches!(order.program, Program::Files { .. }) {
                    widen(&input);
                    widen(&stdout);
                }
                command
                    .stdin(Stdio::from(their_input))
                    .stdout(Stdio::from(their_stdout))
                    .stderr(Stdio::from(their_stderr));
                ([Some(stdout), Some(stderr)], input)
            }
        };
        let child = child::spawn(command, setup)?;
        Ok(Self {
            pid: Pid::from_raw(child.id() as i32),
            credit: INITIAL_CREDIT,
            outputs,
            input: Some(input),
            is_terminal: order.terminal.is_some(),
            queue: VecDeque::new(),
            written: 0,
            input_ended: false,
            owed: 0,
            status: None,
            give_up: None,
            kill_at: None,
            started: Instant::now(),
        })
    }

    /// What to poll for a part, and whether to write rather than read; nothing when nothing is
    /// wanted of it now.
    pub fn interest(&self, part: Part) -> Option<(BorrowedFd<'_>, bool)> {
        match part {
            Part::Stdin => {
                let input = self.input.as_ref().filter(|_| !self.queue.is_empty())?;
                Some((input.as_fd(), true))
            }
            Part::Stdout | Part::Stderr => {
                let output = self.outputs[part as usize].as_ref()?;
                (self.credit > 0).then_some((output.as_fd(), false))
            }
        }
    }

    /// The descriptor of a part, for taking it out of a poll.
    pub fn fd(&self, part: Part) -> Option<BorrowedFd<'_>> {
        match part {
            Part::Stdin => self.input.as_ref().map(AsFd::as_fd),
            Part::Stdout | Part::Stderr => self.outputs[part as usize].as_ref().map(AsFd::as_fd),
        }
    }

    /// Takes input from the host; an empty piece is its end.
    pub fn take_input(&mut self, bytes: Vec<u8>) {
        if bytes.is_empty() {
            self.input_ended = true;
        } else if self.input.is_none() {
            // Nobody reads it any more; the host must not wait for that.
            self.owed = self.owed.saturating_add(bytes.len() as u32);
        } else {
            self.queue.push_back(bytes);
        }
    }

    /// Writes as much input as the process takes now.
    pub fn write_on(&mut self) {
        while let (Some(input), Some(piece)) = (&self.input, self.queue.front()) {
            match nix::unistd::write(input, &piece[self.written..]) {
                Ok(count) => {
                    self.written += count;
                    self.owed = self.owed.saturating_add(count as u32);
                    if self.written == piece.len() {
                        self.queue.pop_front();
                        self.written = 0;
                    }
                }
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return,
                // It closed its input, or it is gone.
                Err(_) => {
                    let left: usize = self.queue.drain(..).map(|piece| piece.len()).sum();
                    self.owed = self.owed.saturating_add((left - self.written) as u32);
                    self.written = 0;
                    self.input = None;
                }
            }
        }
        // A terminal has no end of input: its owner types one.
        if self.input_ended && self.queue.is_empty() && !self.is_terminal {
            self.input = None;
        }
    }

    /// Input that may be granted again, once it is worth a frame or nothing waits.
    pub fn grant(&mut self) -> Option<u32> {
        let is_worth_it = self.owed >= INITIAL_CREDIT / 4 || self.queue.is_empty();
        (self.owed > 0 && is_worth_it).then(|| std::mem::take(&mut self.owed))
    }

    /// Reads some output into `into`; how many bytes, 0 when there are none now.
    pub fn read(&mut self, part: Part, into: &mut [u8]) -> usize {
        let Some(output) = &self.outputs[part as usize] else {
            return 0;
        };
        match nix::unistd::read(output, into) {
            Ok(count) if count > 0 => count,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {
                if self
                    .give_up
                    .is_some_and(|give_up| give_up <= Instant::now())
                {
                    self.outputs[part as usize] = None;
                }
                0
            }
            // The end; a terminal that nobody holds any more says EIO.
            Ok(_) | Err(_) => {
                self.outputs[part as usize] = None;
                0
            }
        }
    }

    /// It ended with this status.
    pub fn ended(&mut self, status: i32) {
        self.status = Some(status);
        self.give_up = Some(Instant::now() + GRACE);
    }

    /// Its last frame, once everything before it has been read.
    pub fn exit(&self) -> Option<Exit> {
        let exit_code = self.status?;
        let is_read = self.outputs.iter().all(Option::is_none);
        is_read.then(|| Exit {
            exit_code,
            wall_us: u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX),
            ..Exit::default()
        })
    }

    /// When [`Self::on_time`] must be asked next.
    pub fn next_due(&self) -> Option<Instant> {
        let waits = self.outputs.iter().any(Option::is_some) && self.credit > 0;
        let give_up = self.give_up.filter(|_| waits);
        [give_up, self.kill_at].into_iter().flatten().min()
    }

    /// What the passing of time demands.
    pub fn on_time(&mut self, now: Instant) {
        if self.kill_at.is_some_and(|at| at <= now) {
            self.kill_at = None;
            self.signal(Signal::SIGKILL);
        }
    }

    /// Signals its process group. A group that is gone is no error.
    pub fn signal(&self, signal: Signal) {
        // After its end the number may be somebody else's.
        if self.status.is_some() {
            return;
        }
        if let Err(error) = killpg(self.pid, signal)
            && error != nix::Error::ESRCH
        {
            crate::console::say(&format!("cannot signal {}: {error}", self.pid));
        }
    }

    /// Tells it that its terminal is gone, and sees to it that it goes, too.
    pub fn hang_up(&mut self) {
        self.signal(Signal::SIGHUP);
        // A stopped process hears nothing else.
        self.signal(Signal::SIGCONT);
        self.kill_at = Some(Instant::now() + HANGUP_WITHIN);
    }

    /// Gives its terminal another size.
    pub fn resize(&self, size: Size) {
        let Some(terminal) = self.outputs[0].as_ref().filter(|_| self.is_terminal) else {
            return;
        };
        if let Err(error) = device::set_window_size(terminal.as_fd(), &winsize(size)) {
            crate::console::say(&format!("a terminal keeps its size: {error}"));
        }
    }
}
