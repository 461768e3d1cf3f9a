//! The worker: one process, one thread, one VM.
//!
//! The thread alternates between the guest and the socket to `serve`. While the guest is idle it
//! sleeps in `ppoll` on the socket; while the guest runs, the socket raises a signal whose handler
//! makes `KVM_RUN` return. So a command costs no switch between threads here.

mod console;
mod links;
mod log;
mod orders;
mod signals;
mod socket;
mod vm;

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::SigSet;
use nix::sys::time::TimeSpec;
use thaw_wire::frame::{CONTROL, Frame, Kind};

use crate::machine::Exit;
use crate::protocol::{Cause, Death, Report};
use signals::Alarm;
use socket::{Socket, SocketError};
use vm::Vm;

/// The descriptor that `serve` hands a worker.
const SOCKET: i32 = 3;

/// Environment variable by which `serve` tells when it started the process (nanoseconds of
/// `CLOCK_MONOTONIC`), so that [`Report::Running`] can count what came before `main`.
pub const SPAWNED: &str = "THAW_SPAWNED_NS";

/// How the process ends.
#[derive(Debug)]
enum End {
    /// `serve` wants it so, or is gone.
    Stopped,
    /// The VM is no more.
    Died(Cause, String),
}

impl From<SocketError> for End {
    fn from(error: SocketError) -> Self {
        match error {
            SocketError::Closed => Self::Stopped,
            other => Self::Died(Cause::Worker, other.to_string()),
        }
    }
}

impl From<crate::wire::GuestFault> for End {
    fn from(fault: crate::wire::GuestFault) -> Self {
        Self::Died(Cause::GuestFault, fault.to_string())
    }
}

impl From<std::io::Error> for End {
    fn from(error: std::io::Error) -> Self {
        Self::Died(Cause::Worker, error.to_string())
    }
}

