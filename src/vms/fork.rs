//! Forks: live copies of a VM, mid-flight, that share its memory until they write to it.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;

use super::{Status, VmError, VmRecord, Vms};
use crate::session::{Frozen, PlanLimits, SessionError, Shape, TenantId};

/// Most copies that one request makes: beyond, a client should look at what it got first.
pub const MOST_FORKS: u32 = 100;

/// What became of a fork.
#[derive(Debug)]
pub struct Forked {
    /// How long the source stood still; none: it was suspended.
    pub pause: Option<Duration>,
    /// Each copy, or why there is none.
    pub copies: Vec<Result<VmRecord, VmError>>,
}

impl Vms {
    /// Makes copies of a VM, each in a session of its own and with an identity, a clock and entropy of its own. The
    /// source stands still once, for as long as it takes to copy what it wrote, and goes on running. No disk is involved.
    ///
    /// # Errors
    /// The VM neither runs nor is suspended, or could not be frozen. What a single copy meets is in its place.
    pub async fn fork(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        vm_id: &str,
        count: u32,
        wait: bool,
    ) -> Result<Forked, VmError> {
        let record = self.get(tenant, vm_id)?;
        let session = self.session_of(&record)?;
        let spec = (*self.sessions.spec(tenant, &session)?).clone();
        let (frozen, pause) = match (record.status, &record.parked_in) {
            (Status::Suspended, Some(parked)) => {
                (self.snapshots().frozen(tenant, parked).await?.0, None)
            }
            _ => {
                let record = self.running(tenant, vm_id, "a fork needs one that runs")?;
                let vm = self.sessions.vm(tenant, &session, &record.vm_id)?;
                // In a task of its own: whoever asked may go away, the worker must not be left with an order half done.
                let freezing = tokio::spawn(async move {
                    let frost = vm.freeze().await?;
                    // A large VM's map takes a while to put together.
                    let layered = tokio::task::spawn_blocking(move || {
                        let memory = Arc::new(frost.layers()?);
                        anyhow::Ok((frost, memory))
                    });
                    layered.await?
                });
                let cut = |error: anyhow::Error| SessionError::Unavailable(error);
                let froze = freezing.await.map_err(|error| cut(error.into()))?;
                let (frost, memory) = froze.map_err(cut)?;
                let frozen = Frozen {
                    snapshot: format!("fork of {}", record.vm_id),
                    shape: Shape {
                        memory_mib: record.memory_mib,
                        vcpus: record.cores,
                    },
                    state: frost.state,
                    memory,
                };
                (Arc::new(frozen), Some(frost.pause))
            }
        };
        let copy = || self.copy(tenant, limits, &record, spec.clone(), frozen.clone(), wait);
        let copies = join_all((0..count.min(MOST_FORKS)).map(|_| copy())).await;
        let made = copies.iter().filter(|copy| copy.is_ok()).count();
        tracing::info!(vm = vm_id, made, ?pause, "a VM was forked");
        self.note("vm.forked", &record);
        Ok(Forked { pause, copies })
    }
}
