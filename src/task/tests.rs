use std::sync::atomic::Ordering;

use super::*;
use crate::backend::fake::{FakeSessions, spec};
use crate::session::{Command, Language, PartialOutput};
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
    let stored = world.store.call(|c| TaskOutput::of(c, "1"));
    assert_eq!(stored.await.unwrap().stdout, "so far");
}

#[tokio::test]
async fn each_byte_of_output_is_written_once_while_a_task_runs() {
    let world = World::new();
    let tasks = world.tasks().await;
    world.submit(&tasks, "1", "drip 40 25").await;
    tokio::time::sleep(Duration::from_millis(750)).await;
    let (whole, pieces) = world
        .store
        .call(|c| {
            let pieces = "SELECT count(*) FROM task_output";
            let pieces: usize = c.query_row(pieces, [], |row| row.get(0))?;
            Ok((TaskOutput::of(c, "1")?.stdout, pieces))
        })
        .await
        .unwrap();
    assert!(pieces > 1, "it is written while it comes");
    let drops: Vec<_> = whole.split_whitespace().collect();
    let expected: Vec<_> = (0..drops.len()).map(|n| n.to_string()).collect();
    assert_eq!(drops, expected, "each once and in order");
    let row = tasks.view(&world.tenant, "1", SOON).await.unwrap().unwrap();
    assert_eq!(row.state, TaskState::Done);
}

#[tokio::test]
async fn code_of_waiting_tasks_is_bounded_and_not_held_in_memory() {
    let world = World::new();
    let config = TaskConfig {
        max_open_code_mib: 1,
        ..TaskConfig::default()
    };
    let tasks = Tasks::start(world.store.clone(), world.backend.clone(), config);
    let tasks = tasks.await.unwrap();
    let long = "sleep 300".to_owned() + &" ".repeat(600_000);
    assert_eq!(world.submit(&tasks, "1", "sleep 300").await, Submitted::New);
    assert_eq!(world.submit(&tasks, "2", &long).await, Submitted::New);
    assert_eq!(
        world.submit(&tasks, "3", &long).await,
        Submitted::TooMuchCode
    );
    let foreseen = tasks.foresee(&world.tenant, None, [0; 32], long.len());
    assert_eq!(foreseen.await.unwrap(), Some(Submitted::TooMuchCode));
    let waiting = task(&world.tenant, &world.session, "2", &long);
    assert_eq!(run::without_long_code(&waiting.command).code, "");
    let row = tasks.view(&world.tenant, "2", SOON).await.unwrap().unwrap();
    assert_eq!((row.state, row.stdout), (TaskState::Done, long.clone()));
    // Its room is free again.
    assert_eq!(world.submit(&tasks, "4", &long).await, Submitted::New);
}

#[tokio::test]
async fn long_code_of_the_last_run_is_found_again() {
    let world = World::new();
    let long = "x".repeat(run::SHORT_CODE * 3);
    let task = task(&world.tenant, &world.session, "1", &long);
    let stored = world.store.call(move |c| task.insert(c, 9, true));
    assert_eq!(stored.await.unwrap(), Submitted::New);
    let tasks = world.tasks().await;
    let row = tasks.view(&world.tenant, "1", SOON).await.unwrap().unwrap();
    assert_eq!((row.state, row.stdout), (TaskState::Done, long));
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
                task.insert(c, 9, true)?;
            }
            TaskRow::mark_running(c, "1")?;
            let half = PartialOutput {
                stdout: "half".into(),
                ..PartialOutput::default()
            };
            TaskOutput::append(c, "1", &half)
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
