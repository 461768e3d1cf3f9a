//! Gives a session its VM: admission, claim, renewal.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tokio::time::Instant;

use super::core::Core;
use super::identity::{identity, settle};
use super::limits::{HostPermit, PlanPermit};
use super::line::Full;
use super::live::{End, Live};
use super::metrics::{Degradation, Phase};
use super::pool::Leased;
use super::session::Session;
use super::types::{PlanLimits, SessionError, SessionId, SessionSpec};
use super::vm::Frozen;
use super::watch::{Parting, VmEnd, VmStarted};

/// Restored VMs that may fail to confirm their identity before the session is refused.
const RENEW_TRIES: usize = 2;

/// VMs that may give way to one: an idle one has less memory than one is reckoned with.
const ROOM_TRIES: usize = 8;

/// How long a VM restored from a snapshot is given to finish what it was at.
const SETTLE: Duration = Duration::from_secs(10);

/// How long a VM that is to be frozen at the end of its lifetime waits for the command that runs.
const LAST_COMMAND: Duration = Duration::from_secs(5);

/// A VM that is to be started.
#[derive(Debug)]
pub struct Begin {
    /// The id that it gets.
    pub vm_id: String,
    /// What it is restored from; none: a template.
    pub from: Option<Arc<Frozen>>,
    /// The suspended VM whose life it goes on with.
    pub resumes: Option<String>,
}

/// Why there is no VM for a command.
#[derive(Debug)]
pub(crate) enum NoVm {
    /// The session was killed while its VM was being started.
    Killed,
    /// Something else.
    Error(SessionError),
}

impl From<SessionError> for NoVm {
    fn from(error: SessionError) -> Self {
        Self::Error(error)
    }
}

impl Core {
    /// The session's VM, started if need be, and whether it takes the place of an earlier one.
    /// The caller has the session's turn, so this runs once at a time. Dropping the future
    /// leaves the session as it was.
    pub(crate) async fn vm_of(
        self: &Arc<Self>,
        session: &Arc<Session>,
        limits: PlanLimits,
        kills: u64,
    ) -> Result<(Arc<Live>, bool), NoVm> {
        if let Some(live) = session.live(&self.reaper) {
            return Ok((live, false));
        }
        let mut begin = Begin {
            vm_id: mint_vm_id(),
            resumes: session.suspended(),
            from: None,
        };
        if let Some(asleep) = &begin.resumes {
            begin.from = self.watch.wake(asleep).await?;
            if begin.from.is_none() {
                session.give_up(asleep);
                begin.resumes = None;
            }
        }
        self.begin(session, limits, kills, begin).await
    }

    /// Starts a VM for a session that has none. The caller has the session's turn.
    pub(crate) async fn begin(
        self: &Arc<Self>,
        session: &Arc<Session>,
        limits: PlanLimits,
        kills: u64,
        begin: Begin,
    ) -> Result<(Arc<Live>, bool), NoVm> {
        let Begin {
            vm_id,
            from,
            resumes,
        } = begin;
        let permits = self.admit(session, limits).await;
        let permits = permits.inspect_err(|_| self.metrics.degraded(Degradation::Refused))?;
        let starting = session.starting(vm_id.clone());
        let restarted = starting.is_restart() && resumes.is_none();
        let spec = session.spec();
        let remaining = resumes.as_deref().and_then(|old| self.watch.remaining(old));
        let lifetime = remaining.unwrap_or(spec.lifetime);
        let leased = match &from {
            Some(frozen) => {
                // A copy is another VM, whose terminals nobody looks at.
                let terminals = match resumes {
                    Some(_) => session.terminals(),
                    None => Vec::new(),
                };
                self.thaw(&spec, &vm_id, frozen, terminals).await
            }
            None => self.take(&spec, &vm_id).await,
        };
        let leased = leased.map_err(|error| {
            tracing::error!(vm = vm_id, "a session got no VM: {error:#}");
            SessionError::Unavailable(error)
        })?;
        let Some(vm) = leased.keep() else {
            let empty = anyhow::anyhow!("a claimed VM was empty");
            return Err(SessionError::Unavailable(empty).into());
        };
        let shape = from.as_ref().map(|frozen| frozen.shape);
        let shape = shape.unwrap_or_else(|| self.config.shape(spec.memory_mib, spec.vcpus));
        // What it was not given in number, it gets in weight.
        vm.set_share(spec.vcpus.div_ceil(shape.vcpus.max(1)));
        let live = Arc::new(Live::new(vm_id, vm, lifetime, permits));
        if let Err(live) = starting.done(live.clone(), kills) {
            live.end(End::Killed, &self.reaper);
            return Err(NoVm::Killed);
        }
        let lingers = self.watch.started(VmStarted {
            tenant: session.tenant.clone(),
            session: session.id.clone(),
            vm_id: live.vm_id.clone(),
            memory_mib: shape.memory_mib,
            cores: shape.vcpus,
            expires_at: SystemTime::now() + lifetime,
            snapshot: from.map(|frozen| frozen.snapshot.clone()),
            resumes,
            spec,
        });
        live.lingers.store(lingers, Ordering::Release);
        self.metrics.vms.inc();
        tokio::spawn(keep(self.clone(), session.clone(), live.clone()));
        if self.is_draining() {
            session.end_vm(&live, End::Drained, &self.reaper);
            return Err(SessionError::ShuttingDown.into());
        }
        Ok((live, restarted))
    }

