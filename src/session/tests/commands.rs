//! Order, deadlines, output.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;

use super::super::line::lock;
use super::super::*;
use super::{PLAN, command, sleep_ms, start, tenant, unpooled};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn commands_of_one_session_run_in_order_of_acceptance_on_one_vm() {
    let (sessions, source) = start(unpooled()).await;
    let id = sessions.make().await;
    assert_eq!(source.started(), 0, "a VM comes with the first command");
    let begun: Vec<_> = (0..50)
        .map(|_| sessions.begin(&id, command("count")))
        .collect();
    for (n, task) in begun.into_iter().enumerate() {
        let outcome = task.await.unwrap().unwrap();
        assert_eq!(outcome.stdout, (n + 1).to_string());
        assert!(!outcome.vm_restarted);
    }
    assert_eq!(source.started(), 1);
}

#[tokio::test]
async fn two_hundred_sessions_each_keep_their_own_vm() {
    let mut config = super::pooled(4, 8);
    config.max_vms = 250;
    let (sessions, _) = start(config).await;
    let mut ids = Vec::new();
    for _ in 0..200 {
        ids.push(sessions.make().await);
    }
    for (n, id) in ids.iter().enumerate() {
        for _ in 0..n % 7 {
            sessions.say(id, "say x").await;
        }
    }
    for (n, id) in ids.iter().enumerate() {
        assert_eq!(
            sessions.say(id, "count").await.stdout,
            (n % 7 + 1).to_string()
        );
    }
}

#[tokio::test]
async fn another_tenant_and_an_unknown_id_find_nothing() {
    let (sessions, _) = start(unpooled()).await;
    let id = sessions.make().await;
    let other = TenantId("other".into());
    let refused = sessions.execute(&other, PLAN, &id, command("say x"), Attached::default());
    assert!(matches!(refused.await, Err(SessionError::NotFound(_))));
    assert!(sessions.view(&other, &id).is_err());
    assert!(sessions.kill(&other, &id).await.is_err());
    assert!(sessions.view(&tenant(), &SessionId::mint()).is_err());
}

#[tokio::test(start_paused = true)]
async fn a_full_line_refuses_and_who_gives_up_makes_room() {
    let mut config = unpooled();
    config.max_waiting = 1;
    let (sessions, _) = start(config).await;
    let id = sessions.make().await;
    let _running = sessions.begin(&id, command("sleep 1000"));
    let waiting = sessions.accept(&tenant(), &id).unwrap();
    let full = sessions.try_say(&id, command("say x")).await.unwrap_err();
    assert!(matches!(full, SessionError::QueueFull { limit: 1 }));
    drop(waiting);
    assert_eq!(sessions.say(&id, "say x").await.stdout, "x");
}

#[tokio::test(start_paused = true)]
async fn a_synchronous_caller_is_answered_in_time_and_the_next_command_finds_the_vm_free() {
    let (sessions, source) = start(unpooled()).await;
    let id = sessions.make().await;
    let mut slow = command("say part; deaf 100000");
    slow.timeout = Duration::from_secs(1);
    slow.answer_within = Some(Duration::from_millis(750));
    let outcome = sessions.try_say(&id, slow).await.unwrap();
    assert_eq!((outcome.exit_code, outcome.timed_out), (124, true));
    assert_eq!(outcome.stdout, "part");
    assert!(outcome.stderr.contains("timed out"), "{}", outcome.stderr);
    assert!(outcome.execution_time < Duration::from_secs(1));
    // Killed in the background, which the next command waits for, and tells of: nobody else can.
    let next = sessions.say(&id, "count").await;
    assert_eq!(next.stdout, "2");
    assert!(next.stderr.contains("variables are lost"), "{next:?}");
    assert_eq!(sessions.say(&id, "count").await.stderr, "");
    assert_eq!(source.started(), 1);
}

#[derive(Debug, Default)]
struct Counts(AtomicUsize);

impl Witness for Counts {
    fn starts(&self) -> BoxFuture<'_, anyhow::Result<()>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_is_witnessed_when_the_vm_is_in_hand_and_not_before() {
    let (sessions, source) = start(unpooled()).await;
    let id = sessions.make().await;
    let witness = Arc::new(Counts::default());
    let seen = || witness.0.load(Ordering::SeqCst);
    let run = |code: &'static str| {
        let attached = Attached {
            witness: Some(witness.clone()),
            ..Attached::default()
        };
        let accepted = sessions.accept(&tenant(), &id).unwrap();
        let sessions = sessions.clone();
        tokio::spawn(async move { sessions.run(accepted, PLAN, command(code), attached).await })
    };
    *lock(&source.failing) = Some("no template".into());
    assert!(run("count").await.unwrap().is_err());
    assert_eq!(seen(), 0, "there was no VM");
    *lock(&source.failing) = None;
    *lock(&source.restore_takes) = Duration::from_secs(1);
    let first = run("count");
    sleep_ms(500).await;
    assert_eq!(seen(), 0, "its VM is still being made");
    assert_eq!(first.await.unwrap().unwrap().stdout, "1");
    assert_eq!(seen(), 1);
    let _running = run("sleep 1000");
    let waiting = run("count");
    sleep_ms(10).await;
    assert_eq!(seen(), 2, "the second waits for its turn");
    let draining = sessions.clone();
    let drained = tokio::spawn(async move { draining.drain(Duration::from_secs(5)).await });
    assert!(matches!(
        waiting.await.unwrap(),
        Err(SessionError::ShuttingDown)
    ));
    drained.await.unwrap();
    assert_eq!(seen(), 2, "what a drain keeps from running is not noted");
}

