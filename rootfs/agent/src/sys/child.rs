//! Starting child processes with exactly the descriptors they should have.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::unistd::Pid;

/// What a child is given beside its command line.
#[derive(Debug)]
pub struct Setup {
    /// Descriptors and the numbers that the child sees them under.
    pub descriptors: Vec<(OwnedFd, RawFd)>,
    /// An open `cgroup.procs` to enter.
    pub cgroup: Option<OwnedFd>,
    /// Whether the doorbell port's permission must be dropped.
    pub drop_doorbell: bool,
    /// Whether its standard input is a terminal, which becomes its session's.
    pub takes_terminal: bool,
}

/// A child that ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Who it was.
    pub pid: Pid,
    /// Its own status, or 128 and the number of the signal that ended it.
    pub status: i32,
    /// Processor time of it and the children it waited for, microseconds.
    pub cpu_us: u64,
}

/// Takes leave of a child that ended, if one has.
pub fn reap() -> Option<Ended> {
    let mut status = 0;
    // SAFETY: rusage is plain numbers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: wait4 writes one int and one rusage to the pointers, which outlive the call.
    let pid = unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage) };
    let us = |time: libc::timeval| {
        u64::try_from(time.tv_sec * 1_000_000 + time.tv_usec).unwrap_or_default()
    };
    (pid > 0).then(|| Ended {
        pid: Pid::from_raw(pid),
        status: if libc::WIFSIGNALED(status) {
            128 + libc::WTERMSIG(status)
        } else {
            libc::WEXITSTATUS(status)
        },
        cpu_us: us(usage.ru_utime) + us(usage.ru_stime),
    })
}

/// Starts `command` as the leader of its own session and process group.
///
/// # Errors
/// The system's refusal.
pub fn spawn(mut command: Command, setup: Setup) -> io::Result<Child> {
    let moves: Vec<(RawFd, RawFd)> = setup
        .descriptors
        .iter()
        .map(|(from, to)| (from.as_raw_fd(), *to))
        .collect();
    let cgroup = setup.cgroup.as_ref().map(AsRawFd::as_raw_fd);
    let drop_doorbell = setup.drop_doorbell;
    let takes_terminal = setup.takes_terminal;
    let prepare = move || {
        // SAFETY: between fork and exec in a single-threaded process; every call below is
        // async-signal-safe, allocates nothing, and works on descriptors that `setup`, alive in
        // the parent until after the exec, keeps open.
        unsafe {
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            // After setsid: only a session leader without a terminal can take one.
            if takes_terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            for signal in [
                libc::SIGINT,
                libc::SIGPIPE,
                libc::SIGTERM,
                libc::SIGQUIT,
                libc::SIGHUP,
            ] {
                libc::signal(signal, libc::SIG_DFL);
            }
            if let Some(cgroup) = cgroup
                && libc::write(cgroup, b"0".as_ptr().cast(), 1) < 0
            {
                return Err(io::Error::last_os_error());
            }
            if drop_doorbell {
                libc::ioperm(thaw_wire::layout::DOORBELL_PORT.into(), 4, 0);
            }
            for &(from, to) in &moves {
                if libc::dup2(from, to) < 0 {
                    return Err(io::Error::last_os_error());
                }
                // dup2 onto itself would leave close-on-exec set.
                if from == to && libc::fcntl(to, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            // PID 1 of a cgroup that may be out of memory is spared; its children are not.
            let zero = libc::open(
                c"/proc/self/oom_score_adj".as_ptr(),
                libc::O_WRONLY | libc::O_CLOEXEC,
            );
            if zero >= 0 {
                libc::write(zero, b"0".as_ptr().cast(), 1);
                libc::close(zero);
            }
        }
        Ok(())
    };
    // SAFETY: see the block inside `prepare`.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn();
    drop(setup);
    child
}
