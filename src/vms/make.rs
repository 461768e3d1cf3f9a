//! Making VMs: fresh ones, ones restored from snapshots, copies of others.

use std::sync::Arc;

use super::{Cloned, NewVm, Options, Status, VmError, VmRecord, Vms};
use crate::session::{
    Begin, Frozen, PlanLimits, SessionError, SessionId, SessionSpec, Sessions, TenantId,
};
use crate::snapshots::Kind;
use crate::store::now_ms;

impl Vms {
    /// Makes a VM. Without `wait` its record is given at once, and tells later what came of it.
    ///
    /// # Errors
    /// It cannot be made; nothing is left then.
    pub async fn create(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        new: NewVm,
        wait: bool,
    ) -> Result<VmRecord, VmError> {
        let mut spec = new.spec;
        let from = match &new.snapshot {
            Some(id) => {
                let known = self.snapshots().any(tenant, id)?;
                let has = known.manifest.memory_mib;
                if new.memory_asked && spec.memory_mib != has {
                    return Err(VmError::State(format!(
                        "snapshot {id} has {has} MiB of memory, and a VM restored from it has as much: leave \
                         memory_mb out, or ask for {has}"
                    )));
                }
                spec.memory_mib = has;
                Some(self.snapshots().frozen(tenant, id).await?.0)
            }
            None => None,
        };
        let made_session = new.session.is_none();
        let session = match new.session {
            Some(id) => {
                self.free(tenant, &id)?;
                self.sessions.respec(tenant, &id, spec.clone()).await?;
                id
            }
            None => self.sessions.reserve(tenant, spec.clone()).await?,
        };
        let vm_id = Sessions::mint_vm_id();
        let record = VmRecord {
            vm_id: vm_id.clone(),
            tenant: tenant.0.clone(),
            session_id: session.to_string(),
            status: Status::Creating,
            reason: None,
            memory_mib: spec.memory_mib,
            vcpus: spec.vcpus,
            // Until it runs.
            cores: 1,
            lifetime_s: spec.lifetime.as_secs(),
            created_ms: now_ms(),
            started_ms: None,
            expires_ms: None,
            ended_ms: None,
            metadata: spec.metadata,
            snapshot_id: new.snapshot,
            parked_in: None,
            hibernated: false,
            rewound: None,
            terminals: Vec::new(),
            options: new.options,
            aliases: Vec::new(),
        };
        self.ledger.put(record.clone());
        self.note("vm.created", &record);
        if let Err(error) = self.ledger.flush().await {
            self.failed(tenant, &session, &vm_id, made_session, &error.to_string());
            return Err(error.into());
        }
        let begin = Begin {
            vm_id: vm_id.clone(),
            from,
            resumes: None,
        };
        self.start(tenant, limits, session, begin, made_session, wait)
            .await?;
        self.get(tenant, &vm_id)
    }

    /// Starts a VM in a task of its own, so that it comes to be, or not, whether or not anybody waits.
    pub(super) async fn start(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        session: SessionId,
        begin: Begin,
        made_session: bool,
        wait: bool,
    ) -> Result<(), VmError> {
        let (this, tenant) = (self.clone(), tenant.clone());
        let vm_id = begin.vm_id.clone();
        let starting = tokio::spawn(async move {
            let started = this
                .sessions
                .start_vm(&tenant, limits, &session, begin)
                .await;
            if let Err(error) = &started {
                this.ledger.promise(&vm_id, None);
                this.failed(&tenant, &session, &vm_id, made_session, &error.to_string());
            }
            let stored = this.ledger.flush().await;
            started?;
            Ok(stored?)
        });
        if !wait {
            return Ok(());
        }
        let cut = |error: tokio::task::JoinError| SessionError::Unavailable(error.into());
        starting.await.map_err(cut)?
    }

