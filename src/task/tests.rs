use std::sync::atomic::Ordering;

use super::*;
use crate::backend::fake::{FakeSessions, spec};
use crate::session::{Command, Language};
use crate::store::{TaskState, scratch};

const SOON: Duration = Duration::from_secs(5);

fn task(tenant: &TenantId, session: &SessionId, id: &str, code: &str) -> NewTask {
    NewTask {
        id: id.into(),
        tenant: tenant.0.clone(),
        session_id: session.to_string(),
        command: Command {
            context: None,
            live: false,
            language: Language::Python,
            code: code.into(),
            timeout: Duration::from_secs(60),
            answer_within: None,
        },
        max_vms: 1,
        idempotency_key: None,
        body_hash: [0; 32],
    }
}

struct World {
    _dir: tempfile::TempDir,
    store: Store,
    backend: Arc<FakeSessions>,
    tenant: TenantId,
    session: SessionId,
}

impl World {
    fn new() -> Self {
        let (dir, store) = scratch();
        let backend = Arc::new(FakeSessions::default());
        let (tenant, session) = (TenantId("t".into()), SessionId::mint());
        backend.add(&tenant, &session, spec());
        Self {
            _dir: dir,
            store,
            backend,
            tenant,
            session,
        }
    }

    async fn tasks(&self) -> Tasks {
        Tasks::start(
            self.store.clone(),
            self.backend.clone(),
            TaskConfig::default(),
        )
        .await
        .unwrap()
    }

    /// Submits a task as the front end does: its place first.
    async fn submit(&self, tasks: &Tasks, id: &str, code: &str) -> Submitted {
        let ticket = self.backend.accept(&self.tenant, &self.session).unwrap();
        let task = task(&self.tenant, &self.session, id, code);
        tasks.submit(task, ticket).await.unwrap()
    }
}

#[tokio::test]
async fn a_task_is_durable_runs_and_is_only_its_owner_s() {
    let world = World::new();
    let tasks = world.tasks().await;
    assert_eq!(world.submit(&tasks, "1", "hello").await, Submitted::New);
    let row = tasks.view(&world.tenant, "1", SOON).await.unwrap().unwrap();
    assert_eq!(
        (row.state, row.stdout.as_str(), row.exit_code),
        (TaskState::Done, "hello", Some(0))
    );
    assert!(
        tasks
            .view(&TenantId("u".into()), "1", SOON)
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn output_so_far_is_seen_and_stored_while_a_task_runs() {
    let world = World::new();
    let tasks = world.tasks().await;
    world.submit(&tasks, "1", "sleep 700").await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    let row = tasks
        .view(&world.tenant, "1", Duration::ZERO)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (row.state, row.stdout.as_str()),
        (TaskState::Running, "so far")
    );
    let tenant = world.tenant.0.clone();
    let row = world
        .store
        .call(move |c| TaskRow::find(c, &tenant, "1"))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(row.stdout, "so far");
}

#[tokio::test]
async fn after_a_crash_queued_tasks_run_and_running_ones_do_not_run_again() {
    let world = World::new();
    let make = |id, code| task(&world.tenant, &world.session, id, code);
    let (first, second) = (make("1", "one"), make("2", "two"));
    let third = task(&world.tenant, &SessionId::mint(), "3", "lost session");
    world
        .store
        .call(move |c| {
            for task in [first, second, third] {
                task.insert(c, 9)?;
            }
            TaskRow::mark_running(c, "1")?;
            TaskRow::store_partial(c, "1", "half", "")
        })
        .await
        .unwrap();
    let tasks = world.tasks().await;
    let view = async |id: &str| tasks.view(&world.tenant, id, SOON).await.unwrap().unwrap();
    let one = view("1").await;
    assert_eq!(
        (one.state, one.stdout.as_str()),
        (TaskState::Interrupted, "half")
    );
    assert!(one.state.is_complete() && one.exit_code == Some(INTERRUPTED));
    assert!(one.stderr.contains("server stopped"));
    let two = view("2").await;
    assert_eq!((two.state, two.stdout.as_str()), (TaskState::Done, "two"));
    let three = view("3").await;
    assert!(three.stderr.contains("did not run"), "{}", three.stderr);
    assert_eq!(world.backend.runs.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_full_host_is_waited_for() {
    let world = World::new();
    let tasks = world.tasks().await;
    world.submit(&tasks, "1", "full").await;
    let row = tasks.view(&world.tenant, "1", SOON).await.unwrap().unwrap();
    assert_eq!((row.state, row.stdout.as_str()), (TaskState::Done, "full"));
}

#[tokio::test]
async fn a_command_sent_after_the_acknowledgement_runs_after_the_task() {
    let world = World::new();
    let tasks = world.tasks().await;
    world.submit(&tasks, "1", "sleep 200").await;
    let mut ticket = world.backend.accept(&world.tenant, &world.session).unwrap();
    ticket.ready().await;
    assert_eq!(world.backend.runs.load(Ordering::SeqCst), 1);
    drop(ticket);
    let row = tasks.view(&world.tenant, "1", SOON).await.unwrap().unwrap();
    assert_eq!(row.state, TaskState::Done);
}
