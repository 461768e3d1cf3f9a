//! What directories hold, and changes to them.

use std::collections::BinaryHeap;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use thaw_wire::message::{FileInfo, FileKind, Looked};

use super::{About, Failure};

/// What can be told about a file; a link is not followed.
fn info(path: &Path) -> io::Result<FileInfo> {
    let found = fs::symlink_metadata(path)?;
    let kind = found.file_type();
    let target = kind.is_symlink().then(|| fs::read_link(path));
    Ok(FileInfo {
        path: path.to_string_lossy().into_owned(),
        kind: match () {
            () if kind.is_file() => FileKind::File,
            () if kind.is_dir() => FileKind::Directory,
            () if kind.is_symlink() => FileKind::Symlink,
            () => FileKind::Other,
        },
        size: found.size(),
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
        modified: found.mtime() as f64 + found.mtime_nsec() as f64 / 1e9,
        target: target
            .and_then(Result::ok)
            .map(|target| target.to_string_lossy().into_owned()),
    })
}

fn say(out: &mut impl Write, info: &FileInfo) -> io::Result<()> {
    serde_json::to_writer(&mut *out, info)?;
    out.write_all(b"\n")
}

pub(super) fn stat(path: &str) -> Result<(), Failure> {
    let found = info(Path::new(path)).about(path)?;
    say(&mut io::stdout().lock(), &found).about(path)
}

/// Lists in the order of paths, going down where a path's turn comes, so that a limit cuts the same
/// list short and never sorts what nobody will see.
pub(super) fn list(path: &str, recursive: bool, limit: u64) -> Result<(), Failure> {
    let mut out = BufWriter::new(io::stdout().lock());
    let mut left = usize::try_from(limit).unwrap_or(usize::MAX);
    // Directories that are being listed: their entries that are still to come, last first.
    let mut open: Vec<Vec<PathBuf>> = vec![entries(Path::new(path), left).about(path)?];
    while let Some(level) = open.last_mut() {
        let Some(next) = level.pop() else {
            open.pop();
            continue;
        };
        if left == 0 {
            break;
        }
        // What was removed since is not there.
        let Ok(found) = info(&next) else { continue };
        left -= 1;
        say(&mut out, &found).about(path)?;
        if recursive && found.kind == FileKind::Directory {
            // A directory that may not be read is listed, only not its insides.
            open.push(entries(&next, left).unwrap_or_default());
        }
    }
    out.flush().about(path)
}

/// What the kernel makes up, and what changes by itself.
const NOT_OURS: [&str; 4] = ["/proc", "/sys", "/dev", "/run"];

/// Lists what was made or changed since. What was removed shows as a change of its directory.
pub(super) fn changed(since_ns: u64, limit: u64) -> Result<(), Failure> {
    let root = "/";
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now_ns = now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
    let mut out = BufWriter::new(io::stdout().lock());
    let (mut left, mut more) = (limit, 0);
    let mut open = vec![PathBuf::from(root)];
    while let Some(directory) = open.pop() {
        // What was removed, or may not be read, has nothing to tell.
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            let Ok(found) = entry.metadata() else {
                continue;
            };
            if found.is_dir() {
                if NOT_OURS.iter().any(|other| path == Path::new(other)) {
                    continue;
                }
                open.push(path.clone());
            }
            let at = i128::from(found.ctime()) * 1_000_000_000 + i128::from(found.ctime_nsec());
            if at < i128::from(since_ns) {
                continue;
            }
            if left == 0 {
                more += 1;
                continue;
            }
            let Ok(told) = info(&path) else { continue };
            left -= 1;
            say(&mut out, &told).about(root)?;
        }
    }
    serde_json::to_writer(&mut out, &Looked { now_ns, more })
        .map_err(io::Error::from)
        .about(root)?;
    out.write_all(b"\n").about(root)?;
    out.flush().about(root)
}

/// A directory's entries, last first: of too many, only those that come first are kept.
fn entries(directory: &Path, most: usize) -> io::Result<Vec<PathBuf>> {
    let mut first = BinaryHeap::new();
    for entry in fs::read_dir(directory)? {
        first.push(entry?.path());
        if first.len() > most {
            first.pop();
        }
    }
    let mut first = first.into_sorted_vec();
    first.reverse();
    Ok(first)
}

pub(super) fn mkdir(path: &str, parents: bool) -> Result<(), Failure> {
    if parents {
        fs::create_dir_all(path).about(path)
    } else {
        fs::create_dir(path).about(path)
    }
}

pub(super) fn remove(path: &str, recursive: bool) -> Result<(), Failure> {
    let found = fs::symlink_metadata(path).about(path)?;
    // A link to the root is not the root.
    let is_root = || fs::canonicalize(path).is_ok_and(|whole| whole == Path::new("/"));
    if found.is_dir() && is_root() {
        return Err(io::Error::from_raw_os_error(libc::EBUSY)).about(path);
    }
    match (found.is_dir(), recursive) {
        (false, _) => fs::remove_file(path),
        (true, false) => fs::remove_dir(path),
        // Does not follow links, not even ones put in its way meanwhile.
        (true, true) => fs::remove_dir_all(path),
    }
    .about(path)
}
