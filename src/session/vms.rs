//! A session's VM as something that is started, frozen and ended by itself, and not only because a
//! command needs it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::BoxFuture;

use super::live::End;
use super::session::{Killed, Session};
use super::start::{Begin, NoVm};
use super::types::{PlanLimits, SessionError, SessionId, SessionSpec, SessionView, TenantId};
use super::vm::{Vm, VmFigures};
use super::{Sessions, start};

/// Most bytes of the variables that are staged in one VM, names and values.
const MOST_STAGED: usize = 64 << 10;

/// What a session has used.
#[derive(Clone, Debug)]
pub struct Usage {
    /// The session and its VM.
    pub view: SessionView,
    /// Commands it was given since the server started.
    pub commands: u64,
    /// What its VM has used, if one runs and answers.
    pub figures: Option<VmFigures>,
}

impl Sessions {
    /// A fresh VM's id, for [`Self::start_vm`].
    pub fn mint_vm_id() -> String {
        start::mint_vm_id()
    }

    /// Makes a session without starting its VM, whatever it is made with.
    ///
    /// # Errors
    /// [`SessionError::TooManySessions`], or the store's.
    pub async fn reserve(
        &self,
        tenant: &TenantId,
        spec: SessionSpec,
    ) -> Result<SessionId, SessionError> {
        let entry = self.admit(tenant, spec).await?;
        let id = entry.session()?.id.clone();
        entry.keep();
        Ok(id)
    }

    /// Forgets a session that was made for a VM which did not come to be.
    pub fn unmake(&self, tenant: &TenantId, id: &SessionId) {
        if let Ok(session) = self.session(tenant, id) {
            drop(super::sessions::Entry::of(self.core.clone(), session));
        }
    }

    /// Starts the VM of a session that has none, from a template or from what was frozen. A command that
    /// came before may have started one.
    ///
    /// # Errors
    /// [`SessionError::HasVm`], and what starting a VM may meet.
    pub async fn start_vm(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        id: &SessionId,
        begin: Begin,
    ) -> Result<(), SessionError> {
        if self.core.is_draining() {
            return Err(SessionError::ShuttingDown);
        }
        let session = self.session(tenant, id)?;
        let kills = session.touch();
        let limit = self.core.config.max_waiting;
        let place = session.line.join(limit);
        let place = place.map_err(|_| SessionError::QueueFull { limit })?;
        let _turn = place.turn().await;
        if let Some(live) = session.live(&self.core.reaper) {
            return Err(SessionError::HasVm(live.vm_id.clone()));
        }
        // It may have been ended, or resumed by somebody else, while this waited.
        if let Some(old) = &begin.resumes
            && !self.core.watch.is_suspended(old)
        {
            return Err(SessionError::NoVm(id.clone()));
        }
        let begun = self.core.begin(&session, limits, kills, begin);
        match begun.await {
            Ok(_) => Ok(()),
            Err(NoVm::Killed) => Err(SessionError::EndedEarly),
            Err(NoVm::Error(error)) => Err(error),
        }
    }

    /// What the session's next VM is made by.
    ///
    /// # Errors
    /// [`SessionError::NotFound`].
    pub fn spec(
        &self,
        tenant: &TenantId,
        id: &SessionId,
    ) -> Result<Arc<SessionSpec>, SessionError> {
        Ok(self.session(tenant, id)?.spec())
    }

    /// Makes the session's next VM by something else.
    ///
    /// # Errors
    /// [`SessionError::NotFound`], or it could not be stored.
    pub async fn respec(
        &self,
        tenant: &TenantId,
        id: &SessionId,
        spec: SessionSpec,
    ) -> Result<(), SessionError> {
        let session = self.session(tenant, id)?;
        let stored = self.core.rows.respec(id.clone(), spec.clone()).await;
        stored.map_err(SessionError::Unavailable)?;
        session.set_spec(spec);
        Ok(())
    }

    /// The VM, if it runs in this session.
    ///
    /// # Errors
    /// [`SessionError::NotFound`], [`SessionError::NoVm`].
    pub fn vm(
        &self,
        tenant: &TenantId,
        id: &SessionId,
        vm_id: &str,
    ) -> Result<Arc<dyn Vm>, SessionError> {
        let live = self.session(tenant, id)?.running(vm_id);
        let live = live.ok_or_else(|| SessionError::NoVm(id.clone()))?;
        Ok(live.vm.clone())
    }

    /// Freezes a VM by `save`, while no command runs in it, and ends it.
    ///
    /// # Errors
    /// It does not run, a command has it for longer than `patience`, or `save` failed; it goes on running then.
    pub async fn suspend(
        &self,
        tenant: &TenantId,
        id: &SessionId,
        vm_id: &str,
        patience: Duration,
        save: impl FnOnce(Arc<dyn Vm>) -> BoxFuture<'static, Result<(), SessionError>>,
    ) -> Result<(), SessionError> {
        let session = self.session(tenant, id)?;
        let no_vm = || SessionError::NoVm(id.clone());
        session.running(vm_id).ok_or_else(no_vm)?;
        let place = session.line.join(usize::MAX);
        let place = place.map_err(|_| SessionError::QueueFull { limit: usize::MAX })?;
        let turn = tokio::time::timeout(patience, place.turn()).await;
        let _turn = turn.map_err(|_| {
            let after = patience.as_secs();
            SessionError::Conflict(format!(
                "a command still runs in VM {vm_id} after {after} s; let it finish or end it, then suspend"
            ))
        })?;
        let live = session.running(vm_id).ok_or_else(no_vm)?;
        save(live.vm.clone()).await?;
        if !session.end_vm(&live, End::Suspended, &self.core.reaper) {
            session.park(vm_id);
        }
        Ok(())
    }

