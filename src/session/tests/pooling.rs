//! Watermarks, failing restores, dying and lying VMs.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::super::line::lock;
use super::super::metrics::Degradation;
use super::super::*;
use super::{PLAN, command, pooled, sleep_ms, spec, start, tenant};

#[tokio::test(start_paused = true)]
async fn the_pool_fills_to_its_high_mark_and_a_claim_is_made_good() {
    let (sessions, source) = start(pooled(2, 5)).await;
    sessions.pool_ready().await;
    sleep_ms(2000).await;
    assert_eq!((sessions.parked(), source.started()), (5, 5));
    let id = sessions.make().await;
    sessions.say(&id, "say x").await;
    sleep_ms(2000).await;
    assert_eq!((sessions.parked(), source.started()), (5, 6));
    assert_eq!(sessions.degraded(Degradation::PoolEmpty), 0);
}

#[tokio::test(start_paused = true)]
async fn an_empty_pool_restores_on_the_spot_and_never_beyond_its_concurrency() {
    let (sessions, source) = start(pooled(1, 1)).await;
    *lock(&source.restore_takes) = Duration::from_millis(100);
    sessions.pool_ready().await;
    let mut tasks = Vec::new();
    for _ in 0..6 {
        let id = sessions.make().await;
        tasks.push(sessions.begin(&id, command("say x")));
    }
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert!(sessions.degraded(Degradation::PoolEmpty) >= 1);
    assert!(source.started() <= 8, "{}", source.started());
}

#[tokio::test(start_paused = true)]
async fn another_size_is_restored_on_the_spot_from_the_next_size_up() {
    let (sessions, source) = start(pooled(1, 1)).await;
    sessions.pool_ready().await;
    let big = SessionSpec {
        memory_mib: 600,
        ..spec()
    };
    let id = sessions.create(&tenant(), PLAN, big).await.unwrap();
    sessions.say(&id, "say x").await;
    let shape = *lock(&source.shapes).last().unwrap();
    assert_eq!(
        shape,
        Shape {
            memory_mib: 1024,
            vcpus: 1
        }
    );
}

#[tokio::test(start_paused = true)]
async fn a_parked_vm_that_dies_is_replaced_and_one_that_always_dies_not_in_a_hot_loop() {
    let (sessions, source) = start(pooled(1, 1)).await;
    sessions.pool_ready().await;
    source.vm(0).die("out of memory");
    sleep_ms(500).await;
    assert_eq!(
        (sessions.parked(), source.started(), source.ended()),
        (1, 2, 1)
    );
    let killer = tokio::spawn({
        let source = source.clone();
        async move {
            loop {
                sleep_ms(1).await;
                source.vm(source.started() - 1).die("again");
            }
        }
    });
    sleep_ms(60_000).await;
    killer.abort();
    assert!(source.started() < 20, "{} in a minute", source.started());
}

#[tokio::test(start_paused = true)]
async fn a_broken_template_is_refused_with_its_reason_and_recovers() {
    let (sessions, source) = start(pooled(2, 2)).await;
    *lock(&source.failing) = Some("state file is truncated".into());
    sleep_ms(60_000).await;
    let tries = source.tries.load(Ordering::SeqCst);
    assert!(tries < 30, "{tries} tries in a minute");
    let id = sessions.make().await;
    let Err(SessionError::Unavailable(reason)) = sessions.try_say(&id, command("say x")).await
    else {
        panic!("served by a broken template");
    };
    assert!(format!("{reason:#}").contains("truncated"), "{reason:#}");
    assert_eq!(sessions.view(&tenant(), &id).unwrap().vm, None);
    *lock(&source.failing) = None;
    sleep_ms(31_000).await;
    sessions.say(&id, "say x").await;
    assert_eq!(sessions.parked(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_does_not_confirm_its_identity_serves_nobody() {
    let (sessions, source) = start(super::unpooled()).await;
    let id = sessions.make().await;
    source.liars.store(1, Ordering::SeqCst);
    assert_eq!(sessions.say(&id, "say x").await.stdout, "x");
    sleep_ms(10).await;
    assert_eq!((source.started(), source.ended()), (2, 1));
    assert!(!*source.vm(1).ended.borrow());
    let other = sessions.make().await;
    source.liars.store(2, Ordering::SeqCst);
    let refused = sessions.try_say(&other, command("say x")).await;
    assert!(matches!(refused, Err(SessionError::Unavailable(_))));
    sleep_ms(10).await;
    assert_eq!((source.started(), source.ended()), (4, 3));
}

#[tokio::test(start_paused = true)]
async fn no_two_vms_have_the_same_generation_or_seed() {
    let (sessions, source) = start(pooled(2, 4)).await;
    for _ in 0..20 {
        let id = sessions.make().await;
        sessions.say(&id, "say x").await;
    }
    let mut seen = std::collections::HashSet::new();
    for vm in lock(&source.vms).iter() {
        if let Some(renew) = lock(&vm.renewed).clone() {
            assert!(seen.insert(renew.generation.to_string()));
            assert!(seen.insert(renew.seed));
            assert!(seen.insert(renew.machine_id));
        }
    }
    assert_eq!(seen.len(), 60);
}

#[tokio::test(start_paused = true)]
async fn a_rehearsed_vm_gets_its_own_identity_and_one_that_fails_is_not_parked() {
    let mut config = pooled(1, 1);
    config.pool.rehearse = true;
    let (sessions, source) = start(config).await;
    source.liars.store(1, Ordering::SeqCst);
    sessions.pool_ready().await;
    let rehearsed = lock(&source.vm(1).renewed).clone().unwrap();
    let id = sessions.make().await;
    assert_eq!(sessions.say(&id, "count").await.stdout, "2");
    let renewed = lock(&source.vm(1).renewed).clone().unwrap();
    assert_ne!(rehearsed.seed, renewed.seed);
    assert_ne!(rehearsed.machine_id, renewed.machine_id);
    assert!(*source.vm(0).ended.borrow());
}

impl Sessions {
    fn parked(&self) -> usize {
        self.core().pool.parked()
    }

    fn degraded(&self, kind: Degradation) -> u64 {
        self.core().metrics.degradations(kind)
    }
}
