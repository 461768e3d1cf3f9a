//! A session's VM: lifetime, death, kill, plan, drain, restart of the server.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use prometheus_client::registry::Registry;

use super::super::*;
use super::fake::Source;
use super::{PLAN, command, sleep_ms, spec, start, tenant, unpooled};

fn status(sessions: &Sessions, id: &SessionId) -> Option<VmStatus> {
    Some(sessions.view(&tenant(), id).unwrap().vm?.1)
}

#[tokio::test(start_paused = true)]
async fn a_vm_lives_exactly_its_lifetime_and_the_next_command_gets_a_fresh_one() {
    let (sessions, source) = start(unpooled()).await;
    let short = SessionSpec {
        lifetime: Duration::from_secs(20),
        ..spec()
    };
    let id = sessions.create(&tenant(), PLAN, short).await.unwrap();
    assert_eq!(status(&sessions, &id), None);
    sessions.say(&id, "say x").await;
    let view = sessions.view(&tenant(), &id).unwrap();
    assert_eq!(view.expires_in, Some(Duration::from_secs(20)));
    sleep_ms(19_999).await;
    assert_eq!(sessions.say(&id, "count").await.stdout, "2");
    assert_eq!(status(&sessions, &id), Some(VmStatus::Active));
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(status(&sessions, &id), Some(VmStatus::Killed));
    let next = sessions.say(&id, "count").await;
    assert_eq!((next.stdout.as_str(), next.vm_restarted), ("1", true));
    sleep_ms(100).await;
    assert_eq!((source.started(), source.ended()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_command_under_way_at_the_end_of_the_lifetime_returns_what_it_wrote() {
    let (sessions, _) = start(unpooled()).await;
    let id = sessions.make().await;
    sessions.say(&id, "say x").await;
    sleep_ms(290_000).await;
    let outcome = sessions.say(&id, "say partial; stuck").await;
    assert_eq!(
        (outcome.stdout.as_str(), outcome.exit_code),
        ("partial", 137)
    );
    assert!(
        outcome.stderr.contains("lifetime of 300 s"),
        "{}",
        outcome.stderr
    );
    assert!(!outcome.timed_out);
}

#[tokio::test]
async fn a_vm_that_dies_costs_one_command_and_not_the_session() {
    let (sessions, source) = start(unpooled()).await;
    let id = sessions.make().await;
    let outcome = sessions.say(&id, "say before; err e; die").await;
    assert_eq!(
        (outcome.stdout.as_str(), outcome.exit_code),
        ("before", 137)
    );
    assert!(
        outcome.stderr.starts_with("e\nthaw: "),
        "{}",
        outcome.stderr
    );
    assert!(outcome.stderr.contains("kernel panic"));
    assert_eq!(status(&sessions, &id), Some(VmStatus::Failed));
    assert!(sessions.say(&id, "count").await.vm_restarted);
    // While idle, too.
    source.vm(1).die("triple fault");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(status(&sessions, &id), Some(VmStatus::Failed));
    assert_eq!(source.ended(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_kill_ends_the_running_command_and_those_that_wait_do_not_run() {
    let (sessions, source) = start(unpooled()).await;
    let id = sessions.make().await;
    let nothing = sessions.kill(&tenant(), &id).await.unwrap_err();
    assert!(matches!(nothing, SessionError::NoVm(_)));
    let running = sessions.begin(&id, command("say a; stuck"));
    let waiting = sessions.begin(&id, command("say b"));
    sleep_ms(10).await;
    let vm_id = sessions.kill(&tenant(), &id).await.unwrap();
    assert_eq!(status(&sessions, &id), Some(VmStatus::Killed));
    let after = sessions.begin(&id, command("say c"));
    let running = running.await.unwrap().unwrap();
    assert_eq!((running.stdout.as_str(), running.exit_code), ("a", 137));
    assert!(running.stderr.contains("killed"));
    let waiting = waiting.await.unwrap().unwrap();
    assert_eq!((waiting.stdout.as_str(), waiting.exit_code), ("", 137));
    let after = after.await.unwrap().unwrap();
    assert_eq!((after.stdout.as_str(), after.vm_restarted), ("c", true));
    assert_ne!(sessions.view(&tenant(), &id).unwrap().vm.unwrap().0, vm_id);
    assert_eq!(source.started(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_kill_while_the_vm_starts_is_obeyed() {
    let (sessions, source) = start(unpooled()).await;
    *super::super::line::lock(&source.restore_takes) = Duration::from_millis(100);
    let id = sessions.make().await;
    let running = sessions.begin(&id, command("say x"));
    sleep_ms(50).await;
    sessions.kill(&tenant(), &id).await.unwrap();
    assert_eq!(running.await.unwrap().unwrap().exit_code, 137);
    sleep_ms(50).await;
    assert_eq!((source.started(), source.ended()), (1, 1));
    assert_eq!(sessions.held(&tenant()), 0);
}

#[tokio::test(start_paused = true)]
async fn the_plan_counts_running_vms_and_a_kill_frees_its_place_at_once() {
    let (sessions, _) = start(unpooled()).await;
    let one = PlanLimits { max_vms: 1 };
    let (first, second) = (sessions.make().await, sessions.make().await);
    let owner = tenant();
    let run = |id| sessions.execute(&owner, one, id, command("say x"), Attached::default());
    run(&first).await.unwrap();
    let full = run(&second).await.unwrap_err();
    assert!(matches!(full, SessionError::PlanFull { limit: 1 }));
    sessions.kill(&tenant(), &first).await.unwrap();
    run(&second).await.unwrap();
    // And expiry does, too; timers tick in milliseconds.
    sleep_ms(300_001).await;
    run(&first).await.unwrap();
}

#[tokio::test]
async fn environment_variables_start_the_vm_at_creation() {
    let (sessions, source) = start(unpooled()).await;
    let with_env = SessionSpec {
        env: [("A".into(), "1".into())].into(),
        ..spec()
    };
    let id = sessions
        .create(&tenant(), PLAN, with_env.clone())
        .await
        .unwrap();
    assert_eq!(status(&sessions, &id), Some(VmStatus::Active));
    let renewed = super::super::line::lock(&source.vm(0).renewed)
        .clone()
        .unwrap();
    assert_eq!(renewed.env, with_env.env);
    assert!(renewed.hostname.starts_with("thaw-") && renewed.hostname.len() == 13);
    assert_eq!((renewed.seed.len(), renewed.machine_id.len()), (64, 32));
    let none = PlanLimits { max_vms: 1 };
    let refused = sessions.create(&tenant(), none, with_env).await;
    assert!(matches!(refused, Err(SessionError::PlanFull { .. })));
    assert_eq!(
        sessions.known(),
        1,
        "a refused session leaves nothing behind"
    );
}

#[tokio::test(start_paused = true)]
async fn drain_lets_running_commands_finish_and_ends_everything() {
    let (sessions, source) = start(super::pooled(2, 4)).await;
    sessions.pool_ready().await;
    let (id, other) = (sessions.make().await, sessions.make().await);
    let finishes = sessions.begin(&id, command("sleep 500; say done"));
    let waits = sessions.begin(&id, command("say never"));
    let overruns = sessions.begin(&other, command("say part; stuck"));
    sleep_ms(10).await;
    sessions.drain(Duration::from_secs(2)).await;
    assert_eq!(finishes.await.unwrap().unwrap().stdout, "done");
    let waits = waits.await.unwrap();
    assert!(matches!(waits, Err(SessionError::ShuttingDown)));
    let overruns = overruns.await.unwrap().unwrap();
    assert_eq!(
        (overruns.stdout.as_str(), overruns.exit_code),
        ("part", 137)
    );
    assert_eq!(source.started(), source.ended());
    let late = sessions.try_say(&id, command("say x")).await;
    assert!(matches!(late, Err(SessionError::ShuttingDown)));
}

/// A store with one session that had a VM.
#[derive(Debug)]
struct OneRow(SessionId);

impl SessionRows for OneRow {
    fn load(&self) -> BoxFuture<'_, anyhow::Result<Vec<SessionRow>>> {
        let row = SessionRow {
            tenant: tenant(),
            id: self.0.clone(),
            spec: spec(),
            created_at: SystemTime::UNIX_EPOCH,
            last_vm: Some("old".into()),
        };
        Box::pin(async { Ok(vec![row]) })
    }
    fn insert(&self, _: SessionRow) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async { anyhow::bail!("the disk is full") })
    }
    fn started(&self, _: SessionId, _: String) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async { anyhow::bail!("the disk is full") })
    }
    fn respec(&self, _: SessionId, _: SessionSpec) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async { anyhow::bail!("the disk is full") })
    }
    fn forget(&self, _: Vec<SessionId>) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn reserve_generations(&self, _: u64) -> BoxFuture<'_, anyhow::Result<u64>> {
        Box::pin(async { Ok(77) })
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_outlives_the_server_its_vm_does_not_and_old_ones_are_forgotten() {
    let id = SessionId::mint();
    let mut config = unpooled();
    config.forget_after_s = 3600;
    let mut metrics = Registry::default();
    let sessions = Sessions::with_source(
        config,
        Arc::new(OneRow(id.clone())),
        Arc::new(Source::default()),
        &mut metrics,
    );
    let sessions = sessions.await.unwrap();
    assert_eq!(status(&sessions, &id), Some(VmStatus::Failed));
    assert!(sessions.say(&id, "say x").await.vm_restarted);
    // A session that cannot be stored is not acknowledged.
    let refused = sessions.create(&tenant(), PLAN, spec()).await;
    assert!(matches!(refused, Err(SessionError::Unavailable(_))));
    assert_eq!(sessions.known(), 1);
    sleep_ms(300_000 + 3_600_000 - 1000).await;
    assert_eq!(sessions.known(), 1);
    sleep_ms(62_000).await;
    assert_eq!(sessions.known(), 0);
}

impl Sessions {
    fn known(&self) -> usize {
        self.core().table.len()
    }

    pub(super) fn held(&self, tenant: &TenantId) -> u32 {
        self.core().limits.held(tenant)
    }
}
