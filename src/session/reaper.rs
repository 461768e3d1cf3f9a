//! Ends VMs off everybody's path, a few at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, watch};

use super::limits::HostPermit;
use super::metrics::Metrics;
use super::vm::Vm;

/// Longest that one VM's end is waited for before its place is given away: the kernel ends a
/// killed process in milliseconds, so something is wrong by then, and the log says so.
const LONGEST_END: Duration = Duration::from_secs(10);

/// VMs ended at a time, on top of the configured number, when the server goes down: below the
/// number of threads that tokio keeps for blocking work.
const HURRY: usize = 64;

/// Hand over a VM here to end it.
#[derive(Clone, Debug)]
pub(crate) struct Reaper {
    // Unbounded in type only: each VM is handed over once, and VMs are bounded.
    doomed: mpsc::UnboundedSender<(Arc<dyn Vm>, Option<HostPermit>)>,
    pending: watch::Sender<usize>,
    slots: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

impl Reaper {
    /// Starts the reaper's task; it ends when the last handle is dropped.
    pub(crate) fn start(concurrency: usize, metrics: Arc<Metrics>) -> Self {
        let (doomed, mut arrivals) = mpsc::unbounded_channel::<(Arc<dyn Vm>, Option<HostPermit>)>();
        let pending = watch::Sender::new(0);
        let done = pending.clone();
        let gauge = metrics.reaping.clone();
        let slots = Arc::new(Semaphore::new(concurrency.max(1)));
        let free = slots.clone();
        tokio::spawn(async move {
            while let Some((vm, permit)) = arrivals.recv().await {
                let Ok(slot) = free.clone().acquire_owned().await else {
                    return;
                };
                let (done, gauge) = (done.clone(), gauge.clone());
                tokio::spawn(async move {
                    if tokio::time::timeout(LONGEST_END, vm.end()).await.is_err() {
                        tracing::error!(?vm, "a VM's process does not end");
                    }
                    drop((vm, permit, slot));
                    gauge.dec();
                    done.send_modify(|pending| *pending -= 1);
                });
            }
        });
        Self {
            doomed,
            pending,
            slots,
            metrics,
        }
    }

    /// Ends many at a time from here on: nobody is left whom that could slow down.
    pub(crate) fn hurry(&self) {
        self.slots.add_permits(HURRY);
    }

    /// Ends this VM soon; the permit is given back when it is gone.
    pub(crate) fn end(&self, vm: Arc<dyn Vm>, permit: Option<HostPermit>) {
        self.pending.send_modify(|pending| *pending += 1);
        self.metrics.reaping.inc();
        if let Err(refused) = self.doomed.send((vm, permit.map(HostPermit::closing))) {
            // The runtime is going down, and dropping the VM ends it.
            drop(refused);
            self.pending.send_modify(|pending| *pending -= 1);
            self.metrics.reaping.dec();
        }
    }

    /// Resolves when nothing is being ended.
    pub(crate) async fn idle(&self) {
        let mut pending = self.pending.subscribe();
        if pending.wait_for(|pending| *pending == 0).await.is_err() {
            tracing::debug!("the reaper is gone");
        }
    }
}
