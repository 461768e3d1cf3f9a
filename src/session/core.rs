//! What all sessions share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use super::config::SessionConfig;
use super::limits::Limits;
use super::metrics::Metrics;
use super::output::Budget;
use super::pool::Pool;
use super::reaper::Reaper;
use super::room::Room;
use super::rows::SessionRows;
use super::table::Table;
use super::watch::VmWatch;

/// The parts behind [`super::Sessions`].
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) config: SessionConfig,
    pub(crate) table: Table,
    pub(crate) pool: Arc<Pool>,
    pub(crate) limits: Limits,
    pub(crate) reaper: Reaper,
    pub(crate) rows: Arc<dyn SessionRows>,
    pub(crate) watch: Arc<dyn VmWatch>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) budget: Arc<Budget>,
    /// Commands that have their turn.
    pub(crate) running: watch::Sender<usize>,
    pub(crate) draining: AtomicBool,
    pub(crate) room: Room,
}

impl Core {
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Counts a command as running until the guard is dropped.
    pub(crate) fn busy(self: &Arc<Self>) -> Busy {
        self.running.send_modify(|running| *running += 1);
        self.metrics.running.inc();
        Busy(self.clone())
    }
}

/// A command has its turn.
#[derive(Debug)]
pub(crate) struct Busy(Arc<Core>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.running.send_modify(|running| *running -= 1);
        self.0.metrics.running.dec();
    }
}
