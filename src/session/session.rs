//! One session: its line and what became of its VM.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::line::{Line, lock};
use super::live::{End, Live};
use super::reaper::Reaper;
use super::types::{SessionId, SessionSpec, SessionView, TenantId, VmStatus};

/// A session.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) tenant: TenantId,
    pub(crate) id: SessionId,
    pub(crate) created_at: SystemTime,
    pub(crate) spec: SessionSpec,
    pub(crate) line: Arc<Line>,
    /// Held for moments only, never across an await.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    slot: Slot,
    last_used: Instant,
    /// Counts kills: a command accepted before one must not start a VM after it.
    kills: u64,
}

/// Where the session's VM is.
#[derive(Clone, Debug)]
enum Slot {
    /// There never was one.
    None,
    /// Who has the turn is getting one.
    Starting {
        vm_id: String,
        before: Option<(String, End)>,
    },
    /// It runs.
    Active(Arc<Live>),
    /// It is no more.
    Ended(String, End),
}

/// What there is to kill.
pub(crate) enum Killed {
    /// This VM was running.
    Vm(String),
    /// This VM was being started, and will not be used.
    Starting(String),
    /// Nothing.
    Nothing,
}

impl Session {
    pub(crate) fn new(tenant: TenantId, id: SessionId, spec: SessionSpec) -> Self {
        Self::restored(tenant, id, spec, SystemTime::now(), None)
    }

    /// A session known from before the server started; its VM is gone.
    pub(crate) fn restored(
        tenant: TenantId,
        id: SessionId,
        spec: SessionSpec,
        created_at: SystemTime,
        last_vm: Option<String>,
    ) -> Self {
        let gone = || End::Failed("the server was restarted".into());
        let slot = last_vm.map_or(Slot::None, |vm_id| Slot::Ended(vm_id, gone()));
        Self {
            tenant,
            id,
            created_at,
            spec,
            line: Arc::default(),
            state: Mutex::new(State {
                slot,
                last_used: Instant::now(),
                kills: 0,
            }),
        }
    }

    /// Notes that it is used; gives the number of kills so far.
    pub(crate) fn touch(&self) -> u64 {
        let mut state = lock(&self.state);
        state.last_used = Instant::now();
        state.kills
    }

    /// Whether it was killed since [`Self::touch`] gave this number.
    pub(crate) fn killed_since(&self, kills: u64) -> bool {
        lock(&self.state).kills != kills
    }

    /// The VM, if it runs. One whose lifetime has passed is ended here if its keeper is late.
    pub(crate) fn live(&self, reaper: &Reaper) -> Option<Arc<Live>> {
        let live = match &lock(&self.state).slot {
            Slot::Active(live) => live.clone(),
            _ => return None,
        };
        if Instant::now() >= live.expires {
            self.end_vm(&live, End::Expired(self.spec.lifetime), reaper);
            return None;
        }
        Some(live)
    }

    /// Notes that a VM is being started; the caller has the turn.
    pub(crate) fn starting(self: &Arc<Self>, vm_id: String) -> Starting {
        let mut state = lock(&self.state);
        let before = match std::mem::replace(&mut state.slot, Slot::None) {
            Slot::Ended(vm_id, how) => Some((vm_id, how)),
            _ => None,
        };
        state.slot = Slot::Starting { vm_id, before };
        Starting {
            session: self.clone(),
        }
    }

    /// Ends this VM, if it has not ended; says whether it did.
    pub(crate) fn end_vm(&self, live: &Arc<Live>, how: End, reaper: &Reaper) -> bool {
        {
            let mut state = lock(&self.state);
            if matches!(&state.slot, Slot::Active(active) if Arc::ptr_eq(active, live)) {
                state.slot = Slot::Ended(live.vm_id.clone(), how.clone());
            }
        }
        live.end(how, reaper)
    }

    /// Ends whatever VM there is.
    pub(crate) fn kill(&self, how: End, reaper: &Reaper) -> Killed {
        let live = {
            let mut state = lock(&self.state);
            match &state.slot {
                Slot::Starting { vm_id, .. } => {
                    let vm_id = vm_id.clone();
                    state.kills += 1;
                    return Killed::Starting(vm_id);
                }
                Slot::Active(live) => {
                    let live = live.clone();
                    state.kills += 1;
                    live
                }
                Slot::None | Slot::Ended(..) => return Killed::Nothing,
            }
        };
        self.end_vm(&live, how, reaper);
        Killed::Vm(live.vm_id.clone())
    }

    /// How long it has been unused; `None` while it has a VM or a command.
    pub(crate) fn unused_for(&self) -> Option<Duration> {
        let state = lock(&self.state);
        let idle = matches!(state.slot, Slot::None | Slot::Ended(..)) && self.line.is_free();
        idle.then(|| state.last_used.elapsed())
    }

    /// What can be told about it.
    pub(crate) fn view(&self) -> SessionView {
        let slot = lock(&self.state).slot.clone();
        let now = Instant::now();
        let mut view = SessionView {
            id: self.id.clone(),
            created_at: self.created_at,
            spec: self.spec.clone(),
            vm: None,
            uptime: None,
            expires_in: None,
        };
        match slot {
            Slot::None => {}
            Slot::Active(live) if now < live.expires => {
                view.vm = Some((live.vm_id.clone(), VmStatus::Active));
                view.uptime = Some(now.duration_since(live.started));
                view.expires_in = Some(live.expires.duration_since(now));
            }
            Slot::Active(live) => view.vm = Some((live.vm_id.clone(), VmStatus::Killed)),
            Slot::Starting { before, .. } => {
                view.vm = before.map(|(vm_id, how)| (vm_id, status(&how)));
            }
            Slot::Ended(vm_id, how) => view.vm = Some((vm_id, status(&how))),
        }
        view
    }
}

fn status(how: &End) -> VmStatus {
    match how {
        End::Killed | End::Expired(_) | End::Drained => VmStatus::Killed,
        End::Failed(_) => VmStatus::Failed,
    }
}

/// A VM being started. Dropping it takes the session back to what it was.
#[derive(Debug)]
pub(crate) struct Starting {
    session: Arc<Session>,
}

impl Starting {
    /// The VM runs now. Gives it back if the session was killed meanwhile.
    pub(crate) fn done(self, live: Arc<Live>, kills: u64) -> Result<(), Arc<Live>> {
        let mut state = lock(&self.session.state);
        if state.kills != kills {
            state.slot = Slot::Ended(live.vm_id.clone(), End::Killed);
            return Err(live);
        }
        state.slot = Slot::Active(live);
        Ok(())
    }

    /// Whether the session had a VM before.
    pub(crate) fn is_restart(&self) -> bool {
        let state = lock(&self.session.state);
        matches!(
            state.slot,
            Slot::Starting {
                before: Some(_),
                ..
            }
        )
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let mut state = lock(&self.session.state);
        if let Slot::Starting { before, .. } = &state.slot {
            state.slot = before
                .clone()
                .map_or(Slot::None, |(vm_id, how)| Slot::Ended(vm_id, how));
        }
    }
}
