//! A file's bytes, out and in.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::draft::Draft;
use super::{About, Failure};

/// Bytes moved at once.
const PIECE: usize = 256 << 10;

/// Permission bits of a new file.
const ORDINARY: u32 = 0o644;

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Writes the file to standard output.
pub(super) fn read(path: &str) -> Result<(), Failure> {
    // Without O_NONBLOCK a pipe without a writer would hold us here.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .about(path)?;
    let kind = file.metadata().about(path)?.file_type();
    if kind.is_dir() {
        return Err(error(libc::EISDIR)).about(path);
    }
    if !kind.is_file() {
        return Err(error(libc::EINVAL)).about(path);
    }
    pour(&file).about(path)
}

/// Copies a file to standard output in large pieces. Splicing would spare a copy and cost more: the
/// pipe's reader would then meet each page of the file by itself.
fn pour(mut file: &File) -> io::Result<()> {
    let mut bytes = vec![0; PIECE];
    let out = io::stdout();
    loop {
        let count = match file.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let mut rest = &bytes[..count];
        // Past the standard library's own buffer, which goes by lines.
        while !rest.is_empty() {
            match nix::unistd::write(out.as_fd(), rest) {
                Ok(count) => rest = &rest[count..],
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The file that a path leads to, and the directory that it is or will be in. A link is written through,
/// as a shell's redirection does.
pub(super) fn locate(path: &str) -> io::Result<(PathBuf, PathBuf)> {
    let target = Path::new(path);
    let target = fs::canonicalize(target).unwrap_or_else(|_| target.to_owned());
    if path.ends_with('/') || target.file_name().is_none() {
        return Err(error(libc::EISDIR));
    }
    let directory = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((target, directory))
}

/// Standard input becomes the file.
pub(super) fn write(path: &str, mode: Option<u32>, parents: bool) -> Result<(), Failure> {
    let (target, directory) = locate(path).about(path)?;
    let there = fs::metadata(&target).ok();
    if there.as_ref().is_some_and(fs::Metadata::is_dir) {
        return Err(error(libc::EISDIR)).about(path);
    }
    if there.as_ref().is_some_and(|there| !there.is_file()) {
        return Err(error(libc::EINVAL)).about(path);
    }
    if parents {
        fs::create_dir_all(&directory).about(&directory.to_string_lossy())?;
    }
    let draft = Draft::new(&directory).about(path)?;
    let bits = mode.or_else(|| there.map(|there| there.permissions().mode() & 0o7777));
    fill(draft.file()).about(path)?;
    draft
        .file()
        .set_permissions(fs::Permissions::from_mode(bits.unwrap_or(ORDINARY)))
        .about(path)?;
    draft.publish(&target).about(path)
}

fn fill(mut file: &File) -> io::Result<()> {
    let mut bytes = vec![0; PIECE];
    let mut input = io::stdin().lock();
    loop {
        match input.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(count) => file.write_all(&bytes[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
