//! Snapshots without VMs: what is on the disk, and who may have how much of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use thaw_wire::message::{Execute, Process, Renew};

use super::*;
use crate::layers::tests::frost;
use crate::layers::{Base, Frost, Layers, PAGE, memory_file};
use crate::session::{Channel, Run, SessionId, Vm, VmFigures};
pub(super) use crate::vms::tests::ground;

/// A VM that can be frozen and nothing else.
#[derive(Debug)]
struct Still {
    pages: usize,
}

impl Vm for Still {
    fn renew(&self, _: Renew) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async { anyhow::bail!("it only stands still") })
    }
    fn execute(&self, _: Execute) -> BoxFuture<'_, anyhow::Result<Box<dyn Run>>> {
        Box::pin(async { anyhow::bail!("it only stands still") })
    }
    fn open(&self, _: Process) -> BoxFuture<'_, anyhow::Result<Channel>> {
        Box::pin(async { anyhow::bail!("it only stands still") })
    }
    fn freeze(&self) -> BoxFuture<'_, anyhow::Result<Frost>> {
        Box::pin(async move {
            anyhow::ensure!(self.pages > 0, "it does not hold still");
            let memory = memory_file("base")?;
            memory.set_len(64 << 20)?;
            for page in [5, 700, (64 << 8) - 1] {
                memory.write_all_at(&[7; PAGE], page * PAGE as u64)?;
            }
            let sha256 = crate::template::memory::measure(&memory)?.sha256;
            let base = Arc::new(Base {
                file: Arc::new(memory),
                sha256,
                path: None,
            });
            // As much of it as was asked for, and nothing that another one has.
            static NEXT: AtomicU8 = AtomicU8::new(1);
            let byte = NEXT.fetch_add(1, Ordering::Relaxed);
            let wrote: Vec<(u64, u8)> = (0..self.pages as u64).map(|page| (page, byte)).collect();
            Ok(frost(&Arc::new(Layers::whole(base)?), &wrote))
        })
    }
    fn figures(&self) -> BoxFuture<'_, anyhow::Result<VmFigures>> {
        Box::pin(async { Ok(VmFigures::default()) })
    }
    fn set_share(&self, _: u32) {}
    fn died(&self) -> BoxFuture<'static, String> {
        Box::pin(std::future::pending())
    }
    fn end(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

pub(super) fn config() -> SnapshotConfig {
    SnapshotConfig {
        disk_floor_mib: 0,
        max_per_tenant: 3,
        max_mib_per_tenant: 2,
        ..SnapshotConfig::default()
    }
}

pub(super) fn tenant(name: &str) -> TenantId {
    TenantId(name.into())
}

fn wish(owner: &str) -> Wish {
    Wish {
        tenant: tenant(owner),
        name: String::new(),
        kind: Kind::User,
        vm_id: "vm".into(),
        session: SessionId::mint(),
        memory_mib: 64,
        vcpus: 1,
        cores: 1,
        parent: None,
        aliases: Vec::new(),
        rewound: None,
    }
}

pub(super) async fn make(
    snapshots: &Snapshots,
    owner: &str,
    pages: usize,
) -> Result<String, SnapshotError> {
    let id = snapshots.begin(&wish(owner))?;
    snapshots.make(&id, Arc::new(Still { pages })).await?;
    Ok(id)
}

#[tokio::test]
async fn what_was_frozen_is_found_by_its_owner_and_by_the_next_server() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(dir.path(), ground(), config()).unwrap();
    let id = make(&snapshots, "a", 10).await.unwrap();
    let view = snapshots.get(&tenant("a"), &id).unwrap();
    assert_eq!(
        (view.status, view.manifest.name.as_str()),
        (Status::Ready, &*id)
    );
    assert!(view.manifest.disk_bytes < 1 << 20, "{:?}", view.manifest);
    assert!(snapshots.get(&tenant("b"), &id).is_err());
    assert!(snapshots.frozen(&tenant("b"), &id).await.is_err());
    let next = Snapshots::open(dir.path(), ground(), config()).unwrap();
    let (frozen, _) = next.frozen(&tenant("a"), &id).await.unwrap();
    assert_eq!(frozen.memory.map.pages(), 64 << 8);
    next.delete(&tenant("a"), &id).await.unwrap();
    assert!(!next.has(&id) && !next.dir(&id).exists());
    assert_eq!(
        std::fs::read_dir(dir.path().join("tmp")).unwrap().count(),
        0
    );
}