    /// Ends a VM that runs, is being started, or is suspended. False: it is none of these.
    ///
    /// # Errors
    /// [`SessionError::NotFound`].
    pub fn end_vm(
        &self,
        tenant: &TenantId,
        id: &SessionId,
        vm_id: &str,
    ) -> Result<bool, SessionError> {
        let session = self.session(tenant, id)?;
        let killed = session.kill_only(Some(vm_id), End::Killed, &self.core.reaper);
        Ok(!matches!(killed, Killed::Nothing) || session.give_up(vm_id))
    }

    /// Says whether somebody wants to freeze this VM at the end of its lifetime.
    ///
    /// # Errors
    /// [`SessionError::NotFound`].
    pub fn linger(
        &self,
        tenant: &TenantId,
        id: &SessionId,
        vm_id: &str,
        lingers: bool,
    ) -> Result<(), SessionError> {
        if let Some(live) = self.session(tenant, id)?.running(vm_id) {
            live.lingers.store(lingers, Ordering::Release);
        }
        Ok(())
    }

    /// Begins this VM's lifetime anew.
    ///
    /// # Errors
    /// [`SessionError::NotFound`], [`SessionError::NoVm`].
    pub fn renew_lifetime(
        &self,
        tenant: &TenantId,
        id: &SessionId,
        vm_id: &str,
        lifetime: Duration,
    ) -> Result<(), SessionError> {
        let live = self.session(tenant, id)?.running(vm_id);
        let live = live.ok_or_else(|| SessionError::NoVm(id.clone()))?;
        live.renew(lifetime);
        Ok(())
    }

    /// Gives variables to everything that runs in this VM from now on. They are kept in memory only
    /// and go with the VM.
    ///
    /// # Errors
    /// [`SessionError::NotFound`], [`SessionError::NoVm`], [`SessionError::Conflict`]: too many.
    pub fn stage_env(
        &self,
        tenant: &TenantId,
        id: &SessionId,
        vm_id: &str,
        env: BTreeMap<String, String>,
    ) -> Result<(), SessionError> {
        let live = self.session(tenant, id)?.running(vm_id);
        let live = live.ok_or_else(|| SessionError::NoVm(id.clone()))?;
        if live.stage_env(env, MOST_STAGED) {
            return Ok(());
        }
        Err(SessionError::Conflict(format!(
            "the variables staged in VM {vm_id} would take more than {MOST_STAGED} bytes"
        )))
    }

    /// What the session has used.
    ///
    /// # Errors
    /// [`SessionError::NotFound`].
    pub async fn usage(&self, tenant: &TenantId, id: &SessionId) -> Result<Usage, SessionError> {
        let session = self.session(tenant, id)?;
        let view = session.view();
        let live = view.vm.as_ref().and_then(|(id, _)| session.running(id));
        let figures = match live {
            Some(live) => match live.vm.figures().await {
                Ok(figures) => Some(figures),
                Err(error) => {
                    tracing::debug!("a VM gave no figures: {error:#}");
                    None
                }
            },
            None => None,
        };
        Ok(Usage {
            view,
            commands: session.commands(),
            figures,
        })
    }

    /// VMs of sessions that have had no command for so long, and nothing else that is open in them; the least recently
    /// used first.
    pub fn idle_vms(&self, after: Duration) -> Vec<(TenantId, String)> {
        let all = self.core.table.all().into_iter();
        let idle = all.filter_map(|session| {
            let (idle, vm_id) = session.idle_vm(after)?;
            Some((idle, session.tenant.clone(), vm_id))
        });
        let mut idle: Vec<_> = idle.collect();
        idle.sort_by_key(|(idle, ..)| std::cmp::Reverse(*idle));
        idle.into_iter()
            .map(|(_, tenant, vm_id)| (tenant, vm_id))
            .collect()
    }

    /// Every VM that runs for a session.
    pub fn all_vms(&self) -> Vec<(TenantId, String)> {
        let all = self.core.table.all().into_iter();
        let running = all.filter_map(|session| {
            let live = session.live(&self.core.reaper)?;
            Some((session.tenant.clone(), live.vm_id.clone()))
        });
        running.collect()
    }

    /// Requests for room on this host while it is full: whoever takes them frees a VM's place and says so.
    pub fn room_wanted(&self) -> tokio::sync::mpsc::Receiver<super::RoomWanted> {
        self.core.room.requests()
    }

    /// The tenant's sessions, newest first.
    pub fn of_tenant(&self, tenant: &TenantId) -> Vec<SessionView> {
        let all = self.core.table.all().into_iter();
        let mut mine: Vec<Arc<Session>> = all.filter(|s| s.tenant == *tenant).collect();
        mine.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        mine.iter().map(|session| session.view()).collect()
    }
}
