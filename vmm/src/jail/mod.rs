//! What a worker gives up before it runs a guest.
//!
//! By then everything is open that it needs: the VM, its memory, the socket to `serve`. In this order:
//!
//! | step | what remains |
//! |---|---|
//! | limits | no core dumps (they would hold a tenant's memory), few descriptors |
//! | empty root | an unlinked directory: no file can be named, none can be made |
//! | own user | a user and group id of its own, no groups, no capabilities |
//! | [`filter`] | the system calls of the main loop; none that opens, connects, starts or signals anything |
//!
//! Together they cost 0.5 ms, most of it the making of the filter. There is no mount, network, process or IPC namespace on
//! purpose: with no way to open a file, make a socket or name a process they would take away
//! nothing more, and making and above all removing them costs milliseconds for each VM.
//!
//! A `serve` that does not run as root has workers that keep its user and root directory; the
//! limits and the filter hold for them too.

mod filter;

use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, chdir, chroot, getpid, setgroups, setresgid, setresuid};

/// Descriptors that a worker may have open: the VM's own (eight vCPUs, two interrupt lines and three more at most), the socket, two logs, and
/// those of one order.
const MAX_DESCRIPTORS: u64 = 64;

/// First of the ids that workers take, far above what systems hand out to people and services; the
/// process id is added, so that no two workers share one.
const FIRST_ID: u32 = 0x7a00_0000;

/// Gives everything up that the main loop does not need.
///
/// # Errors
/// The kernel's refusal; the guest must not run then.
pub fn enter() -> anyhow::Result<()> {
    for (resource, limit) in [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_NOFILE, MAX_DESCRIPTORS),
    ] {
        setrlimit(resource, limit, limit).context("jail: setting a limit")?;
    }
    if Uid::effective().is_root() {
        empty_root().context("jail: moving to an empty root directory")?;
        own_user().context("jail: taking a user id of its own")?;
    }
    filter::install().context("jail: filtering system calls")
}

/// Makes a directory that has no name any more the root directory.
fn empty_root() -> anyhow::Result<()> {
    // In memory where possible: a directory on a disk may wait for the disk.
    let parent = ["/dev/shm", "/run", "/tmp"]
        .into_iter()
        .map(Path::new)
        .find(|path| path.is_dir())
        .context("there is no /dev/shm, /run or /tmp")?;
    let path: PathBuf = parent.join(format!("thaw-jail-{}", getpid()));
    std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
    let entered = chdir(&path);
    std::fs::remove_dir(&path).with_context(|| format!("removing {}", path.display()))?;
    entered?;
    chroot(".")?;
    Ok(())
}

fn own_user() -> anyhow::Result<()> {
    // Process ids are below 2^22, so this neither overflows nor meets another worker's.
    let id = FIRST_ID + getpid().as_raw().unsigned_abs();
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    Ok(())
}
