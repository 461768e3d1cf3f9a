//! Snapshots of VMs with their memory: made, kept, given to be restored from, removed.
//!
//! On disk, below the data directory, `snapshots/<id>/` holds `manifest.json`, `state` and `map`; the pages that the
//! map names are on the shelf ([`crate::layers`]), which snapshots share. A directory gets its name when everything
//! that it needs is on the disk, so what is there is whole. The directories are the truth; what is being made or has failed is known
//! in memory only.

mod archive;
mod catalog;
mod error;
mod files;
mod make;
pub mod manifest;
mod rebase;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{Notify, Semaphore};

pub use archive::{Export, Import, Imported};
pub use catalog::{Catalog, Difference, Fault, Reached};
pub use error::SnapshotError;
pub use make::Wish;
pub use manifest::{Ground, Kind, Manifest};
pub use rebase::Rebased;

use files::{directories, manifest_in, open_now, remove, sweep};

use crate::config::SnapshotConfig;
use crate::layers::Shelf;
use crate::session::{Frozen, Shape, TenantId};
use crate::template::manifest::FILE;

/// Snapshots that failed are told of until this many more have.
const FAILURES_TOLD: usize = 100;

/// A sweep reads every manifest, so that many deletions share one.
const BETWEEN_SWEEPS: Duration = Duration::from_secs(1);

/// How far a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// It is being made.
    Building,
    /// It can be restored from.
    Ready,
    /// It could not be made.
    Failed(String),
}

/// What can be told about a snapshot.
#[derive(Clone, Debug)]
pub struct View {
    /// What its manifest says, or will.
    pub manifest: Manifest,
    /// How far it is.
    pub status: Status,
}

#[derive(Debug)]
struct Entry {
    manifest: Manifest,
    status: Status,
}

/// All snapshots. Cheap to share by an [`Arc`].
#[derive(Debug)]
pub struct Snapshots {
    data_dir: PathBuf,
    shelf: Arc<Shelf>,
    ground: Ground,
    config: SnapshotConfig,
    known: Mutex<HashMap<String, Entry>>,
    /// Those that are being removed. Locked after `known`, never before it.
    leaving: Mutex<HashSet<String>>,
    /// Something was removed that may have been the last to need its chunks.
    dirty: Notify,
    /// Each one being made, or read through for the first time, keeps a core and the disk busy.
    hands: Semaphore,
}

/// Directory of the snapshots below the data directory.
pub fn snapshots_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("snapshots")
}

