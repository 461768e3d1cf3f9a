//! A file's bytes, out and in.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::{About, Failure};

/// Bytes moved at once.
const PIECE: usize = 256 << 10;

/// Permission bits of a new file.
const ORDINARY: u32 = 0o644;

/// Names tried for a file that is not whole yet.
const TRIES: u32 = 100;

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

/// Standard input becomes the file.
pub(super) fn write(path: &str, mode: Option<u32>, parents: bool) -> Result<(), Failure> {
    let target = Path::new(path);
    // A link is written through, as a shell's redirection does.
    let target = fs::canonicalize(target).unwrap_or_else(|_| target.to_owned());
    let Some(name) = target.file_name() else {
        return Err(error(libc::EISDIR)).about(path);
    };
    let there = fs::metadata(&target).ok();
    if path.ends_with('/') || there.as_ref().is_some_and(fs::Metadata::is_dir) {
        return Err(error(libc::EISDIR)).about(path);
    }
    if there.as_ref().is_some_and(|there| !there.is_file()) {
        return Err(error(libc::EINVAL)).about(path);
    }
    let directory = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    if parents {
        fs::create_dir_all(&directory).about(&directory.to_string_lossy())?;
    }
    let (draft, file) = Draft::beside(&directory, &name.to_string_lossy()).about(path)?;
    let bits = mode.or_else(|| there.map(|there| there.permissions().mode() & 0o7777));
    fill(&file).about(path)?;
    file.set_permissions(fs::Permissions::from_mode(bits.unwrap_or(ORDINARY)))
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

/// A file that is not whole yet. Dropping it removes it.
struct Draft(Option<PathBuf>);

impl Draft {
    /// A new file beside the one it will be. One that a kill leaves behind is known by its name and
    /// removed by the next that is made for the same file.
    fn beside(directory: &Path, name: &str) -> io::Result<(Self, File)> {
        let short: String = name.chars().take(64).collect();
        let stem = format!(".thaw-upload-{short}-");
        remove_stale(directory, &stem);
        for number in 0..TRIES {
            let path = directory.join(format!("{stem}{}-{number}", std::process::id()));
            let opened = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path);
            match opened {
                Ok(file) => return Ok((Self(Some(path)), file)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(error(libc::EEXIST))
    }

    fn publish(mut self, target: &Path) -> io::Result<()> {
        let Some(path) = self.0.take() else {
            return Ok(());
        };
        fs::rename(&path, target).inspect_err(|_| remove_quietly(&path))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            remove_quietly(path);
        }
    }
}

fn remove_quietly(path: &Path) {
    // Already gone is as good; what else could be wrong with it, the failure that led here says.
    drop(fs::remove_file(path));
}

/// Removes what killed transfers of this file left, known by the number of a process that is gone.
fn remove_stale(directory: &Path, stem: &str) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(stem))
            .and_then(|rest| rest.split('-').next())
            .and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            remove_quietly(&entry.path());
        }
    }
}
