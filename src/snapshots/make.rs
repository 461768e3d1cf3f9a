//! Making a snapshot: room for it, the freeze, digests, and its name last.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use nix::sys::statvfs::statvfs;

use super::manifest::{Chunk, FORMAT, MAP, MemoryLayers};
use super::{Entry, FAILURES_TOLD, Kind, Manifest, SnapshotError, Snapshots, Status, blocking};
use crate::image::manifest::Part;
use crate::image::scratch::Scratch;
use crate::layers::{Frost, Kept, PAGE, Shelf};
use crate::session::{SessionId, TenantId, Vm};
use crate::store::now_ms;
use crate::template::cpu::Cpu;
use crate::template::manifest::{FILE, STATE};

pub(super) const MIB: u64 = 1 << 20;

/// Largest state of a VM, as workers bound it.
pub(super) const MOST_STATE: u64 = 4 << 20;

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
    /// vCPUs that were asked for.
    pub vcpus: u32,
    /// vCPUs that it really has: fewer than asked for where the machine or the operator allows no more.
    pub cores: u32,
    /// The snapshot that it was restored from.
    pub parent: Option<String>,
    /// Ids that the VM had before.
    pub aliases: Vec<String>,
    /// The checkpoint that it was taken back to, and when.
    pub rewound: Option<(String, i64)>,
}

