//! The signal that brings a running guest back: something arrived at the socket, or a deadline passed.
//!
//! The handler stores two bytes, nothing else: a note for the main loop, and the vCPU's
//! immediate-exit flag, so that a signal that lands just before `KVM_RUN` is not lost.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{
    SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction,
};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;

use crate::kvm::InterruptHandle;

/// The running vCPU's immediate-exit flag; null while there is none.
static FLAG: AtomicPtr<u8> = AtomicPtr::new(null_mut());

/// Something happened since the main loop last looked.
static NEWS: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: libc::c_int) {
    NEWS.store(true, Ordering::Release);
    // SAFETY: the pointer is null or that of the process's only vCPU; `Alarm` withdraws it before the machine is dropped.
    unsafe { InterruptHandle::raise(FLAG.load(Ordering::Acquire)) };
}

/// Whether something happened since the last call. Ask before looking at the socket, never after.
pub fn take_news() -> bool {
    NEWS.swap(false, Ordering::AcqRel)
}

/// Makes the main loop look at the socket once more, whatever the signals say.
pub fn pretend_news() {
    NEWS.store(true, Ordering::Release);
}

/// The signals of one worker; there is one per process.
#[derive(Debug)]
pub struct Alarm {
    timer: Timer,
}

impl Alarm {
    /// Installs the handler, and makes the socket raise it whenever it becomes readable, or
    /// writable after having been full.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn install(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let action = SigAction::new(
            SigHandler::Handler(on_signal),
            SaFlags::empty(),
            SigSet::empty(),
        );
        for signal in [Signal::SIGIO, Signal::SIGALRM] {
            // SAFETY: the handler only stores to atomics.
            unsafe { sigaction(signal, &action) }?;
        }
        // SAFETY: F_SETOWN takes an integer and touches no memory.
        let owned = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETOWN, libc::getpid()) };
        Errno::result(owned)?;
        let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
        fcntl(
            socket,
            FcntlArg::F_SETFL(flags | OFlag::O_ASYNC | OFlag::O_NONBLOCK),
        )?;
        let event = SigEvent::new(SigevNotify::SigevSignal {
            signal: Signal::SIGALRM,
            si_value: 0,
        });
        let timer = Timer::new(ClockId::CLOCK_MONOTONIC, event)?;
        Ok(Self { timer })
    }

    /// From now on the signals interrupt this vCPU, which must outlive `self` or the next
    /// [`Self::unwatch`].
    pub fn watch(&self, vcpu: InterruptHandle) {
        FLAG.store(vcpu.into_raw(), Ordering::Release);
    }

    /// From now on the signals interrupt nobody.
    pub fn unwatch(&self) {
        FLAG.store(null_mut(), Ordering::Release);
    }

    /// Raises the signal after `delay`, instead of when it was to be raised before.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn ring_in(&mut self, delay: Duration) -> io::Result<()> {
        // Zero would disarm the timer.
        let delay = delay.max(Duration::from_nanos(1));
        self.timer.set(
            Expiration::OneShot(delay.into()),
            TimerSetTimeFlags::empty(),
        )?;
        Ok(())
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.unwatch();
    }
}
