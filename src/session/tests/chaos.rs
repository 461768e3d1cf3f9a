//! Everything at once, on real threads: whatever happens, nothing is lost and nothing leaks.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::line::lock;
use super::super::*;
use super::{PLAN, command, pooled, start, tenant};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn after_any_mixture_of_kills_deaths_and_departures_every_place_is_free_and_every_vm_gone() {
    let mut config = pooled(2, 4);
    config.max_vms = 12;
    config.kill_after_ms = 20;
    config.end_after_ms = 20;
    let (sessions, source) = start(config).await;
    sessions.pool_ready().await;
    let mut ids = Vec::new();
    for _ in 0..10 {
        ids.push(sessions.make().await);
    }
    let mut clients = Vec::new();
    for seed in 0..16 {
        let (sessions, source, ids) = (sessions.clone(), source.clone(), ids.clone());
        clients.push(tokio::spawn(async move {
            let mut dice = StdRng::seed_from_u64(seed);
            for _ in 0..60 {
                let id = &ids[dice.random_range(0..ids.len())];
                let wait = Duration::from_millis(dice.random_range(0..8));
                match dice.random_range(0..12) {
                    0 => drop(sessions.kill(&tenant(), id).await),
                    1 => source
                        .vm(dice.random_range(0..source.started().max(1)))
                        .die("chaos"),
                    2 => source.liars.store(1, Ordering::SeqCst),
                    3 => {
                        let run = sessions.try_say(id, command("deaf 50"));
                        drop(tokio::time::timeout(wait, run).await);
                    }
                    4 => {
                        let mut hasty = command("sleep 5; say x");
                        hasty.answer_within = Some(wait);
                        drop(sessions.try_say(id, hasty).await);
                    }
                    5 => drop(sessions.try_say(id, command("say a; die")).await),
                    _ => match sessions.try_say(id, command("say x")).await {
                        Ok(outcome) if outcome.exit_code == 0 => assert_eq!(outcome.stdout, "x"),
                        Ok(outcome) => assert!(outcome.stderr.contains("thaw: "), "{outcome:?}"),
                        Err(SessionError::Unavailable(_)) => {}
                        Err(error) => panic!("{error}"),
                    },
                }
            }
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    // Every session still works, on one VM each.
    source.liars.store(0, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(500)).await;
    for id in &ids {
        assert_eq!(sessions.say(id, "say fine").await.stdout, "fine");
    }
    let owner = tenant();
    assert_eq!(sessions.held(&owner), 10);
    sessions.drain(Duration::from_secs(5)).await;
    assert_eq!(source.started(), source.ended());
    assert_eq!(sessions.held(&owner), 0);
    let renewed = lock(&source.vms)
        .iter()
        .filter(|vm| lock(&vm.renewed).is_some())
        .count();
    assert!(renewed >= 10);
    let late = sessions.execute(&owner, PLAN, &ids[0], command("say x"), Attached::default());
    assert!(matches!(late.await, Err(SessionError::ShuttingDown)));
}
