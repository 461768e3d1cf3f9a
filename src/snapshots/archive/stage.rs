//! What an import has checked, kept until all of it is: so that the next attempt goes on from there.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context;

use crate::layers::{Digest, Swept};

/// What an import that broke off had checked is kept for so long, for another attempt.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// Where imports keep what they have checked, below the snapshots' directory.
const STAGES: &str = "importing";

/// What one import has checked so far.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) dir: PathBuf,
    _lock: File,
}

impl Stage {
    pub(super) fn open(snapshots: &Path, id: &str) -> anyhow::Result<Self> {
        let dir = snapshots.join(STAGES).join(id);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("cannot make {}", dir.display()))?;
        let lock = lock(&dir)?.context("another import of this snapshot runs")?;
        Ok(Self { dir, _lock: lock })
    }

    pub(super) fn chunk(&self, name: &Digest) -> PathBuf {
        self.dir.join(name.as_str())
    }

    /// An empty file for the next entry.
    pub(super) fn begin(&self) -> anyhow::Result<File> {
        let path = self.dir.join("part");
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Gives an entry that was checked its name.
    pub(super) fn finish(&self, file: &File, to: &Path) -> anyhow::Result<()> {
        file.sync_all().context("cannot flush an entry")?;
        std::fs::rename(self.dir.join("part"), to)
            .with_context(|| format!("cannot make {}", to.display()))
    }

    pub(super) fn remove(self) -> anyhow::Result<()> {
        std::fs::remove_dir_all(&self.dir)
            .with_context(|| format!("cannot remove {}", self.dir.display()))
    }
}

/// Locks a stage; `None`: somebody else has.
fn lock(dir: &Path) -> anyhow::Result<Option<File>> {
    let path = dir.join("lock");
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        // Its time tells how long ago somebody was at work here.
        Ok(()) => file.write_all(b".").context("cannot write a lock")?,
        Err(std::fs::TryLockError::WouldBlock) => return Ok(None),
        Err(std::fs::TryLockError::Error(error)) => return Err(error).context("cannot lock"),
    }
    Ok(Some(file))
}

/// Removes what imports that broke off have left and nobody has come back for; only looks with `dry_run`.
pub(in crate::snapshots) fn sweep(snapshots: &Path, dry_run: bool) -> anyhow::Result<Swept> {
    let stages = snapshots.join(STAGES);
    let mut swept = Swept::default();
    let entries = match std::fs::read_dir(&stages) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(swept),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", stages.display()));
        }
    };
    for stage in entries {
        let dir = stage.context("cannot read a directory")?.path();
        let used = std::fs::metadata(dir.join("lock")).and_then(|meta| meta.modified());
        let age = used
            .ok()
            .and_then(|used| SystemTime::now().duration_since(used).ok());
        if age.is_none_or(|age| age < KEPT) {
            continue;
        }
        let Some(_lock) = lock(&dir)? else { continue };
        swept.add(&dir)?;
        if !dry_run {
            std::fs::remove_dir_all(&dir)
                .with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    Ok(swept)
}
