//! What commands may use, so that one that takes everything harms only itself.
//!
//! The agent stays outside of the control group that all commands share: when memory or
//! processes run out, they run out in there.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Memory kept for the kernel and the agent: what both need with room to kill a runaway command.
const RESERVE_BYTES: u64 = 16 << 20;

/// Most processes of a session; enough for parallel builds.
const MAX_PROCESSES: u64 = 4096;

/// What a small process costs (stacks, page tables, what a fork soon copies): that many fit.
const BYTES_PER_PROCESS: u64 = 1 << 20;

/// The commands' control group.
#[derive(Debug)]
pub struct Limits {
    group: PathBuf,
    max_processes: u64,
    /// Kept open: they are read around commands, where every system call counts.
    processes: Option<File>,
    processor: Option<File>,
}

impl Limits {
    /// Makes the group under a mounted cgroup2, for that many bytes of memory. A kernel without a controller goes without it.
    ///
    /// # Errors
    /// No control groups at all.
    pub fn set_up(root: &Path, memory_available: u64) -> io::Result<Self> {
        for controller in ["+memory", "+pids"] {
            if let Err(error) = fs::write(root.join("cgroup.subtree_control"), controller) {
                crate::console::say(&format!("no {controller} controller: {error}"));
            }
        }
        let group = root.join("cmd");
        fs::create_dir_all(&group)?;
        let max_processes = (memory_available / BYTES_PER_PROCESS).clamp(64, MAX_PROCESSES);
        let memory = memory_available
            .saturating_sub(RESERVE_BYTES)
            .max(memory_available / 2);
        for (file, value) in [("pids.max", max_processes), ("memory.max", memory)] {
            if let Err(error) = fs::write(group.join(file), value.to_string()) {
                crate::console::say(&format!("cannot set {file}: {error}"));
            }
        }
        Ok(Self {
            processes: File::open(group.join("pids.current")).ok(),
            processor: File::open(group.join("cpu.stat")).ok(),
            group,
            max_processes,
        })
    }

    /// The file by which a process enters.
    pub fn entrance(&self) -> PathBuf {
        self.group.join("cgroup.procs")
    }

    /// How often memory ran out in the group so far.
    pub fn memory_kills(&self) -> u64 {
        let events = fs::read_to_string(self.group.join("memory.events")).unwrap_or_default();
        events
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "))
            .and_then(|count| count.parse().ok())
            .unwrap_or(0)
    }

    /// Whether the group is so full of processes that commands can hardly run.
    pub fn is_crowded(&self) -> bool {
        let current = self.processes.as_ref().and_then(read_now);
        let current = current.and_then(|text| text.trim().parse::<u64>().ok());
        current.is_some_and(|current| current > self.max_processes / 2)
    }

    /// Processor time of the whole group so far, microseconds.
    pub fn processor_us(&self) -> Option<u64> {
        let text = read_now(self.processor.as_ref()?)?;
        text.lines()
            .next()?
            .strip_prefix("usage_usec ")?
            .parse()
            .ok()
    }

    /// Kills everything in the group, at once even when it forks faster than it can be listed.
    pub fn kill_all(&self) {
        if let Err(error) = fs::write(self.group.join("cgroup.kill"), "1") {
            crate::console::say(&format!("cannot kill the commands' control group: {error}"));
        }
    }
}

/// What a control file says now; those read here are short.
fn read_now(file: &File) -> Option<String> {
    let mut bytes = [0; 256];
    let count = file.read_at(&mut bytes, 0).ok()?;
    Some(String::from_utf8_lossy(&bytes[..count]).into_owned())
}

/// Processor time of a process and the children it waited for, microseconds, as exactly as the
/// kernel's clock tick allows: for where there are no control groups.
pub fn process_us(pid: nix::unistd::Pid) -> u64 {
    /// `USER_HZ` of every x86 kernel.
    const TICK_US: u64 = 10_000;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // After the name: state is field 3, and user, system, children's user and system time are 14 to 17.
    let fields = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace();
    let ticks = fields
        .skip(11)
        .take(4)
        .filter_map(|field| field.parse::<u64>().ok());
    ticks.sum::<u64>() * TICK_US
}

/// Bytes of memory that are free or could be.
pub fn memory_available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Kills the other members of a process group: what an interrupt did not move.
pub fn kill_followers(leader: nix::unistd::Pid) {
    kill_others(leader, GROUP);
}

/// Kills the other members of a session, in whichever group they are: what a terminal's shell runs
/// beside itself.
pub fn kill_session(leader: nix::unistd::Pid) {
    kill_others(leader, SESSION);
}

/// Fields of `/proc/PID/stat` after the name, which is in parentheses and may hold anything: state,
/// parent, group, session.
const GROUP: usize = 2;
const SESSION: usize = 3;

fn kill_others(leader: nix::unistd::Pid, field: usize) {
    use nix::sys::signal::{Signal, kill};
    let Ok(entries) = fs::read_dir("/proc") else {
        return;
    };
    for entry in entries.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let led_by = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(field));
        if pid != leader.as_raw() && led_by == Some(leader.to_string().as_str()) {
            // One that ended meanwhile is as good as killed.
            kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap_or_default();
        }
    }
}