    /// A VM did not come to be.
    fn failed(
        &self,
        tenant: &TenantId,
        session: &SessionId,
        vm_id: &str,
        made_session: bool,
        why: &str,
    ) {
        let record = self.ledger.change(vm_id, |record| {
            if record.status == Status::Creating {
                record.close(Status::Failed, Some(why.to_owned()), now_ms());
            }
        });
        if let Some(record) = record {
            self.note("vm.failed", &record);
        }
        if made_session {
            self.sessions.unmake(tenant, session);
        }
    }

    /// Whether a session has no VM, not even a suspended one.
    fn free(&self, tenant: &TenantId, id: &SessionId) -> Result<(), VmError> {
        use crate::session::VmStatus;
        match self.sessions.view(tenant, id)?.vm {
            Some((vm_id, VmStatus::Active)) => Err(SessionError::HasVm(vm_id).into()),
            Some((vm_id, VmStatus::Suspended)) => Err(VmError::State(format!(
                "the session's VM {vm_id} is suspended; resume it or delete it first"
            ))),
            _ => Ok(()),
        }
    }

    /// Makes a copy of a VM, mid-flight, in a session of its own.
    ///
    /// # Errors
    /// The VM neither runs nor is suspended, or what a snapshot and a new VM may meet.
    pub async fn clone_vm(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        vm_id: &str,
        name: Option<String>,
        wait: bool,
    ) -> Result<Cloned, VmError> {
        let record = self.get(tenant, vm_id)?;
        let session = self.session_of(&record)?;
        let spec = (*self.sessions.spec(tenant, &session)?).clone();
        let (between, parked) = match (record.status, &record.parked_in) {
            (Status::Suspended, Some(parked)) => (None, parked.clone()),
            _ => {
                let record = self.running(tenant, vm_id, "a clone needs one that runs")?;
                let vm = self.sessions.vm(tenant, &session, &record.vm_id)?;
                let made = self.ledger.freeze(&record, Kind::Clone, name, vm).await?;
                (Some(made.id.clone()), made.id)
            }
        };
        let cloned = self.restore(tenant, limits, &record, spec, &parked, wait);
        let cloned = cloned.await;
        // The clone has its files open: their names are of no more use.
        if let Some(between) = &between
            && let Err(error) = self.snapshots().delete(tenant, between).await
        {
            tracing::warn!(
                snapshot = between,
                "a clone's snapshot is still there: {error}"
            );
        }
        Ok(Cloned {
            vm: cloned?,
            snapshot: between,
        })
    }

    async fn restore(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        of: &VmRecord,
        spec: SessionSpec,
        snapshot: &str,
        wait: bool,
    ) -> Result<VmRecord, VmError> {
        let (frozen, _) = self.snapshots().frozen(tenant, snapshot).await?;
        self.copy(tenant, limits, of, spec, frozen, wait).await
    }

    /// A VM restored from a frozen one, in a session of its own that is made as the original's was.
    pub(super) async fn copy(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        of: &VmRecord,
        spec: SessionSpec,
        frozen: Arc<Frozen>,
        wait: bool,
    ) -> Result<VmRecord, VmError> {
        let session = self.sessions.reserve(tenant, spec.clone()).await?;
        let vm_id = Sessions::mint_vm_id();
        let record = VmRecord {
            vm_id: vm_id.clone(),
            session_id: session.to_string(),
            status: Status::Creating,
            memory_mib: frozen.shape.memory_mib,
            created_ms: now_ms(),
            started_ms: None,
            expires_ms: None,
            ended_ms: None,
            snapshot_id: None,
            parked_in: None,
            hibernated: false,
            rewound: None,
            terminals: Vec::new(),
            aliases: Vec::new(),
            // A copy does not leave snapshots that its original was asked for.
            options: Options {
                auto_suspend: of.options.auto_suspend,
                auto_resume: of.options.auto_resume,
                ..Options::default()
            },
            ..of.clone()
        };
        self.ledger.put(record.clone());
        self.note("vm.created", &record);
        let begin = Begin {
            vm_id: vm_id.clone(),
            from: Some(frozen),
            resumes: None,
        };
        self.start(tenant, limits, session, begin, true, wait)
            .await?;
        self.get(tenant, &vm_id)
    }
}
