//! A VM's share of the processor.
//!
//! Where a VM has fewer vCPUs than were asked for (one, on the `pv` machine unless the operator allows more),
//! `vcpu_count` is what their threads weigh when the host's cores are wanted by more threads than there are cores: twice
//! the vCPUs, twice the time. The scheduler's weights do that, by way of the nice value: each step is a factor
//! of 1.25. It works on every kernel and inside containers, where control groups are usually read-only.
//!
//! To weigh more than others takes CAP_SYS_NICE. Without it the scale is the same but ends at the
//! server's own weight instead of beginning there. A server that is root without that capability, as in
//! many containers, may not even do that: its workers run as another user.

use std::sync::{Once, OnceLock};

use rustix::io::Errno;
use rustix::process::{Pid, getpriority_process, setpriority_process};

/// Steps of nice by which a thread weighs this many times as much as one vCPU's.
fn steps(vcpus: u32) -> i32 {
    match vcpus {
        0 | 1 => 0,
        2 | 3 => 3,
        4 | 5 => 6,
        6 | 7 => 8,
        _ => 9,
    }
}

/// Where the scale lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    /// One vCPU weighs what the server does, more weigh more.
    Up(i32),
    /// Eight vCPUs weigh what the server does, fewer weigh less.
    Down(i32),
}

impl Scale {
    /// Finds out what this process may do.
    fn probe() -> Self {
        let base = getpriority_process(None).unwrap_or(0);
        // Of this thread only, and taken back at once.
        let raised = setpriority_process(None, base - 1);
        let restored = setpriority_process(None, base);
        match raised.and(restored) {
            Ok(()) => Self::Up(base),
            Err(error) => {
                tracing::info!(
                    %error,
                    "this process may not raise priorities (CAP_SYS_NICE): VMs of fewer than 8 vCPUs run at lower ones"
                );
                Self::Down(base)
            }
        }
    }

    fn nice(self, vcpus: u32) -> i32 {
        let nice = match self {
            Self::Up(base) => base - steps(vcpus),
            Self::Down(base) => base + steps(8) - steps(vcpus),
        };
        nice.clamp(-20, 19)
    }
}

/// Gives a worker's threads, one for each vCPU, their weight. A worker that is gone needs none.
pub(super) fn give(pid: u32, vcpus: u32) {
    static SCALE: OnceLock<Scale> = OnceLock::new();
    let scale = *SCALE.get_or_init(Scale::probe);
    if scale == Scale::Up(0) && steps(vcpus) == 0 {
        return;
    }
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return;
    };
    let nice = scale.nice(vcpus);
    for thread in threads.flatten() {
        let id = thread.file_name().to_str().and_then(|id| id.parse().ok());
        let Some(id) = id.and_then(Pid::from_raw) else {
            continue;
        };
        match setpriority_process(Some(id), nice) {
            Ok(()) | Err(Errno::SRCH) => continue,
            Err(error) => tell(error),
        }
        return;
    }
}

/// Once: it is the same for all workers.
fn tell(error: Errno) {
    static TOLD: Once = Once::new();
    TOLD.call_once(|| {
        tracing::warn!(
            %error,
            "vcpu_count has no effect: workers run as another user, whose priority this process may not set; \
             give it CAP_SYS_NICE"
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_follow_the_vcpus() {
        // The kernel's weights: 1.25 to the power of the difference.
        for vcpus in [1, 2, 4, 6, 8] {
            let weight = 1.25_f64.powi(steps(vcpus));
            let off = weight / f64::from(vcpus);
            assert!((0.9..1.1).contains(&off), "{vcpus}: {weight}");
        }
        let both = [Scale::Up(0), Scale::Down(0)].map(|scale| [1, 8].map(|n| scale.nice(n)));
        assert_eq!(both, [[0, -9], [9, 0]]);
    }
}
