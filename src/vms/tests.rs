//! VMs on fake guests, with a real store and real files.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use thaw_vmm::machine::MachineKind;

use super::*;
use crate::config::{AuditConfig, SnapshotConfig};
use crate::session::NoRows;
use crate::session::PlanLimits;
use crate::session::tests::fake::Source;
use crate::session::tests::unpooled;
use crate::snapshots::Ground;
use crate::store::{Store, scratch};

pub(crate) const PLAN: PlanLimits = PlanLimits { max_vms: 10 };

pub(crate) fn ground() -> Ground {
    Ground {
        image: "sha256-1".into(),
        image_name: "minimal".into(),
        machine: MachineKind::Pv,
    }
}

/// A server's VMs without its front end.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) vms: Vms,
    pub(crate) source: Arc<Source>,
}

impl World {
    pub(crate) async fn over(dir: &Path, store: Store) -> Self {
        let config = SnapshotConfig {
            disk_floor_mib: 0,
            ..SnapshotConfig::default()
        };
        let snapshots = Arc::new(Snapshots::open(dir, ground(), config).unwrap());
        let audit = Audit::start(store.clone(), AuditConfig::default());
        let ledger = Ledger::open(store, audit, snapshots, 10).await.unwrap();
        let source = Arc::new(Source::default());
        let mut metrics = Registry::default();
        let sessions = Sessions::with_watch(
            unpooled(),
            Arc::new(NoRows),
            source.clone(),
            ledger.clone(),
            &mut metrics,
        );
        let vms = Vms::new(sessions.await.unwrap(), ledger, Duration::from_millis(200));
        Self { vms, source }
    }

    async fn make(&self) -> VmRecord {
        self.try_make(wanted()).await.unwrap()
    }

    async fn try_make(&self, new: NewVm) -> Result<VmRecord, VmError> {
        self.vms.create(&tenant(), PLAN, new, true).await
    }
}

fn tenant() -> TenantId {
    TenantId("a".into())
}

fn wanted() -> NewVm {
    NewVm {
        session: None,
        spec: SessionSpec {
            lifetime: Duration::from_secs(300),
            memory_mib: 512,
            vcpus: 1,
            metadata: BTreeMap::new(),
            env: BTreeMap::new(),
        },
        options: Options::default(),
        snapshot: None,
        memory_asked: false,
    }
}

#[tokio::test]
async fn a_suspended_vm_is_resumed_under_a_new_id_and_found_by_all_of_them() {
    let (dir, store) = scratch();
    let world = World::over(dir.path(), store).await;
    let vms = &world.vms;
    let first = world.make().await;
    let parked = vms.suspend(&tenant(), &first.vm_id).await.unwrap();
    assert_eq!(parked.status, Status::Suspended);
    let second = vms
        .resume(&tenant(), PLAN, &first.vm_id, true)
        .await
        .unwrap();
    assert_eq!(second.aliases, std::slice::from_ref(&first.vm_id));
    vms.suspend(&tenant(), &first.vm_id).await.unwrap();
    let third = vms
        .resume(&tenant(), PLAN, &second.vm_id, true)
        .await
        .unwrap();
    for id in [&first.vm_id, &second.vm_id, &third.vm_id] {
        let found = vms.get(&tenant(), id).unwrap();
        assert_eq!(
            (found.vm_id.as_str(), found.status),
            (&*third.vm_id, Status::Active)
        );
    }
    assert_eq!(vms.list(&tenant(), false).len(), 1);
    assert!(vms.get(&TenantId("b".into()), &third.vm_id).is_err());
    let again = vms.resume(&tenant(), PLAN, &third.vm_id, true).await;
    assert!(matches!(again, Err(VmError::State(_))));
}

#[tokio::test]
async fn a_vm_that_does_not_come_to_be_leaves_a_failed_record_and_no_session() {
    let (dir, store) = scratch();
    let world = World::over(dir.path(), store).await;
    *world.source.failing.lock().unwrap() = Some("no template".into());
    let refused = world.try_make(wanted()).await;
    assert!(matches!(refused, Err(VmError::Session(_))), "{refused:?}");
    let records = world.vms.list(&tenant(), false);
    assert_eq!((records.len(), records[0].status), (1, Status::Failed));
    assert!(world.vms.sessions().of_tenant(&tenant()).is_empty());
}

