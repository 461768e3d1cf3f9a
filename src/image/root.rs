//! The guest's root file system: Debian packages, stripped, plus the runner, as a squashfs.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;

use super::host_tools::{self, Cancel};
use super::progress::Progress;
use super::{Recipe, embedded};

/// Where the runner is in the guest.
pub const RUNNER_DIR: &str = "opt/thaw/runner";

/// Documentation and translations that no package gets to unpack; licence texts stay.
const NOT_UNPACKED: &[&str] = &[
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/bug/*",
];

/// What is emptied afterwards: caches, logs, and whatever came from the building host.
const EMPTIED: &[&str] = &[
    "var/cache",
    "var/log",
    "var/lib/apt",
    "tmp",
    "var/tmp",
    "run",
    "dev",
    "boot",
];

/// Files that tell of the build or of the building host.
const REMOVED: &[&str] = &[
    "etc/resolv.conf",
    "etc/hostname",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/statoverride-old",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "etc/.pwd.lock",
];

/// A root file system, packed.
#[derive(Debug)]
pub struct Root {
    /// The squashfs.
    pub squashfs: PathBuf,
    /// Packages in it, `package=version`, in order.
    pub packages: Vec<String>,
}

/// Removes the mark by which Debian keeps pip off the system's Python: in a guest there is one user and one
/// Python, and `%pip install` is what notebooks do.
fn let_pip_install(root: &Path) -> anyhow::Result<()> {
    let library = root.join("usr/lib");
    for entry in std::fs::read_dir(&library).context("the root has no usr/lib")? {
        let mark = entry?.path().join("EXTERNALLY-MANAGED");
        if mark.exists() {
            std::fs::remove_file(&mark)
                .with_context(|| format!("cannot remove {}", mark.display()))?;
        }
    }
    Ok(())
}

/// Installs the recipe's packages into a fresh directory.
///
/// Compiled Python (`__pycache__`) is kept, because imports are slow without it. So the dates
/// of files are kept, too: they say whether a compiled file belongs to its source.
///
/// # Errors
/// mmdebstrap failed.
pub fn install(
    recipe: &Recipe,
    root: &Path,
    cancel: &Cancel,
    progress: &Progress,
) -> anyhow::Result<()> {
    let mut command = Command::new("mmdebstrap");
    command.args(["--mode=root", "--variant=essential", "--format=directory"]);
    for option in NOT_UNPACKED {
        command.arg(format!("--dpkgopt={option}"));
    }
    command.args([
        "--aptopt=Apt::Install-Recommends \"false\"",
        "--aptopt=Acquire::Languages \"none\"",
    ]);
    if !recipe.packages.is_empty() {
        command.arg(format!("--include={}", recipe.packages.join(",")));
    }
    command.arg(&recipe.suite).arg(root);
    command.args(recipe.mirror.as_ref());
    host_tools::run(&mut command, cancel, progress)
        .with_context(|| format!("cannot install the packages of recipe {}", recipe.name))
}

/// Removes what no guest needs and adds the runner.
///
/// # Errors
/// The tree cannot be changed.
pub fn finish(
    root: &Path,
    since: SystemTime,
    cancel: &Cancel,
    progress: &Progress,
) -> anyhow::Result<()> {
    for dir in EMPTIED {
        empty(&root.join(dir))?;
    }
    for file in REMOVED {
        match std::fs::remove_file(root.join(file)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {file}"));
            }
            _ => {}
        }
    }
    let_pip_install(root)?;
    write(&root.join("etc/machine-id"), b"")?;
    write(
        &root.join("etc/hosts"),
        b"127.0.0.1 localhost\n::1 localhost ip6-localhost\n",
    )?;
    let runner = root.join(RUNNER_DIR);
    std::fs::create_dir_all(&runner)
        .with_context(|| format!("cannot make {}", runner.display()))?;
    for (name, bytes) in embedded::RUNNER {
        write(&runner.join(name), bytes)?;
    }
    settle_dates(root, since)?;
    if root.join("usr/bin/python3").exists() && !embedded::RUNNER.is_empty() {
        // Valid by content, not by date: the same bytes whenever it is built.
        host_tools::run(
            Command::new("chroot")
                .arg(root)
                .args([
                    "/usr/bin/python3",
                    "-m",
                    "compileall",
                    "-q",
                    "--invalidation-mode",
                    "unchecked-hash",
                ])
                .arg(Path::new("/").join(RUNNER_DIR)),
            cancel,
            progress,
        )
        .context("cannot compile the runner")?;
        settle_dates(&runner, since)?;
    }
    Ok(())
}

/// Packs the tree. Same tree, same bytes.
///
/// # Errors
/// mksquashfs failed.
pub fn pack(
    root: &Path,
    squashfs: &Path,
    cancel: &Cancel,
    progress: &Progress,
) -> anyhow::Result<()> {
    let mut command = Command::new("mksquashfs");
    command.arg(root).arg(squashfs);
    // Level 9 packs `minimal` in a sixth of level 15's time into 7 % more; unpacking is as fast.
    command.args(["-comp", "zstd", "-Xcompression-level", "9", "-b", "128K"]);
    command.args([
        "-reproducible",
        "-mkfs-time",
        "0",
        "-noappend",
        "-no-progress",
        "-quiet",
    ]);
    command.env_remove("SOURCE_DATE_EPOCH");
    host_tools::run(&mut command, cancel, progress).context("cannot pack the root file system")
}

/// The packages in a tree, `package=version`, in order.
///
/// # Errors
/// dpkg's database cannot be read.
pub fn packages(root: &Path) -> anyhow::Result<Vec<String>> {
    let path = root.join("var/lib/dpkg/status");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(packages_from(&text))
}

fn packages_from(status: &str) -> Vec<String> {
    let mut packages: Vec<String> = status
        .split("\n\n")
        .filter_map(|paragraph| {
            let field = |name: &str| {
                paragraph
                    .lines()
                    .find_map(|line| line.strip_prefix(name))
                    .map(str::trim)
            };
            Some(format!("{}={}", field("Package:")?, field("Version:")?))
        })
        .collect();
    packages.sort();
    packages
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn empty(dir: &Path) -> anyhow::Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", dir.display())),
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let removed = if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// Gives everything that was written during the build the date of the newest packaged file, so that
/// two builds of the same packages have the same dates.
fn settle_dates(root: &Path, since: SystemTime) -> anyhow::Result<()> {
    let since = since
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs() as i64;
    let mut fresh = Vec::new();
    let mut newest = 0;
    let mut pending = vec![root.to_path_buf()];
    while let Some(path) = pending.pop() {
        let metadata = std::fs::symlink_metadata(&path)
            .with_context(|| format!("cannot look at {}", path.display()))?;
        if metadata.mtime() >= since {
            fresh.push((path.clone(), metadata.file_type()));
        } else {
            newest = newest.max(metadata.mtime());
        }
        if metadata.is_dir() {
            for entry in std::fs::read_dir(&path)
                .with_context(|| format!("cannot read {}", path.display()))?
            {
                pending.push(entry?.path());
            }
        }
    }
    let date = UNIX_EPOCH + Duration::from_secs(newest.max(0) as u64);
    let stamp = nix::sys::time::TimeSpec::from(date.duration_since(UNIX_EPOCH).unwrap_or_default());
    for (path, _) in fresh {
        nix::sys::stat::utimensat(
            nix::fcntl::AT_FDCWD,
            &path,
            &stamp,
            &stamp,
            nix::sys::stat::UtimensatFlags::NoFollowSymlink,
        )
        .with_context(|| format!("cannot date {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_read_from_the_status_file() {
        let status = "Package: b\nStatus: install ok installed\nVersion: 2:1\n\nPackage: a\nVersion: 1\n\nDescription: none\n";
        assert_eq!(packages_from(status), ["a=1", "b=2:1"]);
    }

    #[test]
    fn fresh_files_get_the_date_of_the_newest_packaged_one() {
        let dir = tempfile::tempdir().unwrap();
        let since = SystemTime::now() - Duration::from_secs(1);
        let old = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let packaged = std::fs::File::create(dir.path().join("packaged")).unwrap();
        packaged.set_modified(old).unwrap();
        write(&dir.path().join("made"), b"x").unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
        settle_dates(dir.path(), since).unwrap();
        for name in ["packaged", "made", "link", "."] {
            let found = std::fs::symlink_metadata(dir.path().join(name))
                .unwrap()
                .mtime();
            assert_eq!(found, 1_000_000, "{name}");
        }
    }
}
