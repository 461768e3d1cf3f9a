//! Snapshots of VMs with their memory: made, kept, given to be restored from, removed.
//!
//! On disk, below the data directory, `snapshots/<id>/` holds `manifest.json`, `state` and `memory`,
//! as a template's directory does. It gets its name when everything in it is on the disk, so what
//! is there is whole. The directories are the truth; what is being made or has failed is known
//! in memory only.

mod make;
pub mod manifest;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use tokio::sync::Semaphore;

pub use make::Wish;
pub use manifest::{Ground, Kind, Manifest};

use crate::config::SnapshotConfig;
use crate::image::manifest::Part;
use crate::session::{Frozen, Shape, TenantId};
use crate::template::manifest::{FILE, MEMORY, STATE};
use crate::template::memory;

/// Snapshots that failed are told of until this many more have.
const FAILURES_TOLD: usize = 100;

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// There is none by this id that this tenant owns.
    #[error("no snapshot {0}")]
    NotFound(String),
    /// The tenant has as many as one may have.
    #[error("{limit} snapshots are the most one user may have; delete one first")]
    TooMany {
        /// The configured number.
        limit: usize,
    },
    /// The tenant's snapshots take as much as they may.
    #[error("your snapshots take {used_mib} MiB and {limit_mib} MiB are allowed; delete one first")]
    TooLarge {
        /// What they take, this one included.
        used_mib: u64,
        /// The configured number.
        limit_mib: u64,
    },
    /// The disk is too full.
    #[error(
        "the disk is {short_mib} MiB short: a snapshot of this VM may take {need_mib} MiB, {free_mib} MiB are free and \
         {floor_mib} MiB stay free; delete snapshots or ask the operator for space"
    )]
    NoSpace {
        /// What is missing.
        short_mib: u64,
        /// What it may take.
        need_mib: u64,
        /// What is free.
        free_mib: u64,
        /// What stays free.
        floor_mib: u64,
    },
    /// It is still being made.
    #[error("snapshot {0} is still being made; try again when its status is ready")]
    Building(String),
    /// It could not be made.
    #[error("snapshot {id} failed: {why}")]
    Failed {
        /// Its id.
        id: String,
        /// Why.
        why: String,
    },
    /// It cannot be restored here.
    #[error("snapshot {id} cannot be restored: {why}")]
    Unfit {
        /// Its id.
        id: String,
        /// Why.
        why: String,
    },
    /// The VM could not be frozen, or the files not be written.
    #[error("the VM could not be frozen: {}", public(.0))]
    NotMade(anyhow::Error),
}

/// What of a failure is for the one who asked: what the VM said. The rest is the operator's.
fn public(error: &anyhow::Error) -> String {
    match error.downcast_ref::<crate::worker::WorkerError>() {
        Some(said) => said.to_string(),
        None => "the operator's log has the reason".to_owned(),
    }
}

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
    /// Its memory has been read and found as it was written.
    proved: Arc<AtomicBool>,
}

/// All snapshots. Cheap to share by an [`Arc`].
#[derive(Debug)]
pub struct Snapshots {
    data_dir: PathBuf,
    ground: Ground,
    config: SnapshotConfig,
    known: Mutex<HashMap<String, Entry>>,
    /// Each one being made or proved keeps a core and the disk busy.
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
        let mut known = HashMap::new();
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => Some(entries),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", dir.display()));
            }
        };
        for entry in entries.into_iter().flatten() {
            let path = entry
                .with_context(|| format!("cannot read {}", dir.display()))?
                .path();
            match Manifest::read(&path.join(FILE)) {
                Ok(manifest) if path.file_name().is_some_and(|name| *name == *manifest.id) => {
                    let entry = Entry {
                        manifest,
                        status: Status::Ready,
                        proved: Arc::default(),
                    };
                    known.insert(entry.manifest.id.clone(), entry);
                }
                Ok(manifest) => tracing::warn!(
                    "{} says that it is snapshot {}; it is left alone",
                    path.display(),
                    manifest.id
                ),
                Err(error) => {
                    tracing::warn!("{} is left alone: {error:#}", path.display());
                }
            }
        }
        Ok(Self {
            data_dir: data_dir.to_path_buf(),
            ground,
            hands: Semaphore::new(config.concurrency.max(1)),
            config,
            known: Mutex::new(known),
        })
    }

    /// The tenant's own snapshots, newest first.
    pub fn list(&self, tenant: &TenantId) -> Vec<View> {
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
        let known = self.known();
        let found = known
            .get(id)
            .filter(|entry| entry.manifest.tenant == tenant.0 && entry.manifest.kind == Kind::User);
        found
            .map(Entry::view)
            .ok_or_else(|| SnapshotError::NotFound(id.to_owned()))
    }

    /// Whether there is something by this id to be restored.
    pub fn has(&self, id: &str) -> bool {
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
            entry
                .ok_or_else(|| SnapshotError::NotFound(id.to_owned()))?
                .manifest
        };
        let dir = self.dir(id);
        let removed = blocking(move || match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", dir.display()))
            }
            _ => Ok(()),
        });
        removed.await.map_err(SnapshotError::NotMade)?;
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
        let (manifest, proved) = {
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
            (entry.manifest.clone(), entry.proved.clone())
        };
        let unfit = |error: anyhow::Error| SnapshotError::Unfit {
            id: id.to_owned(),
            why: format!("{error:#}"),
        };
        let permit = match proved.load(Ordering::Acquire) {
            true => None,
            false => Some(self.hands.acquire().await.map_err(|e| unfit(e.into()))?),
        };
        let (dir, ground, checked) = (self.dir(id), self.ground.clone(), manifest.clone());
        let opened = blocking(move || {
            checked.check(&ground)?;
            let open = |name: &str| {
                File::open(dir.join(name)).with_context(|| format!("its {name} cannot be opened"))
            };
            let files = (open(STATE)?, open(MEMORY)?);
            if !proved.load(Ordering::Acquire) {
                let whole = Part::of_file(&dir.join(STATE))? == checked.state
                    && memory::measure(&files.1)? == checked.memory;
                anyhow::ensure!(whole, "its files are damaged; delete it and make another");
                proved.store(true, Ordering::Release);
            }
            Ok(files)
        });
        let (state, memory) = opened.await.map_err(unfit)?;
        drop(permit);
        let frozen = Frozen {
            snapshot: id.to_owned(),
            shape: Shape {
                memory_mib: manifest.memory_mib,
                vcpus: manifest.vcpus,
            },
            state,
            memory,
        };
        Ok((Arc::new(frozen), manifest))
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
