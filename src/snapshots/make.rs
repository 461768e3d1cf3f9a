//! Making a snapshot: room for it, the freeze, digests, and its name last.

use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use nix::sys::statvfs::statvfs;

use super::manifest::FORMAT;
use super::{
    Entry, FAILURES_TOLD, Kind, Manifest, SnapshotError, Snapshots, Status, blocking, snapshots_dir,
};
use crate::image::manifest::Part;
use crate::image::scratch::Scratch;
use crate::session::{SessionId, TenantId, Vm};
use crate::store::now_ms;
use crate::template::cpu::Cpu;
use crate::template::manifest::{FILE, MEMORY, MemoryPart, STATE};
use crate::template::memory;

const MIB: u64 = 1 << 20;

/// A snapshot that is wanted.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Who owns it.
    pub tenant: TenantId,
    /// What its owner calls it; empty: its id.
    pub name: String,
    /// What it is there for.
    pub kind: Kind,
    /// The VM.
    pub vm_id: String,
    /// Its session.
    pub session: SessionId,
    /// The VM's memory, MiB.
    pub memory_mib: u32,
    /// The VM's share of the processor.
    pub vcpus: u32,
}

impl Snapshots {
    /// Makes room in the books for a snapshot and gives its id. [`Self::make`] must follow.
    ///
    /// # Errors
    /// The tenant has too many or too large ones, or the disk is too full.
    pub fn begin(&self, wish: &Wish) -> Result<String, SnapshotError> {
        let id = uuid::Uuid::new_v4().to_string();
        let need = u64::from(wish.memory_mib);
        let mut known = self.known();
        let mut count = 0;
        let mut bytes = 0;
        // What others that are being made may still take, besides what the disk shows.
        let mut promised = 0;
        for entry in known.values() {
            if entry.status == Status::Building {
                promised += u64::from(entry.manifest.memory_mib);
            }
            let counts = !matches!(entry.status, Status::Failed(_));
            if entry.manifest.tenant == wish.tenant.0 && counts {
                count += 1;
                bytes += entry.manifest.disk_bytes;
            }
        }
        if count >= self.config.max_per_tenant {
            let limit = self.config.max_per_tenant;
            return Err(SnapshotError::TooMany { limit });
        }
        self.check_bytes(bytes)?;
        let free = free_mib(&self.data_dir).map_err(SnapshotError::NotMade)?;
        let wanted = need + promised + self.config.disk_floor_mib;
        if wanted > free {
            return Err(SnapshotError::NoSpace {
                short_mib: wanted - free,
                need_mib: need + promised,
                free_mib: free,
                floor_mib: self.config.disk_floor_mib,
            });
        }
        let name = if wish.name.is_empty() {
            &id
        } else {
            &wish.name
        };
        let manifest = Manifest {
            format: FORMAT,
            id: id.clone(),
            tenant: wish.tenant.0.clone(),
            name: name.clone(),
            kind: wish.kind,
            vm_id: wish.vm_id.clone(),
            session_id: wish.session.to_string(),
            created_ms: now_ms(),
            image: self.ground.image.clone(),
            image_name: self.ground.image_name.clone(),
            machine: self.ground.machine,
            memory_mib: wish.memory_mib,
            vcpus: wish.vcpus,
            thaw: String::new(),
            sources: String::new(),
            wire: 0,
            cpu: Cpu::default(),
            state: Part::default(),
            memory: MemoryPart::default(),
            disk_bytes: 0,
        };
        let entry = Entry {
            manifest,
            status: Status::Building,
            proved: Arc::new(AtomicBool::new(false)),
        };
        known.insert(id.clone(), entry);
        Ok(id)
    }

    /// Freezes the VM under an id of [`Self::begin`]. The VM goes on running. Must not be dropped
    /// midway: run it in a task of its own.
    ///
    /// # Errors
    /// The VM could not be frozen, the files not be written, or the result is too large to be kept.
    pub async fn make(&self, id: &str, vm: Arc<dyn Vm>) -> Result<Manifest, SnapshotError> {
        let made = self.freeze(id, vm).await;
        let mut known = self.known();
        match &made {
            Ok(manifest) => {
                if let Some(entry) = known.get_mut(id) {
                    entry.manifest = manifest.clone();
                    entry.status = Status::Ready;
                    // Nobody but this server has had its hands on it.
                    entry.proved.store(true, Ordering::Release);
                }
            }
            Err(error) => {
                let cause = match error {
                    SnapshotError::NotMade(cause) => format!("{cause:#}"),
                    other => other.to_string(),
                };
                tracing::warn!(snapshot = id, "a snapshot failed: {cause}");
                if let Some(entry) = known.get_mut(id) {
                    entry.status = Status::Failed(error.to_string());
                }
                let mut failed: Vec<_> = known
                    .values()
                    .filter(|entry| matches!(entry.status, Status::Failed(_)))
                    .map(|entry| (entry.manifest.created_ms, entry.manifest.id.clone()))
                    .collect();
                failed.sort_unstable();
                let old = failed.len().saturating_sub(FAILURES_TOLD);
                for (_, id) in failed.into_iter().take(old) {
                    known.remove(&id);
                }
            }
        }
        made
    }