    /// Admits one more VM; on a full host, others that nobody uses may give way to it.
    async fn admit(
        &self,
        session: &Session,
        limits: PlanLimits,
    ) -> Result<(PlanPermit, HostPermit), SessionError> {
        let mut admitted = self.limits.admit(&session.tenant, limits).await;
        for _ in 0..ROOM_TRIES {
            let full = matches!(
                admitted,
                Err(SessionError::HostFull { .. } | SessionError::NoMemory)
            );
            if !full || !self.room.make().await {
                break;
            }
            self.limits.read_memory_anew();
            admitted = self.limits.admit(&session.tenant, limits).await;
        }
        admitted
    }

    /// Claims VMs until one confirms that it is this session's; the others are ended.
    async fn take(&self, spec: &SessionSpec, vm_id: &str) -> anyhow::Result<Leased> {
        let shape = self.config.shape(spec.memory_mib, spec.vcpus);
        if shape != self.config.pool_shape() || self.pool.parked() == 0 {
            self.pool.prepare(shape).await?;
        }
        let mut last = anyhow::anyhow!("no VM was tried");
        for _ in 0..RENEW_TRIES {
            let began = Instant::now();
            let claim = tokio::time::timeout(self.config.claim_wait(), self.pool.claim(shape));
            let leased = claim.await.map_err(|_| {
                anyhow::anyhow!("no VM of {shape} within {:?}", self.config.claim_wait())
            })??;
            self.metrics.phase(Phase::Claim, began.elapsed());
            let began = Instant::now();
            match self.renew(spec, vm_id, &leased, Vec::new()).await {
                Ok(()) => {
                    self.metrics.phase(Phase::Renew, began.elapsed());
                    self.pool.proved(shape);
                    return Ok(leased);
                }
                Err(error) => {
                    last = error.context("a restored VM did not confirm its new identity");
                    self.pool.renew_failed(shape, &format!("{last:#}"));
                }
            }
        }
        Err(last)
    }

    /// Restores a frozen VM and makes it this session's; one that does not confirm it is ended.
    async fn thaw(
        &self,
        spec: &SessionSpec,
        vm_id: &str,
        frozen: &Frozen,
        terminals: Vec<String>,
    ) -> anyhow::Result<Leased> {
        let leased = self.pool.thaw(frozen).await?;
        let began = Instant::now();
        let renewed = self.renew(spec, vm_id, &leased, terminals).await;
        renewed
            .inspect_err(|_| self.metrics.degraded(Degradation::RenewFailed))
            .context("a VM restored from a snapshot did not confirm its new identity")?;
        self.metrics.phase(Phase::Renew, began.elapsed());
        if let Some(vm) = leased.vm() {
            let settled = settle(&**vm, SETTLE).await;
            settled.context("a VM restored from a snapshot does not run")?;
        }
        Ok(leased)
    }

    async fn renew(
        &self,
        spec: &SessionSpec,
        vm_id: &str,
        leased: &Leased,
        terminals: Vec<String>,
    ) -> anyhow::Result<()> {
        let Some(vm) = leased.vm() else {
            anyhow::bail!("it is gone");
        };
        let short: String = vm_id.chars().filter(|c| *c != '-').take(8).collect();
        let (name, env) = (format!("thaw-{short}"), spec.env.clone());
        let renew = identity(leased.generation, name, env, terminals)?;
        let wait = Duration::from_millis(self.config.renew_wait_ms);
        tokio::time::timeout(wait, vm.renew(renew))
            .await
            .map_err(|_| anyhow::anyhow!("no answer within {wait:?}"))?
    }
}

/// Watches over one VM until it has ended: its lifetime, and death from within.
async fn keep(core: Arc<Core>, session: Arc<Session>, live: Arc<Live>) {
    tokio::spawn(note(core.clone(), session.id.clone(), live.vm_id.clone()));
    let how = tokio::select! {
        biased;
        how = live.ended() => how,
        how = expire(&core, &session, &live) => how,
        reason = live.vm.died() => End::Failed(reason),
    };
    if let End::Failed(reason) = &how {
        core.metrics.degraded(Degradation::VmDied);
        tracing::warn!(vm = live.vm_id, reason, "a session's VM died");
    }
    let first = session.end_vm(&live, how.clone(), &core.reaper);
    if how == End::Suspended && !first {
        session.park(&live.vm_id);
    }
    session.touch();
    core.metrics.vms.dec();
    // Whoever ended it first is right about why.
    let how = match live.how_ended().unwrap_or(how) {
        End::Killed => VmEnd::Killed,
        End::Expired(_) => VmEnd::Expired,
        End::Failed(reason) => VmEnd::Failed(reason),
        End::Drained => VmEnd::Drained,
        End::Suspended => VmEnd::Suspended,
    };
    core.watch.ended(&live.vm_id, how);
}

/// Waits for the end of a VM's lifetime, and for what somebody wants to do with it then.
async fn expire(core: &Core, session: &Session, live: &Live) -> End {
    live.expired().await;
    if !live.lingers.load(Ordering::Acquire) {
        return End::Expired(session.spec().lifetime);
    }
    // A command under way may finish, if it is quick: nothing new gets the VM meanwhile.
    let turn = match session.line.join(usize::MAX) {
        Ok(place) => tokio::time::timeout(LAST_COMMAND, place.turn()).await.ok(),
        Err(Full) => None,
    };
    let parting = core
        .watch
        .expiring(&live.vm_id, &live.vm, session.terminals())
        .await;
    drop(turn);
    match parting {
        Parting::End => End::Expired(session.spec().lifetime),
        Parting::Suspend => End::Suspended,
    }
}

/// A fresh VM's id.
pub(crate) fn mint_vm_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Stores which VM the session has, for a server that starts after this one.
async fn note(core: Arc<Core>, id: SessionId, vm_id: String) {
    if let Err(error) = core.rows.started(id, vm_id).await {
        core.metrics.degraded(Degradation::StoreFailed);
        tracing::warn!("a session's VM could not be noted: {error:#}");
    }
}