#[tokio::test]
async fn what_does_not_fit_here_or_is_damaged_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(dir.path(), ground(), config()).unwrap();
    let id = make(&snapshots, "a", 10).await.unwrap();
    let why = async |ground: Ground| {
        let next = Snapshots::open(dir.path(), ground, config()).unwrap();
        next.frozen(&tenant("a"), &id)
            .await
            .unwrap_err()
            .to_string()
    };
    let mut other = ground();
    other.image = "sha256-2".into();
    assert!(why(other).await.contains("image"));
    let mut other = ground();
    other.machine = thaw_vmm::machine::MachineKind::Hvm;
    assert!(why(other).await.contains("hvm"));
    let chunk = &snapshots
        .get(&tenant("a"), &id)
        .unwrap()
        .manifest
        .memory
        .chunks[0];
    let chunks = snapshots_dir(dir.path()).join("chunks");
    let file = File::options()
        .write(true)
        .open(chunks.join(chunk.sha256.as_str()))
        .unwrap();
    file.write_all_at(b"damage", 3 * 4096).unwrap();
    assert!(why(ground()).await.contains("damaged"));
    // What this server made itself, it trusts.
    assert!(snapshots.frozen(&tenant("a"), &id).await.is_ok());
}

#[tokio::test]
async fn numbers_sizes_and_the_disk_are_bounds_and_failures_count_for_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(dir.path(), ground(), config()).unwrap();
    let failed = make(&snapshots, "a", 0).await.unwrap_err();
    assert!(matches!(failed, SnapshotError::NotMade(_)));
    let told = snapshots.list(&tenant("a"));
    assert!(matches!(told[0].status, Status::Failed(_)));
    let large = make(&snapshots, "a", 600).await.unwrap_err();
    assert!(
        matches!(large, SnapshotError::TooLarge { limit_mib: 2, .. }),
        "{large}"
    );
    for _ in 0..3 {
        make(&snapshots, "a", 10).await.unwrap();
    }
    let many = make(&snapshots, "a", 10).await.unwrap_err();
    assert!(matches!(many, SnapshotError::TooMany { limit: 3 }));
    make(&snapshots, "b", 10).await.unwrap();
    let full = SnapshotConfig {
        disk_floor_mib: 1 << 40,
        ..config()
    };
    let tight = Snapshots::open(dir.path(), ground(), full).unwrap();
    let said = make(&tight, "c", 10).await.unwrap_err().to_string();
    assert!(
        said.contains("MiB short") && said.contains("take 1 MiB"),
        "{said}"
    );
    assert_eq!(directories(&snapshots_dir(dir.path())).unwrap().len(), 4);
    // The one that was too large left nothing either.
    let chunks = snapshots_dir(dir.path()).join("chunks");
    assert_eq!(std::fs::read_dir(chunks).unwrap().count(), 4);
}

#[tokio::test]
async fn the_next_server_removes_what_a_killed_one_left_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(dir.path(), ground(), config()).unwrap();
    let (kept, gone) = (
        make(&snapshots, "a", 10).await,
        make(&snapshots, "a", 10).await,
    );
    let (kept, gone) = (kept.unwrap(), gone.unwrap());
    // Killed between the removal of a manifest and of the rest, and while a chunk was written.
    std::fs::remove_file(snapshots.dir(&gone).join(FILE)).unwrap();
    let chunks = snapshots_dir(dir.path()).join("chunks");
    std::fs::write(chunks.join(".new-x"), b"half").unwrap();
    let next = Snapshots::open(dir.path(), ground(), config()).unwrap();
    assert!(next.has(&kept) && !next.dir(&gone).exists());
    assert_eq!(std::fs::read_dir(&chunks).unwrap().count(), 1);
    assert!(next.frozen(&tenant("a"), &kept).await.is_ok());
    next.delete(&tenant("a"), &kept).await.unwrap();
    next.sweep_now().await;
    assert_eq!(std::fs::read_dir(&chunks).unwrap().count(), 0);
}

#[tokio::test]
async fn what_only_a_record_could_name_goes_when_none_does() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(dir.path(), ground(), config()).unwrap();
    let freeze = async |kind| {
        let id = snapshots.begin(&Wish { kind, ..wish("a") }).unwrap();
        let made = snapshots.make(&id, Arc::new(Still { pages: 2 })).await;
        made.unwrap().id
    };
    let (asked, parked) = (freeze(Kind::User).await, freeze(Kind::Suspended).await);
    let orphan = freeze(Kind::Hibernated).await;
    let next = Snapshots::open(dir.path(), ground(), config()).unwrap();
    next.remove_unnamed(&HashSet::from([parked.clone()]));
    assert!(next.has(&asked) && next.has(&parked) && !next.has(&orphan));
    assert!(!next.dir(&orphan).exists());
}

