//! Where bases and chunks are kept: `bases/` and `chunks/` below the snapshots' directory.
//!
//! Everything is written under a temporary name, synced, and renamed. Whoever adds chunks holds the lock
//! shared until the snapshot that names them has its own name; [`Shelf::sweep`] holds it alone, so it never
//! takes a chunk for garbage that is about to be named. A process that is killed leaves what the next sweep removes.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use nix::fcntl::{Flock, FlockArg};

use super::chunk::{self, Damage, Digest, Writer};
use super::{Base, Pages};
use crate::template::memory;

const LOCK: &str = ".lock";
const UNFINISHED: &str = ".new-";

/// The shelf of one data directory.
#[derive(Debug)]
pub struct Shelf {
    dir: PathBuf,
    /// Chunks and bases that this process wrote or has read through and found sound.
    proved: Mutex<HashSet<String>>,
}

/// What a sweep removed, or would have.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Swept {
    /// Chunks and bases that no snapshot names.
    pub files: u64,
    /// Bytes that they took on the disk.
    pub bytes: u64,
}

impl Swept {
    fn count(&mut self, path: &Path) {
        self.files += 1;
        self.bytes += disk_bytes(path);
    }

    /// Counts the files in a directory.
    pub(crate) fn add(&mut self, dir: &Path) -> anyhow::Result<()> {
        let cannot = || format!("cannot read {}", dir.display());
        for entry in std::fs::read_dir(dir).with_context(cannot)? {
            self.count(&entry.with_context(cannot)?.path());
        }
        Ok(())
    }
}

impl std::ops::AddAssign for Swept {
    fn add_assign(&mut self, other: Self) {
        self.files += other.files;
        self.bytes += other.bytes;
    }
}

/// A lock on the shelf; released by dropping it.
pub type Hold = Flock<File>;

impl Shelf {
    /// The shelf below the snapshots' directory, which is made.
    ///
    /// # Errors
    /// The directories cannot be made.
    pub fn open(snapshots: &Path) -> anyhow::Result<Self> {
        let shelf = Self {
            dir: snapshots.to_path_buf(),
            proved: Mutex::default(),
        };
        for dir in [shelf.chunks(), shelf.bases()] {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(shelf)
    }

    fn chunks(&self) -> PathBuf {
        self.dir.join("chunks")
    }

    fn bases(&self) -> PathBuf {
        self.dir.join("bases")
    }

    fn chunk_path(&self, name: &Digest) -> PathBuf {
        self.chunks().join(name.as_str())
    }

    /// Keeps sweeps away until it is dropped.
    ///
    /// # Errors
    /// The lock file cannot be opened or locked.
    pub fn hold(&self) -> anyhow::Result<Hold> {
        self.lock(FlockArg::LockShared)?
            .context("the shelf is locked")
    }

    fn lock(&self, how: FlockArg) -> anyhow::Result<Option<Hold>> {
        let path = self.dir.join(LOCK);
        let file = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        match Flock::lock(file, how) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => {
                Err(errno).with_context(|| format!("cannot lock {}", path.display()))
            }
        }
    }

    /// Whether a chunk is there. Only a [`Self::hold`] makes sure that it stays.
    pub fn has(&self, name: &Digest) -> bool {
        self.chunk_path(name).exists()
    }

    /// Begins a chunk.
    pub(super) fn begin(&self) -> anyhow::Result<(Writer, tempfile::TempPath)> {
        let made = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempfile_in(self.chunks())
            .with_context(|| format!("cannot write below {}", self.chunks().display()))?;
        let (file, path) = made.into_parts();
        Ok((Writer::new(file), path))
    }

    /// Gives a chunk its name, unless there is one like it. Gives the bytes that it adds to the disk.
    pub(super) fn finish(
        &self,
        writer: Writer,
        path: tempfile::TempPath,
    ) -> anyhow::Result<(Arc<Pages>, u64)> {
        let (file, name, mut bytes) = writer.finish()?;
        let to = self.chunk_path(&name);
        if to.exists() {
            bytes = 0;
        } else {
            file.sync_all().context("cannot flush a chunk")?;
            path.persist(&to)
                .with_context(|| format!("cannot make {}", to.display()))?;
        }
        self.prove(name.as_str());
        let pages = Pages {
            file: Arc::new(File::open(&to).context("cannot open a chunk")?),
            digest: Some(name),
        };
        Ok((Arc::new(pages), bytes))
    }

    /// Forces names to the disk.
    pub(crate) fn flush(&self) -> anyhow::Result<()> {
        for dir in [self.chunks(), self.bases()] {
            File::open(&dir)
                .and_then(|dir| dir.sync_all())
                .with_context(|| format!("cannot flush {}", dir.display()))?;
        }
        Ok(())
    }

    /// Opens a chunk; one that this process has not seen yet is read through first.
    ///
    /// # Errors
    /// It is not there or damaged.
    pub fn open_chunk(&self, name: &Digest) -> anyhow::Result<Arc<Pages>> {
        let path = self.chunk_path(name);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        if !self.is_proved(name.as_str()) {
            match chunk::verify(&file, name, |_| {})? {
                None => self.prove(name.as_str()),
                Some(damage) => anyhow::bail!("its chunk {} is damaged: {damage:?}", name.as_str()),
            }
        }
        Ok(Arc::new(Pages {
            file: Arc::new(file),
            digest: Some(name.clone()),
        }))
    }

