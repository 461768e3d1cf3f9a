//! A session's VM while it runs, and how it ended.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::limits::{HostPermit, PlanPermit};
use super::line::lock;
use super::process::MOST_PROCESSES;
use super::reaper::Reaper;
use super::vm::Vm;

/// Why a session's VM is no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Its owner killed it.
    Killed,
    /// Its lifetime passed.
    Expired(Duration),
    /// It died by itself, or had to be ended because a command would not stop.
    Failed(String),
    /// The server goes down.
    Drained,
    /// It is frozen on disk.
    Suspended,
}

impl End {
    /// What the user of a command that it cut short is told.
    pub(crate) fn note(&self) -> String {
        match self {
            Self::Killed => "thaw: the session's VM was killed".into(),
            Self::Expired(lifetime) => format!(
                "thaw: the session's VM reached the end of its lifetime of {} s",
                lifetime.as_secs()
            ),
            Self::Failed(reason) => {
                format!("thaw: the session's VM ended: {reason}; the next command gets a fresh one")
            }
            Self::Drained => "thaw: the server shut down".into(),
            Self::Suspended => "thaw: the session's VM was suspended".into(),
        }
    }
}

/// A VM that runs for a session.
#[derive(Debug)]
pub(crate) struct Live {
    /// Minted by the server, a new one with every VM.
    pub(crate) vm_id: String,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) started: Instant,
    /// When its lifetime ends. Told to its keeper whenever it is another.
    expires: watch::Sender<Instant>,
    /// An interpreter was replaced, and no command has told so yet.
    pub(crate) state_lost: AtomicBool,
    /// Somebody wants to freeze it at the end of its lifetime: only its keeper may end it then.
    pub(crate) lingers: AtomicBool,
    /// Variables for everything that is run from now on: in memory only, gone with the VM.
    staged: Mutex<BTreeMap<String, String>>,
    /// Room for processes beside its commands.
    pub(crate) processes: Arc<Semaphore>,
    ended: watch::Sender<Option<End>>,
    /// Given back when it ends; who takes them ends it.
    permits: Mutex<Option<(PlanPermit, HostPermit)>>,
}

impl Live {
    pub(crate) fn new(
        vm_id: String,
        vm: Arc<dyn Vm>,
        lifetime: Duration,
        permits: (PlanPermit, HostPermit),
    ) -> Self {
        let started = Instant::now();
        Self {
            vm_id,
            vm,
            started,
            expires: watch::Sender::new(started + lifetime),
            state_lost: AtomicBool::new(false),
            lingers: AtomicBool::new(false),
            staged: Mutex::default(),
            processes: Arc::new(Semaphore::new(MOST_PROCESSES)),
            ended: watch::Sender::new(None),
            permits: Mutex::new(Some(permits)),
        }
    }

    /// Ends it, the first time; its places are free when this returns, as far as the plan is
    /// concerned. Says whether this was the first time.
    pub(crate) fn end(&self, how: End, reaper: &Reaper) -> bool {
        let Some((plan, host)) = lock(&self.permits).take() else {
            return false;
        };
        self.ended.send_replace(Some(how));
        drop(plan);
        reaper.end(self.vm.clone(), Some(host));
        true
    }

    /// When its lifetime ends.
    pub(crate) fn expires(&self) -> Instant {
        *self.expires.borrow()
    }

    /// Its lifetime begins anew, and is this long.
    pub(crate) fn renew(&self, lifetime: Duration) {
        self.expires.send_replace(Instant::now() + lifetime);
    }

    /// Resolves when its lifetime has passed, however often it was renewed before.
    pub(crate) async fn expired(&self) {
        let mut expires = self.expires.subscribe();
        loop {
            let at = *expires.borrow_and_update();
            if Instant::now() >= at {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep_until(at) => {}
                changed = expires.changed() => if changed.is_err() {
                    // The sender lives in `self`.
                    return;
                },
            }
        }
    }

    /// Variables for everything that is run from now on.
    pub(crate) fn staged_env(&self) -> BTreeMap<String, String> {
        lock(&self.staged).clone()
    }

    /// Adds such variables; all of them together must not take more than `most` bytes.
    pub(crate) fn stage_env(&self, more: BTreeMap<String, String>, most: usize) -> bool {
        let mut staged = lock(&self.staged);
        let mut all = staged.clone();
        all.extend(more);
        let bytes: usize = all
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        if bytes <= most {
            *staged = all;
        }
        bytes <= most
    }

    /// How it ended, if it has.
    pub(crate) fn how_ended(&self) -> Option<End> {
        self.ended.borrow().clone()
    }

    /// Resolves when it has ended.
    pub(crate) async fn ended(&self) -> End {
        let mut ended = self.ended.subscribe();
        match ended.wait_for(Option::is_some).await {
            Ok(how) => how.clone().unwrap_or(End::Drained),
            // The sender lives in `self`.
            Err(_) => End::Drained,
        }
    }
}
