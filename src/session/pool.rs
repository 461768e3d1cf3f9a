//! VMs restored ahead of need, and restores on the spot when there are none.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;

use super::breaker::Breaker;
use super::config::{PoolConfig, SessionConfig};
use super::line::lock;
use super::metrics::{Degradation, Metrics, Phase};
use super::reaper::Reaper;
use super::vm::{Frozen, Shape, Vm, VmSource};

/// A VM that is ended by the reaper unless somebody keeps it.
#[derive(Debug)]
pub(crate) struct Leased {
    vm: Option<Arc<dyn Vm>>,
    /// The generation it was restored with.
    pub(crate) generation: u64,
    reaper: Reaper,
}

impl Leased {
    /// Keeps the VM; ending it is the caller's duty from here on.
    pub(crate) fn keep(mut self) -> Option<Arc<dyn Vm>> {
        self.vm.take()
    }

    pub(crate) fn vm(&self) -> Option<&Arc<dyn Vm>> {
        self.vm.as_ref()
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        if let Some(vm) = self.vm.take() {
            self.reaper.end(vm, None);
        }
    }
}

/// The pool.
#[derive(Debug)]
pub(crate) struct Pool {
    source: Arc<dyn VmSource>,
    pub(super) config: PoolConfig,
    pub(super) shape: Shape,
    reaper: Reaper,
    pub(super) metrics: Arc<Metrics>,
    next_generation: AtomicU64,
    /// The last in is the first out: its pages are the likeliest to be in the caches.
    parked: Mutex<Vec<Leased>>,
    /// Restores under way are bounded across sessions and the refiller. Fair, so sessions
    /// that wait come before the refiller, which only ever tries.
    pub(super) restores: Arc<Semaphore>,
    breakers: Mutex<HashMap<Shape, Arc<Breaker>>>,
    /// Spaces out replacements of parked VMs that die.
    pub(super) deaths: Breaker,
    pub(super) wake: Notify,
    filled: watch::Sender<bool>,
    pub(super) closed: AtomicBool,
}

impl Pool {
    pub(crate) fn new(
        config: &SessionConfig,
        source: Arc<dyn VmSource>,
        first_generation: u64,
        reaper: Reaper,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            source,
            config: config.pool.clone(),
            shape: config.pool_shape(),
            reaper,
            metrics,
            next_generation: AtomicU64::new(first_generation),
            parked: Mutex::default(),
            restores: Arc::new(Semaphore::new(config.pool.restore_concurrency)),
            breakers: Mutex::default(),
            deaths: Breaker::new(&config.pool),
            wake: Notify::new(),
            filled: watch::Sender::new(config.pool.high == 0),
            closed: AtomicBool::new(false),
        })
    }

    /// A restored VM of this shape: a parked one, else one restored now.
    ///
    /// # Errors
    /// The restore failed, or so many did that none is tried now.
    pub(crate) async fn claim(&self, shape: Shape) -> anyhow::Result<Leased> {
        if let Some(vm) = self.pop(shape) {
            return Ok(vm);
        }
        if shape == self.shape && self.config.high > 0 {
            self.metrics.degraded(Degradation::PoolEmpty);
        }
        let breaker = self.breaker(shape);
        breaker.check()?;
        let _restoring = self.restores.acquire().await?;
        // While this waited one may have been parked, or the template found broken.
        if let Some(vm) = self.pop(shape) {
            return Ok(vm);
        }
        breaker.check()?;
        self.restore(shape).await
    }

    /// Makes sure that VMs of this shape can be restored; a build takes its time.
    pub(crate) async fn prepare(&self, shape: Shape) -> anyhow::Result<()> {
        self.breaker(shape).check()?;
        self.source.prepare(shape).await.inspect_err(|error| {
            self.breaker(shape).failed(&format!("{error:#}"));
        })
    }

    /// Restores one VM. The caller holds a permit of `restores`.
    pub(super) async fn restore(&self, shape: Shape) -> anyhow::Result<Leased> {
        let generation = self.next_generation.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        match self.source.start(shape, generation).await {
            Ok(vm) => {
                self.breaker(shape).succeeded();
                self.metrics.phase(Phase::Restore, began.elapsed());
                Ok(Leased {
                    vm: Some(vm),
                    generation,
                    reaper: self.reaper.clone(),
                })
            }
            Err(error) => {
                self.metrics.degraded(Degradation::RestoreFailed);
                self.breaker(shape).failed(&format!("{error:#}"));
                Err(error)
            }
        }
    }

    /// Restores a VM that was frozen mid-flight. Its failures are its own: they count against no shape.
    pub(crate) async fn thaw(&self, frozen: &Frozen) -> anyhow::Result<Leased> {
        let _restoring = self.restores.acquire().await?;
        let generation = self.next_generation.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        let restored = self.source.restore(frozen, generation).await;
        let vm = restored.inspect_err(|_| self.metrics.degraded(Degradation::RestoreFailed))?;
        self.metrics.phase(Phase::Restore, began.elapsed());
        Ok(Leased {
            vm: Some(vm),
            generation,
            reaper: self.reaper.clone(),
        })
    }

    /// Counts VMs of this shape that came up but would not be renewed as failures, too.
    pub(crate) fn renew_failed(&self, shape: Shape, reason: &str) {
        self.metrics.degraded(Degradation::RenewFailed);
        self.breaker(shape).failed(reason);
    }

    /// A VM of this shape works.
    pub(crate) fn proved(&self, shape: Shape) {
        if shape == self.shape {
            self.deaths.succeeded();
        }
    }

    pub(super) fn breaker(&self, shape: Shape) -> Arc<Breaker> {
        lock(&self.breakers)
            .entry(shape)
            .or_insert_with(|| Arc::new(Breaker::new(&self.config)))
            .clone()
    }

    fn pop(&self, shape: Shape) -> Option<Leased> {
        if shape != self.shape {
            return None;
        }
        let vm = {
            let mut parked = lock(&self.parked);
            let vm = parked.pop()?;
            self.metrics.parked.set(parked.len() as i64);
            vm
        };
        self.wake.notify_one();
        Some(vm)
    }

    pub(super) fn park(&self, vm: Leased) {
        let mut parked = lock(&self.parked);
        // Under the lock: `close` empties the pool after it has set this.
        if self.closed.load(Ordering::Acquire) {
            drop(parked);
            return;
        }
        parked.push(vm);
        self.metrics.parked.set(parked.len() as i64);
        drop(parked);
        self.filled.send_replace(true);
    }

    /// Takes a parked VM out because it died; false if it is parked no more.
    pub(super) fn discard(&self, generation: u64) -> bool {
        let mut parked = lock(&self.parked);
        let Some(at) = parked.iter().position(|vm| vm.generation == generation) else {
            return false;
        };
        let dead = parked.remove(at);
        self.metrics.parked.set(parked.len() as i64);
        drop(parked);
        drop(dead);
        true
    }

    /// How many VMs are parked.
    pub(crate) fn parked(&self) -> usize {
        lock(&self.parked).len()
    }

    /// Resolves once a VM has been parked; at once if the pool is off.
    pub(crate) fn filled(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut filled = self.filled.subscribe();
        async move {
            if filled.wait_for(|filled| *filled).await.is_err() {
                tracing::debug!("the pool is gone");
            }
        }
    }

    /// Ends all parked VMs and parks no more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let all = std::mem::take(&mut *lock(&self.parked));
        self.metrics.parked.set(0);
        drop(all);
        self.wake.notify_one();
    }
}