#[tokio::test]
async fn a_restored_vm_that_does_not_confirm_its_identity_serves_nobody() {
    let (dir, store) = scratch();
    let world = World::over(dir.path(), store).await;
    let vm = world.make().await;
    world.vms.suspend(&tenant(), &vm.vm_id).await.unwrap();
    world
        .source
        .liars
        .store(1, std::sync::atomic::Ordering::SeqCst);
    let refused = world.vms.resume(&tenant(), PLAN, &vm.vm_id, true).await;
    assert!(matches!(refused, Err(VmError::Session(_))), "{refused:?}");
    // It is as it was, and comes back by another try.
    let still = world.vms.get(&tenant(), &vm.vm_id).unwrap();
    assert_eq!(still.status, Status::Suspended);
    let back = world
        .vms
        .resume(&tenant(), PLAN, &vm.vm_id, true)
        .await
        .unwrap();
    assert_eq!(back.status, Status::Active);
}

#[tokio::test]
async fn the_next_server_finds_what_this_one_left() {
    let (dir, store) = scratch();
    let world = World::over(dir.path(), store.clone()).await;
    let (running, parked) = (world.make().await, world.make().await);
    world.vms.suspend(&tenant(), &parked.vm_id).await.unwrap();
    world.vms.settle().await;
    let next = World::over(dir.path(), store.clone()).await;
    let status = |world: &World, id: &str| world.vms.get(&tenant(), id).unwrap().status;
    assert_eq!(status(&next, &running.vm_id), Status::Failed);
    assert_eq!(status(&next, &parked.vm_id), Status::Suspended);
    std::fs::remove_dir_all(dir.path().join("snapshots")).unwrap();
    let bare = World::over(dir.path(), store).await;
    assert_eq!(status(&bare, &parked.vm_id), Status::Failed);
}

#[tokio::test]
async fn a_suspended_vm_sleeps_on_unless_commands_may_wake_it() {
    let (dir, store) = scratch();
    let world = World::over(dir.path(), store).await;
    let vm = world.make().await;
    let (vms, session) = (&world.vms, vm.session().unwrap());
    vms.suspend(&tenant(), &vm.vm_id).await.unwrap();
    let asleep = vms.sessions().say_as(&tenant(), &session, "count").await;
    assert!(matches!(asleep, Err(SessionError::Asleep(_))));
    let change = VmChange {
        auto_resume: Some(true),
        ..VmChange::default()
    };
    vms.update(&tenant(), &vm.vm_id, change).await.unwrap();
    let awake = vms.sessions().say_as(&tenant(), &session, "say x").await;
    let awake = awake.unwrap();
    assert_eq!((awake.stdout.as_str(), awake.vm_restarted), ("x", false));
    let woken = vms.get(&tenant(), &vm.vm_id).unwrap();
    assert_eq!(woken.status, Status::Active);
    assert_ne!(woken.vm_id, vm.vm_id);
}

#[tokio::test]
async fn old_records_are_forgotten() {
    let (dir, store) = scratch();
    let world = World::over(dir.path(), store).await;
    for _ in 0..15 {
        let vm = world.make().await;
        world.vms.delete(&tenant(), &vm.vm_id).await.unwrap();
    }
    let left = world.vms.list(&tenant(), false).len();
    assert!((10..=11).contains(&left), "{left}");
}

#[tokio::test]
async fn two_who_resume_at_once_get_one_vm() {
    let (dir, store) = scratch();
    let world = World::over(dir.path(), store).await;
    let vm = world.make().await;
    world.vms.suspend(&tenant(), &vm.vm_id).await.unwrap();
    let owner = tenant();
    let (a, b) = tokio::join!(
        world.vms.resume(&owner, PLAN, &vm.vm_id, true),
        world.vms.resume(&owner, PLAN, &vm.vm_id, true),
    );
    assert_eq!([a.is_ok(), b.is_ok()].iter().filter(|ok| **ok).count(), 1);
    assert_eq!(world.vms.list(&tenant(), true).len(), 1);
}

