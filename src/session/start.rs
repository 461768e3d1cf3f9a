//! Gives a session its VM: admission, claim, renewal.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::core::Core;
use super::identity::identity;
use super::live::{End, Live};
use super::metrics::{Degradation, Phase};
use super::pool::Leased;
use super::session::Session;
use super::types::{PlanLimits, SessionError, SessionId};

/// Restored VMs that may fail to confirm their identity before the session is refused.
const RENEW_TRIES: usize = 2;

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
        let permits = self.limits.admit(&session.tenant, limits).await;
        let permits = permits.inspect_err(|_| self.metrics.degraded(Degradation::Refused))?;
        let vm_id = uuid::Uuid::new_v4().to_string();
        let starting = session.starting(vm_id.clone());
        let restarted = starting.is_restart();
        let leased = self.take(session, &vm_id).await.map_err(|error| {
            tracing::error!(vm = vm_id, "a session got no VM: {error:#}");
            SessionError::Unavailable(error)
        })?;
        let Some(vm) = leased.keep() else {
            let empty = anyhow::anyhow!("a claimed VM was empty");
            return Err(SessionError::Unavailable(empty).into());
        };
        let live = Arc::new(Live::new(vm_id, vm, session.spec.lifetime, permits));
        if let Err(live) = starting.done(live.clone(), kills) {
            live.end(End::Killed, &self.reaper);
            return Err(NoVm::Killed);
        }
        self.metrics.vms.inc();
        tokio::spawn(keep(self.clone(), session.clone(), live.clone()));
        if self.is_draining() {
            session.end_vm(&live, End::Drained, &self.reaper);
            return Err(SessionError::ShuttingDown.into());
        }
        Ok((live, restarted))
    }

    /// Claims VMs until one confirms that it is this session's; the others are ended.
    async fn take(&self, session: &Session, vm_id: &str) -> anyhow::Result<Leased> {
        let spec = &session.spec;
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
            match self.renew(session, vm_id, &leased).await {
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

    async fn renew(&self, session: &Session, vm_id: &str, leased: &Leased) -> anyhow::Result<()> {
        let Some(vm) = leased.vm() else {
            anyhow::bail!("it is gone");
        };
        let short: String = vm_id.chars().filter(|c| *c != '-').take(8).collect();
        let env = session.spec.env.clone();
        let renew = identity(leased.generation, format!("thaw-{short}"), env)?;
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
        () = tokio::time::sleep_until(live.expires) => End::Expired(session.spec.lifetime),
        reason = live.vm.died() => End::Failed(reason),
    };
    if let End::Failed(reason) = &how {
        core.metrics.degraded(Degradation::VmDied);
        tracing::warn!(vm = live.vm_id, reason, "a session's VM died");
    }
    session.end_vm(&live, how, &core.reaper);
    session.touch();
    core.metrics.vms.dec();
}

/// Stores which VM the session has, for a server that starts after this one.
async fn note(core: Arc<Core>, id: SessionId, vm_id: String) {
    if let Err(error) = core.rows.started(id, vm_id).await {
        core.metrics.degraded(Degradation::StoreFailed);
        tracing::warn!("a session's VM could not be noted: {error:#}");
    }
}
