//! Temporary directories that no build leaves behind.
//!
//! A build works in `tmp/build-<random>/` below the data directory and holds a lock on the
//! directory's `lock` file. It is removed when the build ends, however it ends; should the
//! process be killed outright, the lock dies with it, and the next build or [`sweep`] removes the
//! directory. Making and sweeping take turns by a lock on `tmp` itself: none finds a directory
//! that is not locked yet.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::mount::{MntFlags, umount2};

const PREFIX: &str = "build-";
const LOCK: &str = "lock";

/// A directory that is removed when this is dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Makes one, after removing those of dead builds.
    ///
    /// # Errors
    /// The data directory cannot be written.
    pub fn new(data_dir: &Path) -> anyhow::Result<Self> {
        let tmp = data_dir.join("tmp");
        std::fs::create_dir_all(&tmp)
            .with_context(|| format!("cannot make {}; choose another --data-dir", tmp.display()))?;
        let _turn = turn(&tmp)?;
        remove_dead(&tmp)?;
        let made = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(&tmp)
            .with_context(|| format!("cannot write below {}", tmp.display()))?;
        let lock = File::create(made.path().join(LOCK)).context("cannot make a lock file")?;
        lock.try_lock().context("cannot lock a new file")?;
        // Ownership of the directory passes from `made` to the scratch.
        let path = made.keep();
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.path) {
            tracing::warn!("cannot remove {}: {error:#}", self.path.display());
        }
    }
}

/// Removes what builds that were killed have left below the data directory.
///
/// # Errors
/// The data directory cannot be read.
pub fn sweep(data_dir: &Path) -> anyhow::Result<()> {
    let tmp = data_dir.join("tmp");
    if !tmp.exists() {
        return Ok(());
    }
    let _turn = turn(&tmp)?;
    remove_dead(&tmp)
}

fn turn(tmp: &Path) -> anyhow::Result<File> {
    let dir = File::open(tmp).with_context(|| format!("cannot open {}", tmp.display()))?;
    dir.lock()
        .with_context(|| format!("cannot lock {}", tmp.display()))?;
    Ok(dir)
}

/// Removes the directories of builds that no longer run.
fn remove_dead(tmp: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(tmp).with_context(|| format!("cannot read {}", tmp.display()))? {
        let path = entry?.path();
        let is_build = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(PREFIX));
        if !is_build {
            continue;
        }
        let dead = match File::open(path.join(LOCK)) {
            Ok(lock) => match lock.try_lock() {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => false,
                Err(TryLockError::Error(error)) => {
                    return Err(error).context("cannot test a build's lock");
                }
            },
            // Its removal was under way when it died (or is under way now, which is as well).
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        };
        if dead && let Err(error) = remove_tree(&path) {
            tracing::warn!(
                "cannot remove what a dead build left in {}: {error:#}",
                path.display()
            );
        }
    }
    Ok(())
}

/// Removes a tree, taking down whatever a killed tool left mounted in it first: a deletion must
/// never walk into the host's /proc or /sys.
fn remove_tree(path: &Path) -> anyhow::Result<()> {
    let table =
        std::fs::read_to_string("/proc/self/mountinfo").context("cannot read the mount table")?;
    let mut mounts = mounts_below(&table, path);
    mounts.sort_by_key(|mount| std::cmp::Reverse(mount.as_os_str().len()));
    for mount in mounts {
        umount2(&mount, MntFlags::MNT_DETACH)
            .with_context(|| format!("cannot unmount {}", mount.display()))?;
    }
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn mounts_below(table: &str, path: &Path) -> Vec<PathBuf> {
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|mount| PathBuf::from(mount.replace("\\040", " ")))
        .filter(|mount| mount.starts_with(path))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_goes_with_its_owner() {
        let data = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(data.path()).unwrap();
        let path = scratch.path().to_path_buf();
        std::fs::write(path.join("half-made"), b"x").unwrap();
        drop(scratch);
        assert!(!path.exists());
        assert_eq!(
            std::fs::read_dir(data.path().join("tmp")).unwrap().count(),
            0
        );
    }

    #[test]
    fn dead_builds_are_swept_and_living_ones_left() {
        let data = tempfile::tempdir().unwrap();
        let living = Scratch::new(data.path()).unwrap();
        let tmp = data.path().join("tmp");
        for dead in ["build-dead", "build-without-lock"] {
            std::fs::create_dir_all(tmp.join(dead).join("root")).unwrap();
        }
        std::fs::write(tmp.join("build-dead/lock"), b"").unwrap();
        std::fs::create_dir(tmp.join("not-ours")).unwrap();
        let gone = || !tmp.join("build-dead").exists() && !tmp.join("build-without-lock").exists();
        assert!(!gone());
        let second = Scratch::new(data.path()).unwrap();
        assert!(gone());
        std::fs::create_dir(tmp.join("build-dead")).unwrap();
        sweep(data.path()).unwrap();
        assert!(gone() && living.path().exists() && second.path().exists());
        assert!(tmp.join("not-ours").exists());
    }

    #[test]
    fn only_mounts_of_the_tree_are_found() {
        let table = "1 2 0:3 / /a/root/proc rw - proc proc rw\n1 2 0:3 / /ab rw - x x rw\n1 2 0:3 / /a/s\\040p rw - x x rw\n";
        assert_eq!(
            mounts_below(table, Path::new("/a")),
            [PathBuf::from("/a/root/proc"), PathBuf::from("/a/s p")]
        );
    }
}
