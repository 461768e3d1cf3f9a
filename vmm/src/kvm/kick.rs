//! Bringing a running guest back: one signal, whoever wants it.
//!
//! A thread that runs a guest names its vCPU with [`attach`]. From then on [`SIGNAL`], sent to
//! that thread by anything (a [`KickTimer`], a socket with `F_SETSIG` and `F_SETOWN_EX`), makes
//! `KVM_RUN` return. The flag is per thread, so that several VMs may live in one process.

use std::cell::Cell;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::Once;

use super::{InterruptHandle, KvmError};

/// The signal. Its handler interrupts system calls (`SA_RESTART` is not set), so a `poll` ends too.
pub const SIGNAL: i32 = libc::SIGUSR1;

thread_local! {
    /// Flag of the vCPU that this thread runs; null if none. Constant-initialized and without a destructor, so a handler may read it.
    static FLAG: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

extern "C" fn on_signal(_signal: i32) {
    // SAFETY: `attach` and `detach` keep the flag null or alive.
    unsafe { InterruptHandle::raise(FLAG.get()) };
}

/// Makes [`SIGNAL`] interrupt this vCPU when this thread runs it, and installs the handler.
pub fn attach(handle: InterruptHandle) {
    FLAG.set(handle.into_raw());
    install();
}

/// Installs the handler. Until somebody has done that the signal ends the process.
pub fn install() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // SAFETY: an all-zero sigaction is valid (empty mask, no flags).
        let mut action: libc::sigaction = unsafe { zeroed() };
        action.sa_sigaction = on_signal as *const () as usize;
        // SAFETY: the handler only stores one byte through a pointer that is valid or null.
        unsafe { libc::sigaction(SIGNAL, &raw const action, null_mut()) };
    });
}

/// Ends [`attach`] if it was for this vCPU.
pub fn detach(handle: InterruptHandle) {
    if FLAG.get() == handle.into_raw() {
        FLAG.set(null_mut());
    }
}

/// A timer that sends [`SIGNAL`] to the thread that made it.
#[derive(Debug)]
pub struct KickTimer(libc::timer_t);

// SAFETY: a timer id is a number that the kernel accepts from any thread.
unsafe impl Send for KickTimer {}

impl KickTimer {
    /// Makes one, disarmed.
    ///
    /// # Errors
    /// The kernel has no timer left for this user.
    pub fn new() -> Result<Self, KvmError> {
        // SAFETY: an all-zero sigevent is valid; the fields that matter are set below.
        let mut event: libc::sigevent = unsafe { zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGNAL;
        // SAFETY: no arguments, no memory.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer = null_mut();
        // SAFETY: both pointers are to live locals.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } != 0
        {
            return Err(KvmError::Ioctl {
                what: "timer_create",
                source: std::io::Error::last_os_error(),
            });
        }
        Ok(Self(timer))
    }

    /// Fires once, this many nanoseconds from now (at least one); replaces any earlier setting.
    pub fn arm(&self, nanoseconds: u64) {
        self.set(nanoseconds.max(1));
    }

    /// Fires no more.
    pub fn disarm(&self) {
        self.set(0);
    }

    fn set(&self, nanoseconds: u64) {
        // A century: the kernel takes no more seconds than fit an i64 of nanoseconds.
        let seconds = i64::try_from(nanoseconds / 1_000_000_000)
            .unwrap_or(0)
            .min(3_000_000_000);
        let rest = i64::try_from(nanoseconds % 1_000_000_000).unwrap_or(0);
        let zero = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let setting = libc::itimerspec {
            it_interval: zero,
            it_value: libc::timespec {
                tv_sec: seconds,
                tv_nsec: rest,
            },
        };
        // SAFETY: a timer of ours and a live, valid setting; the call cannot fail then.
        unsafe { libc::timer_settime(self.0, 0, &raw const setting, null_mut()) };
    }
}

impl Drop for KickTimer {
    fn drop(&mut self) {
        // SAFETY: a timer of ours, deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}
