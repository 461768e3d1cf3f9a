//! A file that is not whole yet.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::linkat;

/// What drafts that have a name are called; then come the process that writes it and a random number.
const PREFIX: &str = ".thaw-upload-";

/// Names tried for a draft; they are random, so that a second try is rare already.
const TRIES: u32 = 100;

/// A new file beside the one that it will be. Unless it is published, nothing of it is left: it has no
/// name, where the file system knows such files, and elsewhere it loses it when it is dropped, or when
/// the agent has [`remove_stale`] called after a kill.
pub(super) struct Draft {
    file: File,
    directory: PathBuf,
    /// Its name, where it has one.
    name: Option<PathBuf>,
}

impl Draft {
    pub(super) fn new(directory: &Path) -> io::Result<Self> {
        let nameless = OpenOptions::new()
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_TMPFILE)
            .open(directory);
        let (file, name) = match nameless {
            Ok(file) => (file, None),
            Err(error) if is_unknown(&error) => {
                let (name, file) = with_name(directory, |name| {
                    OpenOptions::new()
                        .write(true)
                        .create_new(true)
                        .mode(0o600)
                        .open(name)
                })?;
                (file, Some(name))
            }
            Err(error) => return Err(error),
        };
        Ok(Self {
            file,
            directory: directory.to_owned(),
            name,
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Makes it the file that everybody sees, at once and whole.
    pub(super) fn publish(mut self, target: &Path) -> io::Result<()> {
        if self.name.is_none() {
            // Where nothing is replaced it never has another name.
            match self.link(target) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                done => return done,
            }
            self.name = Some(with_name(&self.directory, |name| self.link(name))?.0);
        }
        if let Some(name) = &self.name {
            fs::rename(name, target)?;
        }
        self.name = None;
        Ok(())
    }

    fn link(&self, name: &Path) -> io::Result<()> {
        let itself = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = AtFlags::AT_SYMLINK_FOLLOW;
        Ok(linkat(AT_FDCWD, itself.as_str(), AT_FDCWD, name, flags)?)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            remove_quietly(name);
        }
    }
}

/// Whether a file system answers that it has no files without a name.
fn is_unknown(error: &io::Error) -> bool {
    let number = error.raw_os_error();
    matches!(number, Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL))
}

/// Calls `make` with names that nobody can have foreseen until it finds none there.
fn with_name<T>(
    directory: &Path,
    make: impl Fn(&Path) -> io::Result<T>,
) -> io::Result<(PathBuf, T)> {
    let pid = std::process::id();
    for _ in 0..TRIES {
        let random = RandomState::new().build_hasher().finish();
        let name = directory.join(format!("{PREFIX}{pid}-{random:016x}"));
        match make(&name) {
            Ok(made) => return Ok((name, made)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EEXIST))
}

fn remove_quietly(path: &Path) {
    // Already gone is as good; what else could be wrong with it, the failure that led here says.
    drop(fs::remove_file(path));
}

/// Removes what transfers left that were killed: its name tells a process that is gone.
pub(super) fn remove_stale(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(owner);
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            remove_quietly(&entry.path());
        }
    }
}

/// The process that a draft's name tells of.
fn owner(name: &str) -> Option<u32> {
    let (pid, random) = name.strip_prefix(PREFIX)?.split_once('-')?;
    let is_ours = random.len() == 16 && random.bytes().all(|byte| byte.is_ascii_hexdigit());
    pid.parse().ok().filter(|_| is_ours)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("thaw-draft-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    #[test]
    fn a_draft_is_seen_when_it_is_published_and_replaces_what_is_there() {
        let place = scratch("publish");
        for text in ["first", "second"] {
            let draft = Draft::new(&place).unwrap();
            draft.file().write_all(text.as_bytes()).unwrap();
            draft.publish(&place.join("it")).unwrap();
            assert_eq!(fs::read_to_string(place.join("it")).unwrap(), text);
        }
        drop(Draft::new(&place).unwrap());
        assert_eq!(names(&place), ["it"]);
        fs::remove_dir_all(place).unwrap();
    }

    #[test]
    fn what_the_dead_left_goes_and_what_the_living_write_stays() {
        let place = scratch("stale");
        let of = |pid: &str| format!("{PREFIX}{pid}-00112233445566ff");
        // No process has a number beyond the kernel's own limit.
        let living = of(&std::process::id().to_string());
        for name in [&of("4194999"), &living, ".thaw-upload-mine"] {
            fs::write(place.join(name), "").unwrap();
        }
        remove_stale(&place);
        let mut left = names(&place);
        left.sort();
        let mut kept = [living, ".thaw-upload-mine".into()];
        kept.sort();
        assert_eq!(left, kept);
        fs::remove_dir_all(place).unwrap();
    }
}