    /// Compares a file with the name that it is to have as a chunk.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn check(file: &File, name: &Digest) -> anyhow::Result<Option<Damage>> {
        chunk::verify(file, name, |_| {})
    }

    /// Takes a file that was [checked](Self::check) and flushed for a chunk, unless there is one like it.
    pub(crate) fn admit(&self, name: &Digest, from: &Path) -> anyhow::Result<()> {
        let to = self.chunk_path(name);
        if !to.exists() {
            std::fs::rename(from, &to).with_context(|| format!("cannot make {}", to.display()))?;
        }
        Ok(())
    }

    /// Reads a chunk through. `each` hears of the bytes read.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn verify(&self, name: &Digest, each: impl FnMut(u64)) -> anyhow::Result<Option<Damage>> {
        match File::open(self.chunk_path(name)) {
            Ok(file) => chunk::verify(&file, name, each),
            Err(error) => Ok(Some(Damage::Whole(error.to_string()))),
        }
    }

    /// Keeps a base under its digest, however its first file fares.
    pub(crate) fn adopt(&self, base: &Base) -> anyhow::Result<()> {
        let to = self.bases().join(&base.sha256);
        if to.exists() {
            return Ok(());
        }
        let made = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .make_in(self.bases(), |path| match &base.path {
                // A link costs nothing; whoever rebuilds a template makes another file.
                Some(from) => std::fs::hard_link(from, path),
                None => Err(std::io::ErrorKind::Unsupported.into()),
            });
        let path = match made {
            Ok(made) => made.into_temp_path(),
            // Another file system, or a base that is in memory only.
            Err(_) => {
                let made = tempfile::Builder::new()
                    .prefix(UNFINISHED)
                    .tempfile_in(self.bases())
                    .context("cannot write a base")?;
                let (file, path) = made.into_parts();
                memory::copy(&base.file, &file)?;
                file.sync_all().context("cannot flush a base")?;
                path
            }
        };
        path.persist(&to)
            .with_context(|| format!("cannot make {}", to.display()))?;
        self.prove(&base.sha256);
        Ok(())
    }

    /// Opens a base; one that this process has not seen yet is read through first.
    ///
    /// # Errors
    /// It is not there or damaged.
    pub fn open_base(&self, sha256: &str) -> anyhow::Result<Arc<Base>> {
        let name = Digest::try_from(sha256.to_owned()).map_err(anyhow::Error::msg)?;
        let path = self.bases().join(name.as_str());
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        if !self.is_proved(sha256) {
            let found = memory::measure(&file)?;
            anyhow::ensure!(found.sha256 == sha256, "its base {sha256} is damaged");
            self.prove(sha256);
        }
        Ok(Arc::new(Base {
            file: Arc::new(file),
            sha256: sha256.to_owned(),
            path: Some(path),
        }))
    }

    /// Removes what no snapshot names, and what killed processes left; only looks with `dry_run`. `None`:
    /// something is being added just now, so this is for another time. `live` is called with the lock held.
    ///
    /// # Errors
    /// The directories cannot be read.
    pub fn sweep(
        &self,
        dry_run: bool,
        live: impl FnOnce() -> anyhow::Result<HashSet<String>>,
    ) -> anyhow::Result<Option<Swept>> {
        let Some(_alone) = self.lock(FlockArg::LockExclusiveNonblock)? else {
            return Ok(None);
        };
        let live = live()?;
        let mut swept = Swept::default();
        for dir in [self.chunks(), self.bases()] {
            let entries = std::fs::read_dir(&dir)
                .with_context(|| format!("cannot read {}", dir.display()))?;
            for entry in entries {
                let entry = entry.with_context(|| format!("cannot read {}", dir.display()))?;
                if entry
                    .file_name()
                    .to_str()
                    .is_some_and(|name| live.contains(name))
                {
                    continue;
                }
                swept.count(&entry.path());
                if !dry_run {
                    std::fs::remove_file(entry.path())
                        .with_context(|| format!("cannot remove {}", entry.path().display()))?;
                }
            }
        }
        Ok(Some(swept))
    }

    /// Bytes that a chunk takes on the disk.
    pub fn chunk_bytes(&self, name: &Digest) -> u64 {
        disk_bytes(&self.chunk_path(name))
    }

    /// Bytes that a base, or a chunk, takes on the disk.
    pub fn bytes_of(&self, base: bool, name: &str) -> u64 {
        let dir = if base { self.bases() } else { self.chunks() };
        disk_bytes(&dir.join(name))
    }

    /// Whether this process has read all of these, or written them.
    pub fn knows<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> bool {
        names.into_iter().all(|name| self.is_proved(name))
    }

    fn prove(&self, name: &str) {
        let mut proved = self.proved.lock().unwrap_or_else(PoisonError::into_inner);
        proved.insert(name.to_owned());
    }

    fn is_proved(&self, name: &str) -> bool {
        let proved = self.proved.lock().unwrap_or_else(PoisonError::into_inner);
        proved.contains(name)
    }
}

fn disk_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}