impl Snapshots {
    /// Finds what is there. Blocks.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn open(data_dir: &Path, ground: Ground, config: SnapshotConfig) -> anyhow::Result<Self> {
        let dir = snapshots_dir(data_dir);
        let shelf = Arc::new(Shelf::open(&dir)?);
        let mut known = HashMap::new();
        for path in directories(&dir)? {
            if !path.join(FILE).exists() {
                // What is here got its name with its manifest in it, and loses that first when it is deleted.
                remove(&path)?;
                continue;
            }
            match manifest_in(&path) {
                Ok(manifest) => {
                    let status = Status::Ready;
                    known.insert(manifest.id.clone(), Entry { manifest, status });
                }
                Err(error) => tracing::warn!("{} is left alone: {error:#}", path.display()),
            }
        }
        let snapshots = Self {
            data_dir: data_dir.to_path_buf(),
            shelf,
            ground,
            hands: Semaphore::new(config.concurrency.max(1)),
            config,
            known: Mutex::new(known),
            leaving: Mutex::default(),
            dirty: Notify::new(),
        };
        if !sweep(&snapshots.shelf, data_dir) {
            snapshots.sweep_soon();
        }
        Ok(snapshots)
    }

    /// Removes chunks that no snapshot names whenever there may be some. Never returns.
    pub async fn keep_swept(self: Arc<Self>) {
        loop {
            self.dirty.notified().await;
            if !self.sweep_now().await {
                self.sweep_soon();
            }
            tokio::time::sleep(BETWEEN_SWEEPS).await;
        }
    }

    /// Removes those that only a VM's record could name, and none of `named` is: a server was killed
    /// between a freeze and its record, or between a VM's waking and the removal. Blocks.
    pub fn remove_unnamed(&self, named: &HashSet<String>) {
        let unnamed: Vec<String> = {
            let known = self.known();
            let entries = known.values().map(|entry| &entry.manifest);
            let fleeting = entries.filter(|one| one.kind.is_fleeting() && !named.contains(&one.id));
            fleeting.map(|one| one.id.clone()).collect()
        };
        for id in unnamed {
            match remove(&self.dir(&id)) {
                Ok(()) => {
                    tracing::info!(snapshot = id, "a frozen VM that no record names is removed");
                    self.known().remove(&id);
                }
                Err(error) => tracing::warn!("{error:#}"),
            }
        }
        self.sweep_soon();
    }

    fn sweep_soon(&self) {
        self.dirty.notify_one();
    }

    /// Removes chunks that no snapshot names, off the runtime's threads. `false`: something is being added just now, so
    /// this is for another time.
    async fn sweep_now(&self) -> bool {
        let (shelf, data_dir) = (self.shelf.clone(), self.data_dir.clone());
        match blocking(move || Ok(sweep(&shelf, &data_dir))).await {
            Ok(done) => done,
            Err(error) => {
                tracing::warn!("chunks that nothing needs are still there: {error:#}");
                true
            }
        }
    }

    /// The tenant's own snapshots, newest first.
    pub fn list(&self, tenant: &TenantId) -> Vec<View> {
        match directories(&snapshots_dir(&self.data_dir)) {
            Ok(found) => found.iter().for_each(|dir| self.notice(dir)),
            Err(error) => tracing::warn!("new snapshots cannot be looked for: {error:#}"),
        }
        let known = self.known();
        let mine = known
            .values()
            .filter(|entry| entry.manifest.tenant == tenant.0 && entry.manifest.kind == Kind::User);
        let mut views: Vec<View> = mine.map(Entry::view).collect();
        views.sort_by(|a, b| {
            let key = |view: &View| (view.manifest.created_ms, view.manifest.id.clone());
            key(b).cmp(&key(a))
        });
        views
    }

    /// One of the tenant's own snapshots.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], for another tenant's too.
    pub fn get(&self, tenant: &TenantId, id: &str) -> Result<View, SnapshotError> {
        self.notice_id(id);
        let known = self.known();
        let found = known
            .get(id)
            .filter(|entry| entry.manifest.tenant == tenant.0 && entry.manifest.kind == Kind::User);
        found
            .map(Entry::view)
            .ok_or_else(|| SnapshotError::NotFound(id.to_owned()))
    }

    /// One of the tenant's snapshots of any kind: checkpoints are named by tapes.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], for another tenant's too.
    pub fn any(&self, tenant: &TenantId, id: &str) -> Result<View, SnapshotError> {
        self.notice_id(id);
        let known = self.known();
        let found = known
            .get(id)
            .filter(|entry| entry.manifest.tenant == tenant.0);
        found
            .map(Entry::view)
            .ok_or_else(|| SnapshotError::NotFound(id.to_owned()))
    }

    /// How many checkpoints a tape keeps.
    pub fn checkpoints_kept(&self) -> usize {
        self.config.checkpoints_per_tape
    }

    /// Removes what a suspended VM was in, unless a tape names it.
    ///
    /// # Errors
    /// As [`Self::delete`].
    pub async fn unpark(&self, tenant: &TenantId, id: &str) -> Result<(), SnapshotError> {
        if self.any(tenant, id)?.manifest.kind != Kind::Checkpoint {
            self.delete(tenant, id).await?;
        }
        Ok(())
    }

    /// Whether there is something by this id to be restored.
    pub fn has(&self, id: &str) -> bool {
        self.notice_id(id);
        let known = self.known();
        known
            .get(id)
            .is_some_and(|entry| entry.status == Status::Ready)
    }

    /// Removes one of the tenant's snapshots. VMs that were restored from it go on running.
    ///
    /// # Errors
    /// It is not there, is being made, or cannot be removed.
    pub async fn delete(&self, tenant: &TenantId, id: &str) -> Result<Manifest, SnapshotError> {
        self.notice_id(id);
        let manifest = {
            let mut known = self.known();
            let found = known
                .get(id)
                .filter(|entry| entry.manifest.tenant == tenant.0);
            match found.map(|entry| &entry.status) {
                None => return Err(SnapshotError::NotFound(id.to_owned())),
                Some(Status::Building) => return Err(SnapshotError::Building(id.to_owned())),
                Some(_) => {}
            }
            let entry = known.remove(id);
            self.leaving().insert(id.to_owned());
            entry
                .ok_or_else(|| SnapshotError::NotFound(id.to_owned()))?
                .manifest
        };
        let dir = self.dir(id);
        let removed = blocking(move || remove(&dir)).await;
        self.leaving().remove(id);
        removed.map_err(SnapshotError::NotMade)?;
        self.sweep_soon();
        Ok(manifest)
    }

    /// Opens a snapshot of the tenant to be restored from. The first time its memory is read and
    /// compared with what was written.
    ///
    /// # Errors
    /// It is not there, not ready, damaged, or made for another image, machine, processor or thaw.
    pub async fn frozen(
        &self,
        tenant: &TenantId,
        id: &str,
    ) -> Result<(Arc<Frozen>, Manifest), SnapshotError> {
        self.notice_id(id);
        let manifest = {
            let known = self.known();
            let found = known
                .get(id)
                .filter(|entry| entry.manifest.tenant == tenant.0);
            let entry = found.ok_or_else(|| SnapshotError::NotFound(id.to_owned()))?;
            match &entry.status {
                Status::Ready => {}
                Status::Building => return Err(SnapshotError::Building(id.to_owned())),
                Status::Failed(why) => {
                    let (id, why) = (id.to_owned(), why.clone());
                    return Err(SnapshotError::Failed { id, why });
                }
            }
            entry.manifest.clone()
        };
        let unfit = |error: anyhow::Error| SnapshotError::Unfit {
            id: id.to_owned(),
            why: format!("{error:#}"),
        };
        let (dir, ground) = (self.dir(id), self.ground.clone());
        let shelf = self.shelf.clone();
        let chunks = manifest.memory.chunks.iter();
        let names = chunks.map(|chunk| chunk.sha256.as_str());
        let _hand = match shelf.knows(names.chain([manifest.memory.base.as_str()])) {
            true => None,
            false => Some(self.hands.acquire().await.map_err(|e| unfit(e.into()))?),
        };
        let opened = blocking(move || {
            let opened = open_now(&dir, &ground, &shelf);
            // It may have been rebased between the reading of its manifest and of its map.
            opened.or_else(|_| open_now(&dir, &ground, &shelf))
        });
        let (manifest, state, memory) = opened.await.map_err(unfit)?;
        let frozen = Frozen {
            snapshot: id.to_owned(),
            shape: Shape {
                memory_mib: manifest.memory_mib,
                vcpus: manifest.cores,
            },
            state: Arc::new(state),
            memory: Arc::new(memory),
        };
        Ok((Arc::new(frozen), manifest))
    }

    /// Looks for a snapshot that was imported while the server runs.
    fn notice_id(&self, id: &str) {
        if uuid::Uuid::parse_str(id).is_ok_and(|uuid| uuid.to_string() == id) {
            self.notice(&self.dir(id));
        }
    }

    /// Takes what is in a directory into the books, unless it is there or going.
    fn notice(&self, dir: &Path) {
        let mut known = self.known();
        let id = dir.file_name().and_then(|name| name.to_str());
        let Some(id) = id.filter(|id| !known.contains_key(*id)) else {
            return;
        };
        // Under both locks: what is being deleted loses its manifest only after it is noted as leaving.
        if self.leaving().contains(id) || !dir.join(FILE).exists() {
            return;
        }
        match manifest_in(dir) {
            Ok(manifest) => {
                let status = Status::Ready;
                known.insert(id.to_owned(), Entry { manifest, status });
            }
            Err(error) => tracing::debug!("{} is left alone: {error:#}", dir.display()),
        }
    }

    fn leaving(&self) -> MutexGuard<'_, HashSet<String>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dir(&self, id: &str) -> PathBuf {
        snapshots_dir(&self.data_dir).join(id)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn view(&self) -> View {
        View {
            manifest: self.manifest.clone(),
            status: self.status.clone(),
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .context("a background job was cut short")?
}