    async fn freeze(&self, id: &str, vm: Arc<dyn Vm>) -> Result<Manifest, SnapshotError> {
        let _hand = self
            .hands
            .acquire()
            .await
            .map_err(|error| SnapshotError::NotMade(error.into()))?;
        let mut manifest = {
            let known = self.known();
            let entry = known.get(id);
            let entry = entry.ok_or_else(|| SnapshotError::NotFound(id.to_owned()))?;
            entry.manifest.clone()
        };
        let data_dir = self.data_dir.clone();
        let prepared = blocking(move || {
            let scratch = Scratch::new(&data_dir)?;
            let out = scratch.path().join("snapshot");
            std::fs::DirBuilder::new()
                .mode(0o700)
                .create(&out)
                .context("cannot make the snapshot's directory")?;
            let state = create(&out.join(STATE))?;
            let memory = create(&out.join(MEMORY))?;
            Ok((scratch, out, state, memory))
        });
        let (scratch, out, state, memory) = prepared.await.map_err(SnapshotError::NotMade)?;
        vm.save(state, memory)
            .await
            .map_err(SnapshotError::NotMade)?;
        let measured = blocking(move || {
            let (state, memory) = (out.join(STATE), out.join(MEMORY));
            let file = File::open(&memory).context("cannot open the memory file")?;
            manifest.made_here()?;
            manifest.state = Part::of_file(&state)?;
            manifest.memory = memory::measure(&file)?;
            let blocks = file.metadata().context("cannot look at the memory file")?;
            manifest.disk_bytes = blocks.blocks() * 512 + manifest.state.bytes;
            for path in [&state, &memory] {
                File::open(path)
                    .and_then(|file| file.sync_all())
                    .with_context(|| format!("cannot flush {}", path.display()))?;
            }
            manifest.write(&out.join(FILE))?;
            Ok((scratch, out, manifest))
        });
        let (scratch, out, manifest) = measured.await.map_err(SnapshotError::NotMade)?;
        self.check_size(&manifest)?;
        let dir = self.dir(id);
        let parent = snapshots_dir(&self.data_dir);
        let published = blocking(move || {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
            File::open(&out)
                .and_then(|dir| dir.sync_all())
                .context("cannot flush the snapshot's directory")?;
            std::fs::rename(&out, &dir)
                .with_context(|| format!("cannot make {}", dir.display()))?;
            File::open(&parent)
                .and_then(|dir| dir.sync_all())
                .with_context(|| format!("cannot flush {}", parent.display()))?;
            drop(scratch);
            Ok(())
        });
        published.await.map_err(SnapshotError::NotMade)?;
        Ok(manifest)
    }

    /// Whether the tenant may keep one more of this size, now that it is known.
    fn check_size(&self, made: &Manifest) -> Result<(), SnapshotError> {
        let known = self.known();
        let mine = known
            .values()
            .filter(|entry| entry.manifest.tenant == made.tenant && entry.status == Status::Ready);
        let bytes: u64 = mine.map(|entry| entry.manifest.disk_bytes).sum();
        self.check_bytes(bytes + made.disk_bytes)
    }

    fn check_bytes(&self, bytes: u64) -> Result<(), SnapshotError> {
        let limit_mib = self.config.max_mib_per_tenant;
        if bytes > limit_mib.saturating_mul(MIB) {
            let used_mib = bytes.div_ceil(MIB);
            return Err(SnapshotError::TooLarge {
                used_mib,
                limit_mib,
            });
        }
        Ok(())
    }
}

fn create(path: &Path) -> anyhow::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot make {}", path.display()))
}

/// What this user may still write to the file system, MiB.
fn free_mib(dir: &Path) -> anyhow::Result<u64> {
    let found = statvfs(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    Ok(found.blocks_available() * found.fragment_size() / MIB)
}