/// Runs a worker on descriptor 3 until `serve` ends it or the VM dies.
#[must_use]
pub fn main() -> ExitCode {
    let started = orders::process_start();
    // SAFETY: `serve` starts this process with the socket as descriptor 3, and nothing here has touched that number yet.
    let socket = unsafe { OwnedFd::from_raw_fd(SOCKET) };
    if let Err(errno) = nix::sys::stat::fstat(&socket) {
        log::line(&format!(
            "descriptor {SOCKET} is not the socket of `thaw serve` ({errno}); this command is not for people"
        ));
        std::mem::forget(socket);
        return ExitCode::FAILURE;
    }
    let mut worker = match Worker::new(socket, started) {
        Ok(worker) => worker,
        Err(error) => {
            log::line(&format!("cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let code = match worker.work() {
        End::Stopped => ExitCode::SUCCESS,
        End::Died(cause, detail) => {
            worker.report_death(cause, detail);
            ExitCode::FAILURE
        }
    };
    // Taking a VM apart by hand costs milliseconds; the kernel does the same to a process that is gone.
    worker.alarm.unwatch();
    std::mem::forget(worker);
    code
}

#[derive(Debug)]
struct Worker {
    socket: Socket,
    alarm: Alarm,
    /// When the alarm rings.
    armed: Option<Instant>,
    vm: Option<Vm>,
    /// The socket may hold bytes that were not read.
    unread: bool,
    started: Instant,
}

impl Worker {
    fn new(socket: OwnedFd, started: Instant) -> std::io::Result<Self> {
        let socket = Socket::new(socket);
        let alarm = Alarm::install(socket.fd())?;
        Ok(Self {
            socket,
            alarm,
            armed: None,
            vm: None,
            unread: true,
            started,
        })
    }

    fn work(&mut self) -> End {
        loop {
            if let Err(end) = self.turn() {
                return end;
            }
        }
    }

    /// One look at everything, then the guest or sleep.
    fn turn(&mut self) -> Result<(), End> {
        // The note is taken before the socket is read: what comes later raises it again.
        self.unread |= signals::take_news();
        self.listen()?;
        if let Some(vm) = &mut self.vm {
            vm.pump(&mut self.socket)?;
        }
        self.socket.flush()?;
        // Room in the queue to the guest may have let more be read.
        if self.unread && self.vm.as_ref().is_none_or(Vm::takes_more) {
            return Ok(());
        }
        let now = Instant::now();
        if let Some(vm) = &mut self.vm {
            vm.enforce_deadlines(now)?;
        }
        self.save_if_asked()?;
        // An idle guest may not come back for long, so nothing that was said may wait behind it.
        self.socket.flush()?;
        match &mut self.vm {
            Some(vm) if vm.is_runnable(now) => self.run(now),
            _ => self.sleep(now),
        }
    }

    /// Reads what `serve` sent, as far as there is room for it.
    fn listen(&mut self) -> Result<(), End> {
        loop {
            while self.vm.as_ref().is_none_or(Vm::takes_more) {
                match self.socket.next_frame()? {
                    Some(frame) => self.on_frame(frame)?,
                    None => break,
                }
            }
            if !self.unread || !self.vm.as_ref().is_none_or(Vm::takes_more) {
                return Ok(());
            }
            self.unread = self.socket.fill()?;
        }
    }

    fn on_frame(&mut self, frame: Frame) -> Result<(), End> {
        if frame.stream != CONTROL {
            let Some(vm) = &mut self.vm else {
                return Err(misuse("a stream before there is a VM"));
            };
            return vm.accept(frame).map_err(|error| misuse(&error.to_string()));
        }
        if frame.kind != Kind::Order {
            return Err(misuse("the control stream takes orders alone"));
        }
        let order = serde_json::from_slice(&frame.payload)
            .map_err(|error| misuse(&format!("an order that is none: {error}")))?;
        self.on_order(order)
    }

    fn run(&mut self, now: Instant) -> Result<(), End> {
        let Some(vm) = &mut self.vm else {
            return Ok(());
        };
        if let Some(at) = vm.next_alarm(now)
            && self.armed.is_none_or(|armed| at < armed || armed <= now)
        {
            self.alarm.ring_in(at.saturating_duration_since(now))?;
            self.armed = Some(at);
        }
        match vm.run() {
            Ok(Exit::Doorbell(word)) => vm.rung(word)?,
            Ok(Exit::Idle { deadline }) => vm.idle(deadline),
            Ok(Exit::Interrupted) => {}
            Ok(Exit::Shutdown) => {
                return Err(End::Died(Cause::Shutdown, "the guest powered off".into()));
            }
            Ok(Exit::Crashed(why)) => {
                let cause = if why.contains("panic") {
                    Cause::Panic
                } else {
                    Cause::GuestFault
                };
                return Err(End::Died(cause, why));
            }
            Err(error) => return Err(End::Died(Cause::Worker, format!("{error:#}"))),
        }
        Ok(())
    }

    /// Waits for the socket or for the next thing that is due.
    fn sleep(&mut self, now: Instant) -> Result<(), End> {
        let mut wanted = PollFlags::empty();
        if self.vm.as_ref().is_none_or(Vm::takes_more) {
            wanted |= PollFlags::POLLIN;
        }
        if self.socket.is_clogged() {
            wanted |= PollFlags::POLLOUT;
        }
        let until = self.vm.as_ref().and_then(|vm| vm.next_event(now));
        let timeout = until.map(|at| TimeSpec::from(at.saturating_duration_since(now)));
        let mut fds = [PollFd::new(self.socket.fd(), wanted)];
        let seen = match nix::poll::ppoll(&mut fds, timeout, Some(SigSet::empty())) {
            Ok(0) | Err(Errno::EINTR) => return Ok(()),
            Ok(_) => fds[0].revents().unwrap_or(PollFlags::empty()),
            Err(errno) => return Err(End::Died(Cause::Worker, format!("ppoll: {errno}"))),
        };
        self.unread |= seen.contains(PollFlags::POLLIN);
        if seen.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL)
            && !seen.contains(PollFlags::POLLIN)
        {
            return Err(End::Stopped);
        }
        Ok(())
    }

    fn say(&mut self, report: &Report) -> Result<(), End> {
        links::say(&mut self.socket, report)
    }

    /// Tells `serve` what happened, but does not wait for it for long.
    fn report_death(&mut self, cause: Cause, detail: String) {
        if let Some(vm) = &mut self.vm {
            vm.log_console();
        }
        log::line(&format!("the VM is gone ({cause:?}): {detail}"));
        let console = self.vm.as_ref().map_or_else(String::new, Vm::console_tail);
        let death = Death {
            cause,
            detail,
            console,
        };
        if let Err(error) = links::last_words(&mut self.socket, &Report::Died(death)) {
            log::line(&format!("and nobody could be told: {error}"));
        }
    }
}

fn misuse(why: &str) -> End {
    End::Died(Cause::Worker, format!("`thaw serve` sent {why}"))
}
