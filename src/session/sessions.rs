//! The facade.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prometheus_client::registry::Registry;
use thaw_wire::message::Process;
use tokio::sync::watch;
use tokio::time::Instant;

use super::config::SessionConfig;
use super::core::Core;
use super::execute::Accepted;
use super::limits::{Limits, host_memory};
use super::line::Full;
use super::live::End;
use super::metrics::{Degradation, Metrics};
use super::output::Budget;
use super::pool::Pool;
use super::process::ProcessHandle;
use super::process::Sleeper;
use super::reaper::Reaper;
use super::refill::refill;
use super::room::Room;
use super::rows::{SessionRow, SessionRows};
use super::session::{Killed, Session};
use super::start::NoVm;
use super::table::{Table, TooMany};
use super::types::{
    Attached, Command, Outcome, PlanLimits, SessionError, SessionId, SessionSpec, SessionView,
    TenantId,
};
use super::vm::VmSource;
use super::watch::{NoWatch, VmWatch};
use super::workers::Workers;
use crate::store::{Store, StoredSessions};

/// Generations reserved per run of the server: more VMs than any run can start.
const GENERATIONS: u64 = 1 << 32;

/// How often unused sessions are looked for.
const SWEEP: Duration = Duration::from_secs(60);

/// Longest wait at shutdown, beyond the grace, for the workers to be gone.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// All sessions. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sessions {
    pub(super) core: Arc<Core>,
}

impl Sessions {
    /// Sessions kept in the store, on workers of this launcher and these templates. Returns before there is a
    /// template: see [`Self::pool_ready`].
    ///
    /// # Errors
    /// As [`Self::with_source`].
    pub async fn start(
        config: SessionConfig,
        store: Store,
        workers: Workers,
        watch: Arc<dyn VmWatch>,
        metrics: &mut Registry,
    ) -> anyhow::Result<Self> {
        let rows = Arc::new(StoredSessions::new(store));
        Self::with_watch(config, rows, Arc::new(workers), watch, metrics).await
    }

    /// As [`Self::with_watch`], with nobody who keeps account of VMs.
    ///
    /// # Errors
    /// As [`Self::with_watch`].
    pub async fn with_source(
        config: SessionConfig,
        rows: Arc<dyn SessionRows>,
        source: Arc<dyn VmSource>,
        metrics: &mut Registry,
    ) -> anyhow::Result<Self> {
        Self::with_watch(config, rows, source, Arc::new(NoWatch), metrics).await
    }

    /// Loads the known sessions and begins to fill the pool in the background.
    ///
    /// # Errors
    /// The configuration is wrong, or the store cannot be read.
    pub async fn with_watch(
        config: SessionConfig,
        rows: Arc<dyn SessionRows>,
        source: Arc<dyn VmSource>,
        watch: Arc<dyn VmWatch>,
        metrics: &mut Registry,
    ) -> anyhow::Result<Self> {
        config.check().map_err(anyhow::Error::msg)?;
        let metrics = Arc::new(Metrics::register(metrics));
        let generation = rows.reserve_generations(GENERATIONS).await?;
        let reaper = Reaper::start(config.reaper_concurrency, metrics.clone());
        let pool = Pool::new(&config, source, generation, reaper.clone(), metrics.clone());
        let table = Table::default();
        for row in rows.load().await? {
            let SessionRow {
                tenant,
                id,
                spec,
                created_at,
                last_vm,
            } = row;
            let last_vm = last_vm.map(|vm_id| {
                let how = if watch.is_suspended(&vm_id) {
                    End::Suspended
                } else {
                    End::Failed("the server was restarted".into())
                };
                (vm_id, how)
            });
            let suspended = last_vm.as_ref().filter(|(_, how)| *how == End::Suspended);
            let terminals = suspended.map(|(vm_id, _)| watch.terminals(vm_id));
            let session = Session::restored(tenant, id, spec, created_at, last_vm);
            for name in terminals.unwrap_or_default() {
                session.keep_terminal(&name);
            }
            // They were admitted once; a limit lowered since takes effect with new ones.
            if table.insert(Arc::new(session), usize::MAX).is_err() {
                tracing::warn!("a stored session was not loaded");
            }
        }
        metrics.sessions.set(table.len() as i64);
        let core = Arc::new(Core {
            table,
            pool: pool.clone(),
            limits: Limits::new(&config, host_memory),
            reaper,
            rows,
            watch,
            metrics,
            budget: Budget::new(config.output_total_bytes),
            running: watch::Sender::new(0),
            draining: AtomicBool::new(false),
            room: Room::default(),
            config,
        });
        tokio::spawn(refill(pool, core.running.subscribe()));
        tokio::spawn(sweep(Arc::downgrade(&core)));
        Ok(Self { core })
    }

