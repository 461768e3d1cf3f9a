//! Keeps the pool between its watermarks.
//!
//! Below `low` the pool refills at once. Between `low` and `high` it leaves the cores to the
//! commands that run: a restore costs a core for some milliseconds, which a command would feel,
//! while the pool still has VMs to give.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::Instant;

use super::identity::rehearse;
use super::metrics::Degradation;
use super::pool::{Leased, Pool};

/// Longest that running commands hold up a refill above `low`.
const LONGEST_POSTPONEMENT: Duration = Duration::from_secs(1);

/// Longest that a rehearsal may take: it takes milliseconds.
const REHEARSAL: Duration = Duration::from_secs(10);

/// What the refiller may do now.
enum Next {
    /// Restore one more.
    Restore,
    /// Nothing to do until something happens.
    Rest,
    /// The cores are busy.
    Postpone,
    /// The last tries failed.
    BackOff(Instant),
}

/// The refiller's own state.
struct Refiller {
    pool: Arc<Pool>,
    running: watch::Receiver<usize>,
    cores: usize,
    restoring: FuturesUnordered<BoxFuture<'static, Option<Leased>>>,
    postponed: Option<Instant>,
}

/// Runs until the pool is closed. `running` counts the commands that run.
pub(crate) async fn refill(pool: Arc<Pool>, running: watch::Receiver<usize>) {
    if pool.config.high == 0 {
        return;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut deaths = FuturesUnordered::new();
    let mut this = Refiller {
        pool,
        running,
        cores,
        restoring: FuturesUnordered::new(),
        postponed: None,
    };
    while !this.pool.closed.load(Ordering::Acquire) {
        let next = this.next();
        let until = match next {
            Next::Restore => {
                this.begin();
                continue;
            }
            Next::Rest => None,
            Next::Postpone => {
                let since = *this.postponed.get_or_insert_with(Instant::now);
                Some(since + LONGEST_POSTPONEMENT)
            }
            Next::BackOff(until) => Some(until),
        };
        let postponed = matches!(next, Next::Postpone);
        tokio::select! {
            Some(restored) = this.restoring.next(), if !this.restoring.is_empty() => {
                if let Some(vm) = restored {
                    if let Some(handle) = vm.vm() {
                        let (died, generation) = (handle.died(), vm.generation);
                        deaths.push(async move { (generation, died.await) });
                    }
                    this.pool.park(vm);
                }
            }
            // Ends of VMs that were claimed since are seen, too, and mean nothing here.
            Some((generation, reason)) = deaths.next(), if !deaths.is_empty() => {
                if this.pool.discard(generation) {
                    this.pool.metrics.degraded(Degradation::ParkedDied);
                    this.pool.deaths.failed(&format!("a parked VM died: {reason}"));
                }
            }
            () = this.pool.wake.notified() => {}
            changed = this.running.changed(), if postponed => {
                if changed.is_err() {
                    return;
                }
            }
            () = sleep_until(until), if until.is_some() => {}
        }
    }
}

async fn sleep_until(until: Option<Instant>) {
    if let Some(until) = until {
        tokio::time::sleep_until(until).await;
    }
}

impl Refiller {
    fn next(&mut self) -> Next {
        let config = &self.pool.config;
        let under_way = self.restoring.len();
        let there = self.pool.parked() + under_way;
        if there >= config.high || under_way >= config.restore_concurrency {
            return Next::Rest;
        }
        let breaker = self.pool.breaker(self.pool.shape);
        let retry_at = breaker.retry_at().max(self.pool.deaths.retry_at());
        if let Some(at) = retry_at
            && at > Instant::now()
        {
            return Next::BackOff(at);
        }
        // After a failure one at a time finds out whether things are well again.
        if retry_at.is_some() && under_way > 0 {
            return Next::Rest;
        }
        if there < config.low {
            self.postponed = None;
            return Next::Restore;
        }
        let overdue = self
            .postponed
            .is_some_and(|since| since.elapsed() >= LONGEST_POSTPONEMENT);
        let spare = *self.running.borrow_and_update() + 1 < self.cores.max(2);
        match under_way {
            0 if spare || overdue => {
                self.postponed = None;
                Next::Restore
            }
            0 => Next::Postpone,
            _ => Next::Rest,
        }
    }

    fn begin(&mut self) {
        let pool = self.pool.clone();
        self.restoring.push(Box::pin(async move {
            if let Err(error) = pool.prepare(pool.shape).await {
                tracing::warn!("no template for the pool: {error:#}");
                return None;
            }
            let _restoring = pool.restores.acquire().await.ok()?;
            // The breaker has counted and logged a failure.
            let restored = pool.restore(pool.shape).await.ok()?;
            if pool.config.rehearse
                && let Some(vm) = restored.vm()
                && let Err(error) = rehearse(&**vm, restored.generation, REHEARSAL).await
            {
                pool.renew_failed(pool.shape, &format!("{error:#}"));
                return None;
            }
            Some(restored)
        }));
    }
}
