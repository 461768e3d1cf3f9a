//! The system calls that a running worker may make. Any other fails with `EPERM`.

use std::collections::BTreeMap;

use libc::{
    SYS_brk, SYS_clock_gettime, SYS_clock_nanosleep, SYS_close, SYS_exit, SYS_exit_group,
    SYS_fcntl, SYS_fdatasync, SYS_fstat, SYS_fsync, SYS_ftruncate, SYS_futex, SYS_getpid,
    SYS_getrandom, SYS_gettid, SYS_ioctl, SYS_lseek, SYS_madvise, SYS_mmap, SYS_mprotect,
    SYS_mremap, SYS_munmap, SYS_nanosleep, SYS_poll, SYS_ppoll, SYS_pread64, SYS_pwrite64,
    SYS_read, SYS_recvmsg, SYS_restart_syscall, SYS_rt_sigaction, SYS_rt_sigprocmask,
    SYS_rt_sigreturn, SYS_sched_yield, SYS_sendto, SYS_shutdown, SYS_sigaltstack, SYS_statx,
    SYS_tgkill, SYS_timer_delete, SYS_timer_gettime, SYS_timer_settime, SYS_write,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::kvm::kick;

/// Calls that are allowed with any arguments: they act on what is open already, or on this process alone.
const PLAIN: [i64; 38] = [
    SYS_brk,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_close,
    SYS_exit,
    SYS_exit_group,
    SYS_fdatasync,
    SYS_fstat,
    SYS_fsync,
    SYS_ftruncate,
    SYS_futex,
    SYS_getpid,
    SYS_getrandom,
    SYS_gettid,
    SYS_lseek,
    SYS_madvise,
    SYS_mremap,
    SYS_munmap,
    SYS_nanosleep,
    SYS_poll,
    SYS_ppoll,
    SYS_pread64,
    SYS_pwrite64,
    SYS_read,
    SYS_recvmsg,
    SYS_restart_syscall,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_yield,
    SYS_sendto,
    SYS_shutdown,
    SYS_sigaltstack,
    SYS_statx,
    SYS_timer_delete,
    SYS_timer_gettime,
    SYS_timer_settime,
    SYS_write,
];

/// The ioctl type of KVM (`KVMIO` in `linux/kvm.h`), in bits 8 to 15 of a request.
const KVM_TYPE: u64 = 0xae00;
const TYPE_MASK: u64 = 0xff00;

/// Forbids every other call, for all threads of this process, for good.
pub(super) fn install() -> anyhow::Result<()> {
    seccompiler::apply_filter_all_threads(&program()?)?;
    Ok(())
}

fn program() -> anyhow::Result<BpfProgram> {
    let argument = |index, operation, value| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, operation, value)
    };
    let only = |condition| SeccompRule::new(vec![condition]);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        PLAIN.into_iter().map(|call| (call, Vec::new())).collect();
    let kvm = argument(1, SeccompCmpOp::MaskedEq(TYPE_MASK), KVM_TYPE)?;
    rules.insert(SYS_ioctl, vec![only(kvm)?]);
    // Memory may grow, but never become executable.
    let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
    for call in [SYS_mmap, SYS_mprotect] {
        let data = argument(2, SeccompCmpOp::MaskedEq(executable), 0)?;
        rules.insert(call, vec![only(data)?]);
    }
    // No F_SETOWN: it would aim signals at other processes.
    let flags = [
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_GETFD,
        libc::F_DUPFD_CLOEXEC,
    ]
    .into_iter()
    .map(|command| {
        only(argument(
            1,
            SeccompCmpOp::Eq,
            u64::from(command.unsigned_abs()),
        )?)
    })
    .collect::<Result<_, _>>()?;
    rules.insert(SYS_fcntl, flags);
    // The one signal that brings a vCPU's thread back, to threads of this process.
    let own_kick = SeccompRule::new(vec![
        argument(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?,
        argument(2, SeccompCmpOp::Eq, u64::from(kick::SIGNAL.unsigned_abs()))?,
    ])?;
    rules.insert(SYS_tgkill, vec![own_kick]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_can_be_opened_connected_or_run_any_more() {
        // The test's own thread is the filter's victim, not the other tests'.
        let install = || seccompiler::apply_filter(&program().unwrap());
        let denied = |error: std::io::Error| error.raw_os_error() == Some(libc::EPERM);
        std::thread::spawn(move || {
            install().unwrap();
            // SAFETY: signals and process ids are numbers.
            let stop =
                unsafe { libc::syscall(SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGSTOP) };
            assert!(stop == -1 && denied(std::io::Error::last_os_error()));
            assert!(denied(std::fs::File::open("/dev/null").unwrap_err()));
            assert!(denied(
                std::net::TcpListener::bind("127.0.0.1:0").unwrap_err()
            ));
            assert!(denied(
                std::os::unix::net::UnixDatagram::unbound().unwrap_err()
            ));
            let kill = nix::sys::signal::kill(nix::unistd::getpid(), None);
            assert_eq!(kill, Err(nix::errno::Errno::EPERM));
            let big = vec![1_u8; 8 << 20];
            assert_eq!(
                big.iter().map(|&byte| u64::from(byte)).sum::<u64>(),
                8 << 20
            );
        })
        .join()
        .unwrap();
    }
}