    /// Makes a session. Its VM comes with its first command, or now if it has environment
    /// variables (a wrong plan or a full host shows at once then).
    ///
    /// # Errors
    /// [`SessionError::TooManySessions`], and what starting a VM may meet.
    pub async fn create(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        spec: SessionSpec,
    ) -> Result<SessionId, SessionError> {
        let core = &self.core;
        let eager = !spec.env.is_empty();
        let entry = self.admit(tenant, spec).await?;
        let session = entry.session()?;
        let id = session.id.clone();
        if eager {
            let Ok(place) = session.line.join(0) else {
                return Err(SessionError::NotFound(id));
            };
            let _turn = place.turn().await;
            match core.vm_of(&session, limits, session.touch()).await {
                // Killed by its owner, who cannot know its id yet: only by draining.
                Ok(_) | Err(NoVm::Killed) => {}
                Err(NoVm::Error(error)) => return Err(error),
            }
        }
        entry.keep();
        Ok(id)
    }

    /// Makes a session that is undone unless the entry is kept.
    pub(super) async fn admit(
        &self,
        tenant: &TenantId,
        spec: SessionSpec,
    ) -> Result<Entry, SessionError> {
        let core = &self.core;
        if core.is_draining() {
            return Err(SessionError::ShuttingDown);
        }
        let id = SessionId::mint();
        let session = Arc::new(Session::new(tenant.clone(), id.clone(), spec));
        let row = SessionRow {
            tenant: tenant.clone(),
            id: id.clone(),
            spec: (*session.spec()).clone(),
            created_at: session.created_at,
            last_vm: None,
        };
        let limit = core.config.max_sessions_per_tenant;
        let forgotten = core.table.insert(session.clone(), limit);
        let forgotten = forgotten.map_err(|TooMany| {
            core.metrics.degraded(Degradation::Refused);
            SessionError::TooManySessions { limit }
        })?;
        // Undone by its drop if anything below fails, or if the caller goes away.
        let entry = Entry {
            core: core.clone(),
            session: Some(session.clone()),
        };
        forget_rows(core, forgotten);
        core.metrics.sessions.set(core.table.len() as i64);
        if let Err(error) = core.rows.insert(row).await {
            core.metrics.degraded(Degradation::StoreFailed);
            tracing::error!("a session could not be stored: {error:#}");
            return Err(SessionError::Unavailable(error));
        }
        Ok(entry)
    }

    /// What can be told about a session.
    ///
    /// # Errors
    /// [`SessionError::NotFound`], also for another tenant's.
    pub fn view(&self, tenant: &TenantId, id: &SessionId) -> Result<SessionView, SessionError> {
        Ok(self.session(tenant, id)?.view())
    }

    /// Gives a command its place in its session's line, at once and for good: commands of one
    /// session run in the order of their acceptance. Follow with [`Self::run`].
    ///
    /// # Errors
    /// [`SessionError::NotFound`], [`SessionError::QueueFull`], [`SessionError::ShuttingDown`].
    pub fn accept(&self, tenant: &TenantId, id: &SessionId) -> Result<Accepted, SessionError> {
        if self.core.is_draining() {
            return Err(SessionError::ShuttingDown);
        }
        let session = self.session(tenant, id)?;
        let limit = self.core.config.max_waiting;
        let kills = session.commanded();
        let place = session.line.join(limit).map_err(|Full| {
            self.core.metrics.degraded(Degradation::Refused);
            SessionError::QueueFull { limit }
        })?;
        Ok(Accepted {
            session,
            place,
            at: Instant::now(),
            kills,
        })
    }

    /// Runs an accepted command when its turn comes. Dropping the future interrupts the
    /// command; the next one starts when it has stopped.
    ///
    /// # Errors
    /// No VM could be had, or the server is going down. What the command itself meets is an
    /// [`Outcome`].
    pub async fn run(
        &self,
        accepted: Accepted,
        limits: PlanLimits,
        command: Command,
        attached: Attached,
    ) -> Result<Outcome, SessionError> {
        self.core.run(accepted, limits, command, attached).await
    }

    /// [`Self::accept`] and [`Self::run`].
    ///
    /// # Errors
    /// Those of both.
    pub async fn execute(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        id: &SessionId,
        command: Command,
        attached: Attached,
    ) -> Result<Outcome, SessionError> {
        let accepted = self.accept(tenant, id)?;
        self.run(accepted, limits, command, attached).await
    }

    /// Starts a process in the session's VM, beside its commands.
    ///
    /// # Errors
    /// [`SessionError::NotFound`], and what starting a VM may meet.
    pub async fn open(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        id: &SessionId,
        process: Process,
    ) -> Result<ProcessHandle, SessionError> {
        let session = self.session(tenant, id)?;
        self.core.open(&session, limits, process).await
    }

    /// The terminals of VMs that earlier servers suspended.
    pub fn sleepers(&self) -> Vec<Sleeper> {
        let mut sleepers = Vec::new();
        for session in self.core.table.all() {
            let Some(suspended) = session.suspended() else {
                continue;
            };
            sleepers.extend(session.terminals().into_iter().map(|name| Sleeper {
                name,
                session: session.clone(),
                suspended: suspended.clone(),
            }));
        }
        sleepers
    }

