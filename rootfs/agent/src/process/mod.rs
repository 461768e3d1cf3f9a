//! One process beside the commands: its descriptors, its input, its end.
//!
//! Everything here is non-blocking, and what is held for a process is bounded by the credit it was
//! given: [`INITIAL_CREDIT`] of input, nothing of output.

mod input;
mod start;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use thaw_wire::frame::INITIAL_CREDIT;
use thaw_wire::message::{Exit, Process as Order, Size};

pub use input::{Input, Overrun};
pub use start::clean;

use crate::interpreter::Place;
use crate::limits;
use crate::sys::device;

/// What the agent calls itself when it works on files.
pub const FILES: &str = "thaw-files";

/// What it is told then to remove what a broken off transfer left, instead of work to do.
pub const CLEAN: &str = "--clean";

/// Output of a process that ended is waited for so long when something it left behind still holds
/// its pipes or its terminal. What is there by then is its own, what comes later is not.
const GRACE: Duration = Duration::from_millis(200);

/// After a hang-up, how long until the process is killed.
const HANGUP_WITHIN: Duration = Duration::from_secs(2);

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

/// What a process writes to.
#[derive(Debug)]
struct Output {
    fd: OwnedFd,
    /// Bytes that still count, once that is settled.
    left: Option<usize>,
}