#[tokio::test]
async fn a_manifest_that_cannot_be_read_keeps_neither_the_server_down_nor_chunks_from_staying() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(dir.path(), ground(), config()).unwrap();
    let (broken, whole) = (
        make(&snapshots, "a", 10).await,
        make(&snapshots, "a", 10).await,
    );
    let (broken, whole) = (broken.unwrap(), whole.unwrap());
    let manifest = snapshots.dir(&broken).join(FILE);
    let said = std::fs::read(&manifest).unwrap();
    std::fs::write(&manifest, b"{").unwrap();
    let next = Snapshots::open(dir.path(), ground(), config()).unwrap();
    assert!(next.has(&whole) && !next.has(&broken));
    next.delete(&tenant("a"), &whole).await.unwrap();
    std::fs::write(&manifest, said).unwrap();
    let mended = Snapshots::open(dir.path(), ground(), config()).unwrap();
    assert!(mended.frozen(&tenant("a"), &broken).await.is_ok());
}

#[tokio::test]
async fn one_that_is_being_made_cannot_be_used_yet() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(dir.path(), ground(), config()).unwrap();
    let id = snapshots.begin(&wish("a")).unwrap();
    assert_eq!(
        snapshots.get(&tenant("a"), &id).unwrap().status,
        Status::Building
    );
    let early = snapshots.frozen(&tenant("a"), &id).await;
    assert!(matches!(early, Err(SnapshotError::Building(_))));
    let early = snapshots.delete(&tenant("a"), &id).await;
    assert!(matches!(early, Err(SnapshotError::Building(_))));
    let vm: Arc<dyn Vm> = Arc::new(Still { pages: 1 });
    let made = tokio::time::timeout(Duration::from_secs(30), snapshots.make(&id, vm)).await;
    made.unwrap().unwrap();
    assert!(snapshots.has(&id));
}

#[tokio::test]
async fn a_rebased_snapshot_is_the_same_memory_over_another_base() {
    let dir = tempfile::tempdir().unwrap();
    let server = Snapshots::open(dir.path(), ground(), config()).unwrap();
    let id = make(&server, "a", 100).await.unwrap();
    let pages = |frozen: &Frozen| {
        let all = 0..frozen.memory.map.pages();
        let read = |page| {
            let mut bytes = [0; PAGE];
            frozen.memory.read(page, &mut bytes).unwrap();
            bytes
        };
        all.map(read).collect::<Vec<_>>()
    };
    let before = pages(&server.frozen(&tenant("a"), &id).await.unwrap().0);
    // Has some of what the snapshot has, and other things where the snapshot has zeroes or its old base's.
    let file = memory_file("base").unwrap();
    file.set_len(64 << 20).unwrap();
    file.write_all_at(&before[50], 50 * PAGE as u64).unwrap();
    for page in [5, 200, 700] {
        file.write_all_at(&[9; PAGE], page * PAGE as u64).unwrap();
    }
    let sha256 = crate::template::memory::measure(&file).unwrap().sha256;
    let (file, path) = (Arc::new(file), None);
    let base = Arc::new(Base { file, sha256, path });
    let catalog = Catalog::open(dir.path()).unwrap();
    let one = catalog.find(&id).unwrap();
    let done = catalog.rebase(dir.path(), one, &base, 0, |_| {}).unwrap();
    // Pages 200, 700 and the last: 5 lies in a chunk.
    assert_eq!((done.was_there, done.pages), (false, 3));
    let (after, manifest) = server.frozen(&tenant("a"), &id).await.unwrap();
    assert_eq!(manifest.memory.base, base.sha256);
    assert!(pages(&after) == before);
    let catalog = Catalog::open(dir.path()).unwrap();
    let one = catalog.find(&id).unwrap();
    assert_eq!(catalog.verify(one, |_| {}).unwrap(), []);
    assert!(
        catalog
            .rebase(dir.path(), one, &base, 0, |_| {})
            .unwrap()
            .was_there
    );
    server.sweep_now().await;
    let bases = snapshots_dir(dir.path()).join("bases");
    assert_eq!(std::fs::read_dir(bases).unwrap().count(), 1);
}