    /// Names of a session's terminals that run, or sleep with its VM.
    pub fn terminals(&self, tenant: &TenantId, id: &SessionId) -> Vec<String> {
        let session = self.session(tenant, id);
        session
            .map(|session| session.terminals())
            .unwrap_or_default()
    }

    /// Wakes the session's VM if that is suspended; else does nothing.
    ///
    /// # Errors
    /// [`SessionError::NotFound`], [`SessionError::Asleep`], and what starting a VM may meet.
    pub async fn wake(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        id: &SessionId,
    ) -> Result<(), SessionError> {
        let session = self.session(tenant, id)?;
        self.core.wake(&session, limits).await
    }

    /// Ends the session's VM; gives its id. The session stays, its next command gets a fresh VM; commands
    /// that wait now do not run.
    ///
    /// # Errors
    /// [`SessionError::NotFound`], [`SessionError::NoVm`].
    pub async fn kill(&self, tenant: &TenantId, id: &SessionId) -> Result<String, SessionError> {
        let session = self.session(tenant, id)?;
        match session.kill(End::Killed, &self.core.reaper) {
            Killed::Vm(vm_id) | Killed::Starting(vm_id) => Ok(vm_id),
            Killed::Nothing => Err(SessionError::NoVm(id.clone())),
        }
    }

    /// [`Self::finish`] and [`Self::end_all`].
    pub async fn drain(&self, grace: Duration) {
        self.finish(grace).await;
        self.end_all().await;
    }

    /// Takes no more commands, and lets those that run finish within the grace. Commands that wait in line get
    /// [`SessionError::ShuttingDown`].
    pub async fn finish(&self, grace: Duration) {
        let core = &self.core;
        core.draining.store(true, Ordering::Release);
        core.pool.close();
        let mut running = core.running.subscribe();
        let finished = running.wait_for(|running| *running == 0);
        if tokio::time::timeout(grace, finished).await.is_err() {
            tracing::warn!("commands still ran at the end of the grace and were cut short");
        }
    }

    /// Ends every VM.
    pub async fn end_all(&self) {
        let core = &self.core;
        core.reaper.hurry();
        for session in core.table.all() {
            session.kill(End::Drained, &core.reaper);
        }
        if tokio::time::timeout(LAST_WAIT, core.reaper.idle())
            .await
            .is_err()
        {
            tracing::error!("some workers were not gone at shutdown");
        }
    }

    /// Resolves once the first VM is parked; at once if the pool is off.
    pub fn pool_ready(&self) -> impl Future<Output = ()> + Send + use<> {
        self.core.pool.filled()
    }

    #[cfg(test)]
    pub(super) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    pub(super) fn session(
        &self,
        tenant: &TenantId,
        id: &SessionId,
    ) -> Result<Arc<Session>, SessionError> {
        let session = self.core.table.get(tenant, id);
        session.ok_or_else(|| SessionError::NotFound(id.clone()))
    }
}

/// A session that its creator has not been told of yet.
pub(super) struct Entry {
    core: Arc<Core>,
    session: Option<Arc<Session>>,
}

impl Entry {
    pub(super) fn of(core: Arc<Core>, session: Arc<Session>) -> Self {
        Self {
            core,
            session: Some(session),
        }
    }

    pub(super) fn session(&self) -> Result<Arc<Session>, SessionError> {
        let gone = || SessionError::Unavailable(anyhow::anyhow!("a session went before it came"));
        self.session.clone().ok_or_else(gone)
    }

    /// The session stays.
    pub(super) fn keep(mut self) {
        self.session = None;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            session.kill(End::Killed, &self.core.reaper);
            self.core.table.remove(&session.tenant, &session.id);
            self.core.metrics.sessions.set(self.core.table.len() as i64);
            forget_rows(&self.core, vec![session.id.clone()]);
        }
    }
}

/// Removes rows in the background.
fn forget_rows(core: &Arc<Core>, ids: Vec<SessionId>) {
    let (false, Ok(runtime)) = (ids.is_empty(), tokio::runtime::Handle::try_current()) else {
        return;
    };
    let core = core.clone();
    runtime.spawn(async move {
        if let Err(error) = core.rows.forget(ids).await {
            core.metrics.degraded(Degradation::StoreFailed);
            tracing::warn!("forgotten sessions are still stored: {error:#}");
        }
    });
}

/// Forgets sessions that nobody uses any more, until the sessions themselves are gone.
async fn sweep(core: std::sync::Weak<Core>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        let Some(core) = core.upgrade() else { return };
        if core.is_draining() {
            return;
        }
        let age = Duration::from_secs(core.config.forget_after_s);
        let ids = core.table.remove_unused(age);
        core.metrics.sessions.set(core.table.len() as i64);
        forget_rows(&core, ids);
    }
}
