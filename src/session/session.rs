//! One session: its line and what became of its VM.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
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
    /// What its next VM is made by.
    spec: Mutex<Arc<SessionSpec>>,
    /// Commands it was given since the server started.
    commands: AtomicU64,
    pub(crate) line: Arc<Line>,
    /// Held for moments only, never across an await.
    state: Mutex<State>,
    /// Told whenever the VM is another, or no more.
    changes: Notify,
    /// Names of its terminals that run, or sleep with the VM.
    terminals: Mutex<BTreeSet<String>>,
    /// Who uses the VM beside its commands: viewers of terminals, work on files.
    attended: AtomicUsize,
}

/// Somebody uses a session's VM: it is not idle until this is dropped.
#[derive(Debug)]
pub struct Attendance(Arc<Session>);

impl Drop for Attendance {
    fn drop(&mut self) {
        self.0.touch();
        self.0.attended.fetch_sub(1, Ordering::AcqRel);
    }
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
        last_vm: Option<(String, End)>,
    ) -> Self {
        let slot = last_vm.map_or(Slot::None, |(vm_id, how)| Slot::Ended(vm_id, how));
        Self {
            tenant,
            id,
            created_at,
            spec: Mutex::new(Arc::new(spec)),
            commands: AtomicU64::new(0),
            line: Arc::default(),
            state: Mutex::new(State {
                slot,
                last_used: Instant::now(),
                kills: 0,
            }),
            changes: Notify::new(),
            terminals: Mutex::default(),
            attended: AtomicUsize::new(0),
        }
    }

    /// Notes that somebody uses its VM.
    pub(crate) fn attend(self: &Arc<Self>) -> Attendance {
        self.attended.fetch_add(1, Ordering::AcqRel);
        Attendance(self.clone())
    }

    /// Names of its terminals.
    pub(crate) fn terminals(&self) -> Vec<String> {
        lock(&self.terminals).iter().cloned().collect()
    }

    /// Notes a terminal.
    pub(crate) fn keep_terminal(&self, name: &str) {
        lock(&self.terminals).insert(name.to_owned());
    }

    /// Notes that a terminal is no more.
    pub(crate) fn drop_terminal(&self, name: &str) {
        lock(&self.terminals).remove(name);
    }

    /// The VM that goes on with the life of this one, which was suspended. Waits for it; `None`: there will be none.
    pub(crate) async fn successor(&self, of: &str) -> Option<Arc<Live>> {
        loop {
            let changed = self.changes.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match &lock(&self.state).slot {
                Slot::Active(live) if live.vm_id != of => return Some(live.clone()),
                Slot::Active(_) | Slot::Ended(_, End::Suspended) => {}
                Slot::Starting { before, .. } => match before {
                    Some((_, End::Suspended)) => {}
                    _ => return None,
                },
                Slot::None | Slot::Ended(..) => return None,
            }
            changed.await;
        }
    }

    /// What its next VM is made by.
    pub(crate) fn spec(&self) -> Arc<SessionSpec> {
        lock(&self.spec).clone()
    }

    /// Makes its next VM by something else.
    pub(crate) fn set_spec(&self, spec: SessionSpec) {
        *lock(&self.spec) = Arc::new(spec);
    }

    /// Notes that it was given a command; gives the number of kills so far.
    pub(crate) fn commanded(&self) -> u64 {
        self.commands.fetch_add(1, Ordering::Relaxed);
        self.touch()
    }

    /// Commands it was given since the server started.
    pub(crate) fn commands(&self) -> u64 {
        self.commands.load(Ordering::Relaxed)
    }

    /// Its VM's id, if that is suspended.
    pub(crate) fn suspended(&self) -> Option<String> {
        match &lock(&self.state).slot {
            Slot::Ended(vm_id, End::Suspended) => Some(vm_id.clone()),
            _ => None,
        }
    }

    /// Notes that its suspended VM is given up for good, also while it is being resumed. False: that
    /// one is not suspended.
    pub(crate) fn give_up(&self, vm_id: &str) -> bool {
        let mut state = lock(&self.state);
        let (how, resuming) = match &mut state.slot {
            Slot::Ended(id, how) if id == vm_id => (how, false),
            Slot::Starting {
                before: Some((id, how)),
                ..
            } if id == vm_id => (how, true),
            _ => return false,
        };
        if *how != End::Suspended {
            return false;
        }
        *how = End::Killed;
        state.kills += u64::from(resuming);
        self.changes.notify_waiters();
        true
    }

    /// Notes that its VM was frozen before it ended, however it did.
    pub(crate) fn park(&self, vm_id: &str) {
        if let Slot::Ended(ended, how) = &mut lock(&self.state).slot
            && ended == vm_id
            && matches!(how, End::Failed(_) | End::Expired(_))
        {
            *how = End::Suspended;
            self.changes.notify_waiters();
        }
    }

    /// The VM that runs, if it is this one.
    pub(crate) fn running(&self, vm_id: &str) -> Option<Arc<Live>> {
        match &lock(&self.state).slot {
            Slot::Active(live) if live.vm_id == vm_id => Some(live.clone()),
            _ => None,
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
        if Instant::now() >= live.expires() && !live.lingers.load(Ordering::Acquire) {
            self.end_vm(&live, End::Expired(self.spec().lifetime), reaper);
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
        self.changes.notify_waiters();
        live.end(how, reaper)
    }

    /// Ends whatever VM there is.
    pub(crate) fn kill(&self, how: End, reaper: &Reaper) -> Killed {
        self.kill_only(None, how, reaper)
    }

    /// As [`Self::kill`], but only if it is this VM.
    pub(crate) fn kill_only(&self, only: Option<&str>, how: End, reaper: &Reaper) -> Killed {
        let other = |vm_id: &str| only.is_some_and(|only| only != vm_id);
        let live = {
            let mut state = lock(&self.state);
            match &state.slot {
                Slot::Starting { vm_id, .. } if other(vm_id) => return Killed::Nothing,
                Slot::Active(live) if other(&live.vm_id) => return Killed::Nothing,
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
        // Whoever suspended a VM means to come back.
        let gone = match &state.slot {
            Slot::None => true,
            Slot::Ended(_, how) => *how != End::Suspended,
            Slot::Starting { .. } | Slot::Active(_) => false,
        };
        let idle = gone && self.line.is_free();
        idle.then(|| state.last_used.elapsed())
    }

    /// Its VM, if that has had no command for so long, has none now, and nothing else is open in it; and for how long.
    pub(crate) fn idle_vm(&self, after: Duration) -> Option<(Duration, String)> {
        let state = lock(&self.state);
        let Slot::Active(live) = &state.slot else {
            return None;
        };
        let used = state.last_used.max(live.started).elapsed();
        let attended = self.attended.load(Ordering::Acquire) > 0;
        let idle = used >= after && self.line.is_free() && !attended;
        idle.then(|| (used, live.vm_id.clone()))
    }

    /// What can be told about it.
    pub(crate) fn view(&self) -> SessionView {
        let slot = lock(&self.state).slot.clone();
        let now = Instant::now();
        let mut view = SessionView {
            id: self.id.clone(),
            created_at: self.created_at,
            spec: (*self.spec()).clone(),
            vm: None,
            uptime: None,
            expires_in: None,
        };
        match slot {
            Slot::None => {}
            Slot::Active(live) if now < live.expires() || live.lingers.load(Ordering::Acquire) => {
                view.vm = Some((live.vm_id.clone(), VmStatus::Active));
                view.uptime = Some(now.duration_since(live.started));
                view.expires_in = Some(live.expires().saturating_duration_since(now));
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
        End::Suspended => VmStatus::Suspended,
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
            self.session.changes.notify_waiters();
            return Err(live);
        }
        state.slot = Slot::Active(live);
        self.session.changes.notify_waiters();
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
            self.session.changes.notify_waiters();
        }
    }
}
