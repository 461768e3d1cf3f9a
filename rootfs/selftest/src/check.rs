//! What a check is, and how one is run so that nothing it does reaches the others.
//!
//! Every check runs in a forked child that leads its own process group. A crash is that check's
//! failure; a hang is ended by its time limit, together with everything it started.

use std::io::{Error, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// What a check found: nothing to say, or why it failed.
pub type Outcome = Result<(), String>;

/// One named check.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// What `selftest NAME` calls it.
    pub name: &'static str,
    /// Seconds after which it counts as hung.
    pub limit: u64,
    /// The check itself; runs in a child process.
    pub run: fn() -> Outcome,
}

/// Fails the check with a formatted reason unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err(format!($($why)+));
        }
    };
}

/// How a child process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this status.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
}

/// Longest reason that is passed on from a check.
const MAX_REASON: usize = 4096;

/// Turns the C library's -1 into a reason that names the call and errno.
pub fn sys<T: Copy + Into<i64>>(what: &str, returned: T) -> Result<T, String> {
    if returned.into() == -1 {
        return Err(format!("{what}: {}", Error::last_os_error()));
    }
    Ok(returned)
}

/// The last call's errno.
pub fn errno() -> i32 {
    Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A pipe: its reading and its writing end.
pub fn pipe() -> Result<(OwnedFd, OwnedFd), String> {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for the two descriptors.
    sys("pipe2", unsafe {
        libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC)
    })?;
    // SAFETY: both descriptors are new and nobody else's.
    unsafe { Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))) }
}

/// Forks; the child runs `body` and exits with what it returns, without running destructors.
pub fn fork(body: impl FnOnce() -> i32) -> Result<i32, String> {
    // SAFETY: callers are single-threaded, so the child finds no lock held.
    let pid = sys("fork", unsafe { libc::fork() })?;
    if pid == 0 {
        let status = body();
        // SAFETY: ends this child at once; its parent's buffers are not flushed twice.
        unsafe { libc::_exit(status) }
    }
    Ok(pid)
}

/// Waits for a child to end.
pub fn wait(pid: i32) -> Result<Ended, String> {
    loop {
        let status = wait_any(pid, 0)?;
        if libc::WIFEXITED(status) {
            return Ok(Ended::Exited(libc::WEXITSTATUS(status)));
        }
        if libc::WIFSIGNALED(status) {
            return Ok(Ended::Killed(libc::WTERMSIG(status)));
        }
    }
}

/// One `waitpid`, repeated when a signal interrupts it; the raw status.
pub fn wait_any(pid: i32, flags: i32) -> Result<i32, String> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result.
        let found = unsafe { libc::waitpid(pid, &raw mut status, flags) };
        if found != -1 {
            return Ok(status);
        }
        if errno() != libc::EINTR {
            return Err(format!("waitpid: {}", Error::last_os_error()));
        }
    }
}

/// Runs `body` in a child and tells how it ended.
pub fn in_child(body: impl FnOnce() -> i32) -> Result<Ended, String> {
    wait(fork(body)?)
}

/// A child's exit status for an outcome; the reason goes to stderr, where the console keeps it.
pub fn status_of(outcome: Outcome) -> i32 {
    match outcome {
        Ok(()) => 0,
        Err(why) => {
            eprintln!("child: {why}");
            1
        }
    }
}

/// A process-wide signal handler with these `SA_` flags.
pub fn handle(signal: i32, flags: i32, handler: usize) -> Outcome {
    // SAFETY: an all-zero sigaction is a valid empty one.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is complete; handlers passed here only touch atomics and their context.
    sys("sigaction", unsafe {
        libc::sigaction(signal, &raw const action, std::ptr::null_mut())
    })?;
    Ok(())
}

/// A bound, on a host that is as many times slower as `THAW_SLOW` says: an emulated one.
pub fn patience(bound: Duration) -> Duration {
    let slow = std::env::var("THAW_SLOW").ok();
    bound
        * slow
            .and_then(|times| times.parse().ok())
            .unwrap_or(1)
            .max(1)
}

/// Runs a check in a child of its own and returns why it failed, if it did.
pub fn run(check: &Check) -> Outcome {
    let (reader, writer) = pipe()?;
    let pid = fork(|| {
        // SAFETY: makes this child the leader of its own group, so a time-out ends all of it.
        unsafe { libc::setpgid(0, 0) };
        match (check.run)() {
            Ok(()) => 0,
            Err(why) => {
                // SAFETY: writes a valid buffer; if nobody reads it the reason is lost, no more.
                unsafe {
                    libc::write(
                        writer.as_raw_fd(),
                        why.as_ptr().cast(),
                        why.len().min(MAX_REASON),
                    )
                };
                1
            }
        }
    })?;
    drop(writer);
    let limit = patience(Duration::from_secs(check.limit));
    let ended = wait_until(pid, Instant::now() + limit)?;
    // SAFETY: ends what the check left behind in its group; an empty group is no error to us.
    unsafe { libc::kill(-pid, libc::SIGKILL) };
    match ended {
        None => Err(format!("still running after {limit:?}")),
        Some(Ended::Exited(0)) => Ok(()),
        Some(Ended::Killed(signal)) => Err(format!("killed by signal {signal}")),
        Some(Ended::Exited(_)) => {
            let mut why = Vec::new();
            std::fs::File::from(reader)
                .take(MAX_REASON as u64)
                .read_to_end(&mut why)
                .map_err(|error| format!("failed, and its reason is unreadable: {error}"))?;
            Err(String::from_utf8_lossy(&why).into_owned())
        }
    }
}

/// Waits for `pid` until `deadline`, then kills its group: `None` means it had to be killed.
pub fn wait_until(pid: i32, deadline: Instant) -> Result<Option<Ended>, String> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result.
        let found = sys("waitpid", unsafe {
            libc::waitpid(pid, &raw mut status, libc::WNOHANG)
        })?;
        if found == pid && libc::WIFEXITED(status) {
            return Ok(Some(Ended::Exited(libc::WEXITSTATUS(status))));
        }
        if found == pid {
            return Ok(Some(Ended::Killed(libc::WTERMSIG(status))));
        }
        if Instant::now() > deadline {
            // SAFETY: `pid` is our unreaped child, so neither number can be somebody else's.
            unsafe {
                libc::kill(-pid, libc::SIGKILL);
                libc::kill(pid, libc::SIGKILL);
            }
            wait(pid)?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
