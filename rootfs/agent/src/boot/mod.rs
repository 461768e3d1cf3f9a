//! From an initramfs to a root that commands can live in.
//!
//! The initramfs holds `/init` (this program), `/modules/order` and an `order.pv` and `order.hvm` with the modules they name, and
//! `/root.squashfs`. Every step says what it was when it fails, for the host's log.

mod modules;
mod mounts;
mod root;
mod tuning;

use std::io;
use std::path::Path;

use nix::sys::resource::{Resource, setrlimit};

use crate::doorbell::Machine;
use crate::sys::device;

/// A step of the boot that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct BootError {
    step: String,
    source: io::Error,
}

/// Names the step that an error belongs to.
trait Step<T> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, BootError> {
        self.map_err(|error| BootError {
            step: step(),
            source: error.into(),
        })
    }
}

/// Where control groups are mounted.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// Open files that a process may have: what container engines give.
const OPEN_FILES: u64 = 65_536;

/// Brings the guest up.
///
/// # Errors
/// A step without which commands cannot run.
pub fn bring_up() -> Result<(), BootError> {
    mounts::kernel_file_systems()?;
    let modules = Path::new("/modules");
    modules::load(modules, "order")?;
    modules::load(modules, &format!("order.{}", Machine::here().name()))?;
    root::switch()?;
    mounts::memory_file_systems()?;
    settle();
    Ok(())
}

/// What commands can do without; failures are said and borne.
fn settle() {
    let bear = |step: &str, result: io::Result<()>| {
        if let Err(error) = result {
            crate::console::say(&format!("{step}: {error}"));
        }
    };
    bear("lo", device::interface_up("lo"));
    bear(
        "host name",
        nix::unistd::sethostname("thaw").map_err(io::Error::from),
    );
    // The ring's pages are pinned and known to the host by address: nothing may move them.
    bear(
        "compaction",
        std::fs::write("/proc/sys/vm/compact_unevictable_allowed", "0"),
    );
    bear(
        "oom score",
        std::fs::write("/proc/self/oom_score_adj", "-1000"),
    );
    // A renewal writes these; the overlay's copy of them is made now rather than then.
    for path in ["/etc/hostname", "/etc/machine-id"] {
        let opened = std::fs::File::options()
            .append(true)
            .create(true)
            .open(path);
        bear(path, opened.map(drop));
    }
    if let Err(error) = tuning::apply() {
        crate::console::say(&error.to_string());
    }
    // It does little at a time, and what it does must not wait for a thousand busy processes.
    bear("priority", device::run_first());
    let limit = setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES);
    bear("open files", limit.map_err(io::Error::from));
}