#[tokio::test]
async fn a_vm_that_is_deleted_while_it_is_resumed_does_not_come_back() {
    let (dir, store) = scratch();
    let world = World::over(dir.path(), store).await;
    let vm = world.make().await;
    world.vms.suspend(&tenant(), &vm.vm_id).await.unwrap();
    *world.source.restore_takes.lock().unwrap() = Duration::from_millis(200);
    let going = world.vms.resume(&tenant(), PLAN, &vm.vm_id, false).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let ended = world.vms.delete(&tenant(), &vm.vm_id).await.unwrap();
    assert_eq!(ended.status, Status::Terminated);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert!(world.vms.list(&tenant(), true).is_empty());
    assert_eq!((world.source.started(), world.source.ended()), (2, 2));
    assert!(going.unwrap().status == Status::Creating);
}

#[tokio::test]
async fn a_vm_that_dies_right_after_it_was_frozen_can_be_resumed() {
    let (dir, store) = scratch();
    let world = World::over(dir.path(), store).await;
    let vm = world.make().await;
    let session = vm.session().unwrap();
    let guest = world.source.vm(0);
    let (ledger, record) = (world.vms.ledger.clone(), vm.clone());
    let save = move |vm| -> futures_util::future::BoxFuture<'static, Result<(), SessionError>> {
        Box::pin(async move {
            let kind = crate::snapshots::Kind::Suspended;
            let parked = ledger.freeze(&record, kind, None, vm).await.unwrap();
            ledger.change(&record.vm_id, |record| {
                record.parked_in = Some(parked.id);
                record.close(Status::Suspended, None, 1);
            });
            guest.die("kernel panic");
            tokio::time::sleep(Duration::from_millis(100)).await;
            Ok(())
        })
    };
    let (owner, wait) = (tenant(), Duration::from_secs(1));
    let suspended = world
        .vms
        .sessions()
        .suspend(&owner, &session, &vm.vm_id, wait, save);
    suspended.await.unwrap();
    let back = world
        .vms
        .resume(&tenant(), PLAN, &vm.vm_id, true)
        .await
        .unwrap();
    assert_eq!(back.aliases, std::slice::from_ref(&vm.vm_id));
    let after = world
        .vms
        .sessions()
        .say_as(&tenant(), &session, "say x")
        .await;
    assert!(!after.unwrap().vm_restarted);
}

#[tokio::test]
async fn a_fork_is_as_many_vms_as_there_is_room_for_and_the_source_runs_on() {
    let (dir, store) = scratch();
    let world = World::over(dir.path(), store).await;
    let vm = world.make().await;
    let few = PlanLimits { max_vms: 4 };
    let (owner, stranger) = (tenant(), TenantId("b".into()));
    let forked = world.vms.fork(&owner, few, &vm.vm_id, 5, true);
    let forked = forked.await.unwrap();
    let made: Vec<_> = forked
        .copies
        .iter()
        .filter_map(|copy| copy.as_ref().ok())
        .collect();
    assert_eq!((made.len(), forked.copies.len()), (3, 5));
    let full = forked.copies.iter().filter_map(|copy| copy.as_ref().err());
    for error in full {
        assert!(
            matches!(error, VmError::Session(SessionError::PlanFull { .. })),
            "{error}"
        );
    }
    let mut sessions: Vec<_> = made.iter().map(|vm| vm.session_id.clone()).collect();
    sessions.push(vm.session_id.clone());
    sessions.sort();
    sessions.dedup();
    assert_eq!(sessions.len(), 4);
    assert_eq!(
        world.vms.get(&tenant(), &vm.vm_id).unwrap().status,
        Status::Active
    );
    let other = world.vms.fork(&stranger, PLAN, &vm.vm_id, 1, true);
    assert!(matches!(other.await, Err(VmError::NotFound(_))));
}