/// A running process.
#[derive(Debug)]
pub struct Process {
    /// Leader of its own session and process group.
    pub pid: Pid,
    /// Payload bytes that may be sent to the host.
    pub credit: u32,
    /// Where what the host sends goes.
    pub input: Input,
    outputs: [Option<Output>; 2],
    is_terminal: bool,
    /// The host wants no more of it.
    is_unwanted: bool,
    /// Its status and its processor time in microseconds.
    end: Option<(i32, u64)>,
    /// When it is settled what of its output counts.
    settle_at: Option<Instant>,
    kill_at: Option<Instant>,
    started: Instant,
    /// The file that it writes, if that is its work.
    writes: Option<PathBuf>,
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
        let is_terminal = order.terminal.is_some();
        let ends = start::start(order, place, session)?;
        let outputs = ends.outputs;
        Ok(Self {
            pid: ends.pid,
            credit: INITIAL_CREDIT,
            input: Input::new(ends.input, is_terminal),
            outputs: outputs.map(|fd| fd.map(|fd| Output { fd, left: None })),
            is_terminal,
            is_unwanted: false,
            end: None,
            settle_at: None,
            kill_at: None,
            started: Instant::now(),
            writes: start::written(order, place),
        })
    }

    /// What to poll for a part, and whether to write rather than read; nothing when nothing is
    /// wanted of it now.
    pub fn interest(&self, part: Part) -> Option<(BorrowedFd<'_>, bool)> {
        match part {
            Part::Stdin => self.input.waiting().map(|fd| (fd, true)),
            Part::Stdout | Part::Stderr => {
                let fd = self.fd(part).filter(|_| self.credit > 0)?;
                Some((fd, false))
            }
        }
    }

    /// The descriptor of a part, for taking it out of a poll.
    pub fn fd(&self, part: Part) -> Option<BorrowedFd<'_>> {
        match part {
            Part::Stdin => self.input.fd(),
            Part::Stdout | Part::Stderr => {
                let output = self.outputs[part as usize].as_ref()?;
                Some(output.fd.as_fd())
            }
        }
    }

    /// Takes input from the host; an empty piece is its end. A host that sends more than it was granted has
    /// lost count, and with that the process.
    pub fn take_input(&mut self, bytes: &[u8]) {
        if self.input.take(bytes).is_err() {
            crate::console::say(&format!("{} gets input without credit", self.pid));
            self.input.give_up();
            self.kill();
        }
    }

    /// Reads some output into `into`; how many bytes, 0 when there are none now.
    pub fn read(&mut self, part: Part, into: &mut [u8]) -> usize {
        let Some(output) = &mut self.outputs[part as usize] else {
            return 0;
        };
        let limit = output.left.unwrap_or(into.len()).min(into.len());
        let count = match nix::unistd::read(&output.fd, &mut into[..limit]) {
            Err(nix::Error::EINTR) => return 0,
            Err(nix::Error::EAGAIN) if output.left.is_none() => return 0,
            // Less than was counted: something else reads there, too. Or the end; a terminal that
            // nobody holds any more says EIO.
            Ok(0) | Err(_) => 0,
            Ok(count) => count,
        };
        let left = output.left.as_mut();
        if let Some(left) = left.filter(|_| count > 0) {
            *left -= count;
        }
        if count == 0 || output.left == Some(0) {
            self.drop_output(part as usize);
        }
        count
    }

    /// Both descriptors of a terminal go together: as long as one is open, a poll that knew the other
    /// would go on reporting it.
    fn drop_output(&mut self, number: usize) {
        self.outputs[number] = None;
        if self.is_terminal {
            self.input.close();
        }
    }

    /// The file that it was writing when something ended it, and of which there may be a draft.
    pub fn broken_off(&self) -> Option<&Path> {
        let is_killed = self.exit_status().is_some_and(|status| status > 128);
        self.writes.as_deref().filter(|_| is_killed)
    }

    /// Somebody else has it now, who has granted nothing and was granted nothing yet. What is on its screen is
    /// drawn anew, as when a window's size changes.
    pub fn attached(&mut self) {
        self.credit = INITIAL_CREDIT;
        self.input.attached();
        let front = self.fd(Part::Stdout).map(nix::unistd::tcgetpgrp);
        if let Some(Ok(group)) = front.filter(|_| self.end.is_none())
            && let Err(error) = killpg(group, Signal::SIGWINCH)
            && error != nix::Error::ESRCH
        {
            crate::console::say(&format!("a terminal is not drawn anew: {error}"));
        }
    }

    /// It ended with this status, after this much processor time in microseconds.
    pub fn ended(&mut self, status: i32, cpu_us: u64) {
        self.end = Some((status, cpu_us));
        self.settle_at = Some(Instant::now() + GRACE);
    }

    /// Its status, once it has one.
    pub fn exit_status(&self) -> Option<i32> {
        self.end.map(|(status, _)| status)
    }

    /// Its last frame, once everything before it has been read.
    pub fn exit(&self) -> Option<Exit> {
        let (exit_code, cpu_us) = self.end?;
        let is_read = self.outputs.iter().all(Option::is_none);
        is_read.then(|| Exit {
            exit_code,
            cpu_us,
            wall_us: u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX),
            ..Exit::default()
        })
    }

    /// When [`Self::on_time`] must be asked next.
    pub fn next_due(&self) -> Option<Instant> {
        [self.settle_at, self.kill_at].into_iter().flatten().min()
    }

    /// What the passing of time demands.
    pub fn on_time(&mut self, now: Instant) {
        if self.kill_at.is_some_and(|at| at <= now) {
            self.kill();
        }
        if self.settle_at.is_some_and(|at| at <= now) {
            self.settle_at = None;
            self.settle();
        }
    }

    /// From now on what it left behind may write for ever and hold up nothing.
    fn settle(&mut self) {
        for number in 0..self.outputs.len() {
            let Some(output) = &mut self.outputs[number] else {
                continue;
            };
            let waiting = device::waiting_bytes(output.fd.as_fd()).unwrap_or(0);
            output.left = Some(waiting);
            if waiting == 0 || self.is_unwanted {
                self.drop_output(number);
            }
        }
    }

    /// Interrupts its process group.
    pub fn interrupt(&self) {
        self.signal(Signal::SIGINT);
    }

    /// Ends it with everything in its group and, where it has a terminal, everything that was started
    /// from there. Output that nobody takes is not waited for.
    pub fn kill(&mut self) {
        self.kill_at = None;
        self.is_unwanted = true;
        if self.end.is_some() {
            self.settle();
            return;
        }
        if self.is_terminal {
            limits::kill_session(self.pid);
        }
        self.signal(Signal::SIGKILL);
    }

    /// Tells it that its terminal is gone, and sees to it that it goes, too.
    pub fn hang_up(&mut self) {
        self.signal(Signal::SIGHUP);
        // A stopped process hears nothing else.
        self.signal(Signal::SIGCONT);
        self.kill_at = Some(Instant::now() + HANGUP_WITHIN);
    }

    /// Hangs up, and lets go of its descriptors: whoever knew it is gone.
    pub fn abandon(&mut self) {
        self.hang_up();
        self.input.close();
        self.outputs = [None, None];
    }

    /// Signals its process group. A group that is gone is no error.
    fn signal(&self, signal: Signal) {
        // After its end the number may be somebody else's.
        if self.end.is_some() {
            return;
        }
        if let Err(error) = killpg(self.pid, signal)
            && error != nix::Error::ESRCH
        {
            crate::console::say(&format!("cannot signal {}: {error}", self.pid));
        }
    }

    /// Gives its terminal another size.
    pub fn resize(&self, size: Size) {
        let Some(terminal) = self.fd(Part::Stdout).filter(|_| self.is_terminal) else {
            return;
        };
        if let Err(error) = device::set_window_size(terminal, &start::winsize(size)) {
            crate::console::say(&format!("a terminal keeps its size: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::wait::{WaitStatus, waitpid};
    use thaw_wire::message::Program;

    use super::*;

    #[test]
    fn whoever_does_not_mind_a_hang_up_is_killed_all_the_same() {
        let order = Order {
            program: Program::Command {
                argv: ["sh", "-c", "trap '' HUP; echo deaf; sleep 600"]
                    .map(str::to_owned)
                    .into(),
            },
            env: BTreeMap::new(),
            cwd: None,
            terminal: None,
            name: None,
        };
        let place = Place {
            runner: "/".into(),
            scratch: "/".into(),
            home: "/".into(),
            cgroup: None,
            holds_doorbell: false,
            env: [("PATH".to_owned(), crate::PATH.to_owned())].into(),
        };
        let mut process = Process::start(&order, &place, &BTreeMap::new()).unwrap();
        let mut said = [0; 16];
        while process.read(Part::Stdout, &mut said) == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        process.abandon();
        assert!(process.fd(Part::Stdout).is_none() && process.fd(Part::Stdin).is_none());
        let due = process.next_due().unwrap();
        process.on_time(due - Duration::from_millis(1));
        assert_eq!(process.next_due(), Some(due));
        process.on_time(due);
        assert_eq!(process.next_due(), None);
        let ended = waitpid(process.pid, None).unwrap();
        let killed = WaitStatus::Signaled(process.pid, Signal::SIGKILL, false);
        assert_eq!(ended, killed);
    }
}
