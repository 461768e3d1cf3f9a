//! What bounds the number of VMs: memory, open files, processes.

use std::io::Read;

use anyhow::Context;
use nix::sys::resource::{Resource, getrlimit};

use super::Finding;

/// Open files that a full server needs: five for each VM and one for each connection.
const GOOD_NOFILE: u64 = 4096;
/// Memory below which the defaults do not fit, MiB.
const GOOD_MEMORY_MIB: u64 = 2048;
/// Processes that a full server needs: one for each VM, the pool's and those being ended on top, and room for what
/// else the host runs.
const GOOD_PROCESSES: u64 = 1024;

pub(super) fn memory() -> anyhow::Result<Finding> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let available = meminfo_mib(&text, "MemAvailable:").unwrap_or(0);
    let total = meminfo_mib(&text, "MemTotal:").unwrap_or(0);
    let limit = cgroup_limit_mib();
    let room = limit.map_or(available, |limit| limit.min(available));
    let mut found = format!("{available} MiB available of {total} MiB");
    if let Some(limit) = limit {
        found = format!("{found}, limited to {limit} MiB by the control group");
    }
    Ok(if room < GOOD_MEMORY_MIB {
        Finding::warn(
            "memory",
            found,
            format!(
                "with less than {GOOD_MEMORY_MIB} MiB, set smaller session.pool and vm.memory_mib values"
            ),
        )
    } else {
        Finding::ok("memory", found)
    })
}

fn meminfo_mib(text: &str, label: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(label))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024)
}

fn cgroup_limit_mib() -> Option<u64> {
    let mut text = String::new();
    std::fs::File::open("/sys/fs/cgroup/memory.max")
        .ok()?
        .take(64)
        .read_to_string(&mut text)
        .ok()?;
    text.trim().parse::<u64>().ok().map(|bytes| bytes >> 20)
}

pub(super) fn open_files() -> anyhow::Result<Finding> {
    let (soft, hard) =
        getrlimit(Resource::RLIMIT_NOFILE).context("cannot ask for the limit of open files")?;
    let found = format!("{soft} (hard limit {hard})");
    Ok(if soft < GOOD_NOFILE {
        Finding::warn(
            "open files",
            found,
            format!("raise it for many VMs: `ulimit -n {}`", hard.min(65536)),
        )
    } else {
        Finding::ok("open files", found)
    })
}

pub(super) fn processes() -> anyhow::Result<Finding> {
    let (user, _) =
        getrlimit(Resource::RLIMIT_NPROC).context("cannot ask for the limit of processes")?;
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .ok()
            .as_deref()
            .and_then(count)
    };
    Ok(judge_processes(&[
        (
            "RLIMIT_NPROC",
            Some(user),
            "raise it: `ulimit -u`, or LimitNPROC= of the service",
        ),
        (
            "the control group's pids.max",
            read("/sys/fs/cgroup/pids.max"),
            "raise it: TasksMax= of the service, --pids-limit of the container",
        ),
        (
            "kernel.threads-max",
            read("/proc/sys/kernel/threads-max"),
            "raise it: `sysctl kernel.threads-max`",
        ),
        (
            "kernel.pid_max",
            read("/proc/sys/kernel/pid_max"),
            "raise it: `sysctl kernel.pid_max`",
        ),
    ]))
}

/// A number in a file of the kernel's; `max` is none.
fn count(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// Names the narrowest of some limits: each with what raises it.
fn judge_processes(limits: &[(&str, Option<u64>, &str)]) -> Finding {
    const WHAT: &str = "processes";
    let narrowest = limits
        .iter()
        .filter_map(|(name, limit, fix)| {
            Some((limit.filter(|limit| *limit < u64::MAX)?, name, fix))
        })
        .min();
    match narrowest {
        None => Finding::ok(WHAT, "no limit"),
        Some((most, name, _)) if most >= GOOD_PROCESSES => {
            Finding::ok(WHAT, format!("at most {most}, by {name}"))
        }
        Some((most, name, fix)) => Finding::warn(
            WHAT,
            format!("at most {most}, by {name}; each VM is one"),
            *fix,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn the_hosts_figures_are_read() {
        assert_eq!(
            meminfo_mib(
                "MemTotal:  4096 kB\nMemAvailable: 2048 kB\n",
                "MemAvailable:"
            ),
            Some(2)
        );
        memory().unwrap();
        open_files().unwrap();
        processes().unwrap();
    }

    #[test]
    fn the_narrowest_limit_on_processes_is_named_with_what_raises_it() {
        let finding = judge_processes(&[
            ("wide", Some(30_000), "a"),
            ("narrow", count("100\n"), "widen it"),
            ("none", count("max\n"), "c"),
        ]);
        assert_eq!(finding.level, Level::Warn);
        assert!(finding.found.contains("100, by narrow"), "{finding:?}");
        assert_eq!(finding.fix.as_deref(), Some("widen it"));
        let fine = judge_processes(&[("wide", Some(30_000), "a"), ("none", None, "b")]);
        assert_eq!(fine.level, Level::Ok);
        assert_eq!(judge_processes(&[("x", None, "")]).found, "no limit");
    }
}