#[tokio::test(start_paused = true)]
async fn time_in_line_counts_against_a_synchronous_caller_only() {
    let (sessions, _) = start(unpooled()).await;
    let id = sessions.make().await;
    let _running = sessions.begin(&id, command("sleep 5000"));
    let mut hasty = command("say x");
    hasty.answer_within = Some(Duration::from_millis(750));
    let patient = sessions.begin(&id, command("say y"));
    let outcome = sessions.try_say(&id, hasty).await.unwrap();
    assert_eq!(outcome.exit_code, 124);
    assert!(outcome.stderr.contains("before it started"));
    assert_eq!(patient.await.unwrap().unwrap().stdout, "y");
}

#[tokio::test(start_paused = true)]
async fn an_overrunning_task_is_interrupted_then_killed_then_its_vm_is_ended() {
    let (sessions, source) = start(unpooled()).await;
    let id = sessions.make().await;
    let overrun = |code: &str| Command {
        timeout: Duration::from_secs(1),
        ..command(code)
    };
    let polite = sessions.try_say(&id, overrun("sleep 100000")).await;
    assert_eq!(polite.unwrap().exit_code, 130);
    let deaf = sessions.try_say(&id, overrun("deaf 100000")).await;
    assert_eq!(deaf.unwrap().exit_code, 137);
    assert_eq!(source.started(), 1);
    let stuck = sessions
        .try_say(&id, overrun("say a; stuck"))
        .await
        .unwrap();
    assert_eq!((stuck.exit_code, stuck.timed_out), (124, true));
    assert_eq!(stuck.stdout, "a");
    let next = sessions.say(&id, "count").await;
    assert_eq!((next.stdout.as_str(), next.vm_restarted), ("1", true));
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_goes_away_stops_its_command_before_the_next_one_starts() {
    let (sessions, _) = start(unpooled()).await;
    let id = sessions.make().await;
    let task = sessions.begin(&id, command("sleep 100000"));
    sleep_ms(10).await;
    let next = sessions.begin(&id, command("count"));
    task.abort();
    assert_eq!(next.await.unwrap().unwrap().stdout, "2");
}

#[tokio::test(start_paused = true)]
async fn partial_output_is_shown_while_the_command_runs() {
    let (sessions, _) = start(unpooled()).await;
    let id = sessions.make().await;
    let attached = Attached {
        feed: Some(Arc::default()),
        cancel: None,
        witness: None,
    };
    let mut seen = attached.feed.as_ref().unwrap().follow();
    let accepted = sessions.accept(&tenant(), &id).unwrap();
    let code = "say one; err e; sleep 1000; say two; sleep 1000; say three";
    let running = tokio::spawn({
        let sessions = sessions.clone();
        async move { sessions.run(accepted, PLAN, command(code), attached).await }
    });
    assert_eq!(seen.next().await, Some((Output::Stdout, "one".into())));
    assert_eq!(seen.next().await, Some((Output::Stderr, "e".into())));
    assert_eq!(seen.next().await, Some((Output::Stdout, "two".into())));
    assert_eq!(running.await.unwrap().unwrap().stdout, "onetwothree");
    assert_eq!(seen.next().await, Some((Output::Stdout, "three".into())));
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_command_is_stopped_wherever_it_is() {
    let (sessions, _) = start(unpooled()).await;
    let id = sessions.make().await;
    let begin = |code: &'static str| {
        let (cancel, cancelled) = tokio::sync::watch::channel(false);
        let attached = Attached {
            feed: None,
            cancel: Some(cancelled),
            witness: None,
        };
        let accepted = sessions.accept(&tenant(), &id).unwrap();
        let sessions = sessions.clone();
        let run = async move { sessions.run(accepted, PLAN, command(code), attached).await };
        (cancel, tokio::spawn(run))
    };
    let (stop_running, running) = begin("say begun; sleep 100000");
    let (stop_waiting, waiting) = begin("count");
    sleep_ms(10).await;
    stop_waiting.send_replace(true);
    let waiting = waiting.await.unwrap().unwrap();
    assert!(waiting.cancelled && waiting.exit_code == 130, "{waiting:?}");
    stop_running.send_replace(true);
    let running = running.await.unwrap().unwrap();
    assert!(running.cancelled && running.exit_code == 130, "{running:?}");
    assert_eq!(running.stdout, "begun");
    assert!(running.stderr.contains("cancelled"));
    assert_eq!(sessions.say(&id, "count").await.stdout, "2");
}

#[tokio::test]
async fn failure_is_an_outcome() {
    let (sessions, _) = start(unpooled()).await;
    let id = sessions.make().await;
    let outcome = sessions.say(&id, "err no; exit 3").await;
    assert_eq!((outcome.exit_code, outcome.stderr.as_str()), (3, "no"));
}