impl Snapshots {
    /// Makes room in the books for a snapshot and gives its id. [`Self::make`] must follow.
    ///
    /// # Errors
    /// The tenant has too many or too large ones, or the disk is too full.
    pub fn begin(&self, wish: &Wish) -> Result<String, SnapshotError> {
        let id = uuid::Uuid::new_v4().to_string();
        let mut known = self.known();
        let mine = known.values().filter(|entry| {
            entry.manifest.tenant == wish.tenant.0
                && entry.manifest.kind.counts()
                && !matches!(entry.status, Status::Failed(_))
        });
        let count = mine.count();
        if wish.kind.counts() && count >= self.config.max_per_tenant {
            let limit = self.config.max_per_tenant;
            return Err(SnapshotError::TooMany { limit });
        }
        self.check_bytes(used(&known, &wish.tenant.0, None))?;
        // What the VM was when it was last frozen; before the first time, what it was restored from.
        let since = wish.rewound.as_ref().map_or(i64::MIN, |(_, at)| *at);
        let before = known.values().filter(|entry| {
            let one = &entry.manifest;
            let lasts = one.kind == Kind::User
                || (one.kind, wish.kind) == (Kind::Checkpoint, Kind::Checkpoint);
            let same = one.vm_id == wish.vm_id || wish.aliases.contains(&one.vm_id);
            let mine = same && one.tenant == wish.tenant.0 && one.created_ms >= since;
            entry.status == Status::Ready && lasts && mine
        });
        let last = before.max_by_key(|entry| entry.manifest.created_ms);
        let parent = last.map(|entry| entry.manifest.id.clone());
        let rewound = wish.rewound.as_ref().map(|(to, _)| to.clone());
        let parent = parent.or(rewound).or_else(|| wish.parent.clone());
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
            cores: wish.cores,
            thaw: String::new(),
            sources: String::new(),
            wire: 0,
            cpu: Cpu::default(),
            state: Part::default(),
            memory: MemoryLayers::default(),
            disk_bytes: 0,
            parent,
        };
        let entry = Entry {
            manifest,
            status: Status::Building,
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
        if made.is_err() {
            // Chunks that were written for it are of no use now.
            self.sweep_soon();
        }
        let mut known = self.known();
        match &made {
            Ok(manifest) => {
                if let Some(entry) = known.get_mut(id) {
                    entry.manifest = manifest.clone();
                    entry.status = Status::Ready;
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
        let frost = vm.freeze().await.map_err(SnapshotError::NotMade)?;
        self.check_space(id, &frost)?;
        let (data_dir, shelf) = (self.data_dir.clone(), self.shelf.clone());
        let written = blocking(move || {
            let scratch = Scratch::new(&data_dir)?;
            let hold = shelf.hold()?;
            let kept = frost.keep(&shelf)?;
            manifest.made_here()?;
            let state = state_bytes(&frost)?;
            let map = kept.layers.map.encode();
            manifest.describe(&state, &map, &kept, &shelf)?;
            let out = write(scratch.path(), &state, &map, &manifest)?;
            Ok((scratch, hold, out, manifest))
        });
        let (scratch, hold, out, manifest) = written.await.map_err(SnapshotError::NotMade)?;
        self.check_size(&manifest)?;
        let dir = self.dir(id);
        let published = blocking(move || {
            // Order: the chunks have their names, then the files are whole, then the directory gets its name. Only
            // then may a sweep come: it would take the chunks for garbage before.
            publish(&out, &dir)?;
            drop((hold, scratch));
            Ok(())
        });
        published.await.map_err(SnapshotError::NotMade)?;
        Ok(manifest)
    }

    /// Whether there is room on the disk for what a VM wrote, besides what others that are being made may still take.
    fn check_space(&self, id: &str, frost: &Frost) -> Result<(), SnapshotError> {
        let need = frost.numbers.len() as u64 * PAGE as u64;
        let mut known = self.known();
        let building = known
            .values()
            .filter(|entry| entry.status == Status::Building && entry.manifest.id != id);
        let promised: u64 = building.map(|entry| entry.manifest.disk_bytes).sum();
        if let Some(entry) = known.get_mut(id) {
            entry.manifest.disk_bytes = need;
        }
        let need_mib = (need + promised).div_ceil(MIB);
        let free_mib = free_mib(&self.data_dir).map_err(SnapshotError::NotMade)?;
        let floor_mib = self.config.disk_floor_mib;
        let wanted = need_mib.saturating_add(floor_mib);
        if wanted > free_mib {
            return Err(SnapshotError::NoSpace {
                short_mib: wanted - free_mib,
                need_mib,
                free_mib,
                floor_mib,
            });
        }
        Ok(())
    }

    /// Whether the tenant may keep one more of this size, now that it is known.
    fn check_size(&self, made: &Manifest) -> Result<(), SnapshotError> {
        self.check_bytes(used(&self.known(), &made.tenant, Some(made)))
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

/// Bytes that the tenant's snapshots take, one more included; what several share counts once.
fn used(known: &HashMap<String, Entry>, tenant: &str, more: Option<&Manifest>) -> u64 {
    let ready = known
        .values()
        .filter(|entry| entry.manifest.tenant == tenant && entry.status == Status::Ready);
    let mut chunks = HashMap::new();
    let mut own = 0;
    for manifest in ready.map(|entry| &entry.manifest).chain(more) {
        own += manifest.state.bytes + manifest.memory.map.bytes;
        let named = manifest.memory.chunks.iter();
        chunks.extend(named.map(|chunk| (&chunk.sha256, chunk.bytes)));
    }
    own + chunks.values().sum::<u64>()
}

/// Writes a snapshot's files into a directory of their own, all of it on the disk; gives that.
pub(super) fn write(
    scratch: &Path,
    state: &[u8],
    map: &[u8],
    manifest: &Manifest,
) -> anyhow::Result<PathBuf> {
    let out = scratch.join("snapshot");
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&out)
        .context("cannot make the snapshot's directory")?;
    let put = |name: &str, bytes: &[u8]| {
        let path = out.join(name);
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        file.and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
            .with_context(|| format!("cannot write {}", path.display()))
    };
    put(STATE, state)?;
    put(MAP, map)?;
    manifest.write(&out.join(FILE))?;
    flush_dir(&out)?;
    Ok(out)
}

/// Gives a directory that is whole its name.
pub(super) fn publish(out: &Path, dir: &Path) -> anyhow::Result<()> {
    std::fs::rename(out, dir).with_context(|| format!("cannot make {}", dir.display()))?;
    flush_dir(dir.parent().context("a snapshot is in no directory")?)
}

/// A frozen VM's state; a worker never writes a larger one than it reads.
pub(super) fn state_bytes(frost: &Frost) -> anyhow::Result<Vec<u8>> {
    let length = frost
        .state
        .metadata()
        .context("cannot look at a state")?
        .len();
    anyhow::ensure!(length <= MOST_STATE, "a state has {length} bytes");
    let mut bytes = vec![0; usize::try_from(length)?];
    frost
        .state
        .read_exact_at(&mut bytes, 0)
        .context("cannot read a state")?;
    Ok(bytes)
}

pub(super) fn flush_dir(dir: &Path) -> anyhow::Result<()> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .with_context(|| format!("cannot flush {}", dir.display()))
}

impl Manifest {
    pub(super) fn describe(
        &mut self,
        state: &[u8],
        map: &[u8],
        kept: &Kept,
        shelf: &Shelf,
    ) -> anyhow::Result<()> {
        self.state = Part::of_bytes(state);
        let chunks = kept.layers.files.iter().map(|file| {
            let name = file.digest.clone();
            let sha256 = name.context("pages that are in no chunk")?;
            let bytes = shelf.chunk_bytes(&sha256);
            Ok(Chunk { sha256, bytes })
        });
        self.memory = MemoryLayers {
            bytes: kept.layers.map.pages() * PAGE as u64,
            base: kept.layers.base.sha256.clone(),
            chunks: chunks.collect::<anyhow::Result<_>>()?,
            map: Part::of_bytes(map),
        };
        self.disk_bytes = kept.added + self.state.bytes + map.len() as u64;
        Ok(())
    }
}

/// What this user may still write to the file system, MiB.
pub(super) fn free_mib(dir: &Path) -> anyhow::Result<u64> {
    let found = statvfs(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    Ok(found.blocks_available() * found.fragment_size() / MIB)
}
