//! File systems that have no disk.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::{BootError, CGROUPS, Step};

/// Mounts a file system, making its directory; one that is mounted already stays.
pub(super) fn mount_at(
    kind: &str,
    at: &str,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<(), BootError> {
    make_directory(at)?;
    match mount(Some(kind), at, Some(kind), flags, options) {
        Err(nix::Error::EBUSY) => Ok(()),
        other => other.step(|| format!("mounting {kind} on {at}")),
    }
}

pub(super) fn make_directory(at: &str) -> Result<(), BootError> {
    match fs::create_dir_all(at) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.step(|| at.to_owned()),
    }
}

const PLAIN: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// What the boot itself needs.
pub(super) fn kernel_file_systems() -> Result<(), BootError> {
    mount_at("proc", "/proc", PLAIN, None)?;
    mount_at("sysfs", "/sys", PLAIN, None)?;
    mount_at("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755"))
}

/// What programs expect of a root.
pub(super) fn memory_file_systems() -> Result<(), BootError> {
    let tidy = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
    mount_at(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID,
        Some("gid=5,mode=0620,ptmxmode=0666"),
    )?;
    mount_at("tmpfs", "/dev/shm", tidy, Some("mode=1777"))?;
    mount_at("tmpfs", "/run", tidy, Some("mode=0755"))?;
    mount_at("tmpfs", "/tmp", tidy, Some("mode=1777"))?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        if !Path::new(link).exists() {
            match std::os::unix::fs::symlink(target, link) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.step(|| link.to_owned())?,
            }
        }
    }
    if let Err(error) = mount_at("cgroup2", CGROUPS, PLAIN, None) {
        crate::console::say(&error.to_string());
    }
    Ok(())
}
