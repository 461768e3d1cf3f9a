//! VMs as something that clients make, look at, freeze, copy and end.
//!
//! A VM is what a session runs on; here it has a record of its own, which outlives it. [`Vms`] is what
//! clients may do with them, [`Ledger`] the records, which the sessions report to.

mod ledger;
mod record;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

pub use ledger::Ledger;
pub use record::{Options, Status, VmRecord};

use crate::audit::{Audit, Event};
use crate::session::{
    Frozen, PlanLimits, SessionError, SessionId, SessionSpec, Sessions, TenantId,
};
use crate::snapshots::{Kind, Manifest, SnapshotError, Snapshots};
use crate::store::{StoreError, now_ms};

/// Why a VM cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// There is none by this id that this tenant owns.
    #[error("no VM {0}")]
    NotFound(String),
    /// It is in another state than this needs; says what to do.
    #[error("{0}")]
    State(String),
    /// Its session.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A VM that is wanted.
#[derive(Clone, Debug)]
pub struct NewVm {
    /// The session that gets it; none: a new one.
    pub session: Option<SessionId>,
    /// What it is made with. For a session that is there already, what is changed is in it.
    pub spec: SessionSpec,
    /// What else is wanted of it.
    pub options: Options,
    /// The snapshot that it is restored from; none: it is fresh.
    pub snapshot: Option<String>,
    /// Guest memory was asked for by number, and must be what the snapshot has.
    pub memory_asked: bool,
}

/// What is to be changed about a VM.
#[derive(Clone, Debug, Default)]
pub struct VmChange {
    /// Labels.
    pub metadata: Option<BTreeMap<String, Value>>,
    /// See [`Options`].
    pub snapshot_on_terminate: Option<bool>,
    /// See [`Options`]; `Some(None)` takes it away.
    pub snapshot_name: Option<Option<String>>,
    /// See [`Options`].
    pub auto_suspend: Option<bool>,
    /// See [`Options`].
    pub auto_resume: Option<bool>,
    /// Guest memory, which must be what it has.
    pub memory_mib: Option<u32>,
}

/// A clone, and what became of what was between.
#[derive(Clone, Debug)]
pub struct Cloned {
    /// The clone.
    pub vm: VmRecord,
    /// The snapshot that it was made by, if one was made.
    pub snapshot: Option<String>,
}

/// What clients may do with VMs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Vms {
    sessions: Sessions,
    ledger: Arc<Ledger>,
    suspend_wait: Duration,
}

impl Vms {
    /// Over these sessions, which report to this ledger.
    pub fn new(sessions: Sessions, ledger: Arc<Ledger>, suspend_wait: Duration) -> Self {
        Self {
            sessions,
            ledger,
            suspend_wait,
        }
    }

    /// Writes everything that is not written yet, before the server goes.
    pub async fn settle(&self) {
        let (records, events) = tokio::join!(self.ledger.flush(), self.audit().flush());
        if let Err(error) = records.and(events) {
            tracing::error!(%error, "the last records of VMs could not be stored");
        }
    }

    /// The sessions.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// The snapshots.
    pub fn snapshots(&self) -> &Arc<Snapshots> {
        &self.ledger.snapshots
    }

    /// The audit log.
    pub fn audit(&self) -> &Arc<Audit> {
        &self.ledger.audit
    }

    /// One of the tenant's VMs, also by an id from before it was resumed.
    ///
    /// # Errors
    /// [`VmError::NotFound`].
    pub fn get(&self, tenant: &TenantId, vm_id: &str) -> Result<VmRecord, VmError> {
        let found = self.ledger.get(tenant, vm_id);
        found.ok_or_else(|| VmError::NotFound(vm_id.to_owned()))
    }

    /// The tenant's VMs, newest first; only those that are not over if `live`.
    pub fn list(&self, tenant: &TenantId, live: bool) -> Vec<VmRecord> {
        self.ledger.list(tenant, live)
    }

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
                let known = self.snapshots().get(tenant, id)?;
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
            lifetime_s: spec.lifetime.as_secs(),
            created_ms: now_ms(),
            started_ms: None,
            expires_ms: None,
            ended_ms: None,
            metadata: spec.metadata,
            snapshot_id: new.snapshot,
            parked_in: None,
            options: new.options,
            aliases: Vec::new(),
        };
        self.ledger.put(record.clone());
        self.note("vm.created", &record);
        if let Err(error) = self.ledger.flush().await {
            self.failed(tenant, &session, &vm_id, made_session, &error.to_string());
            return Err(error.into());
        }
        self.start(
            tenant,
            limits,
            session,
            vm_id.clone(),
            from,
            made_session,
            wait,
        )
        .await?;
        self.get(tenant, &vm_id)
    }

    /// Starts a VM in a task of its own, so that it comes to be, or not, whether or not anybody waits.
    #[allow(clippy::too_many_arguments)]
    async fn start(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        session: SessionId,
        vm_id: String,
        from: Option<Arc<Frozen>>,
        made_session: bool,
        wait: bool,
    ) -> Result<(), VmError> {
        let (this, tenant) = (self.clone(), tenant.clone());
        let starting = tokio::spawn(async move {
            let started = this
                .sessions
                .start_vm(&tenant, limits, &session, vm_id.clone(), from)
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

    /// Changes a VM's settings.
    ///
    /// # Errors
    /// It is not there or over, or another size of memory was asked for.
    pub async fn update(
        &self,
        tenant: &TenantId,
        vm_id: &str,
        change: VmChange,
    ) -> Result<VmRecord, VmError> {
        let record = self.get(tenant, vm_id)?;
        if record.status.is_over() {
            let status = record.status.name();
            return Err(VmError::State(format!("VM {vm_id} is {status}")));
        }
        if let Some(wanted) = change.memory_mib.filter(|mib| *mib != record.memory_mib) {
            let has = record.memory_mib;
            return Err(VmError::State(format!(
                "VM {vm_id} has {has} MiB and this server cannot change that while it lives; make one with \
                 memory_mb {wanted} instead"
            )));
        }
        if let (Some(metadata), Some(session)) = (&change.metadata, record.session()) {
            let mut spec = (*self.sessions.spec(tenant, &session)?).clone();
            spec.metadata = metadata.clone();
            self.sessions.respec(tenant, &session, spec).await?;
        }
        let changed = self.ledger.change(vm_id, |record| {
            let options = &mut record.options;
            let set = |value: Option<bool>, to: &mut bool| *to = value.unwrap_or(*to);
            set(
                change.snapshot_on_terminate,
                &mut options.snapshot_on_terminate,
            );
            set(change.auto_suspend, &mut options.auto_suspend);
            set(change.auto_resume, &mut options.auto_resume);
            if let Some(name) = change.snapshot_name {
                options.snapshot_name = name;
            }
            if let Some(metadata) = change.metadata {
                record.metadata = metadata;
            }
        });
        let record = changed.ok_or_else(|| VmError::NotFound(vm_id.to_owned()))?;
        if let Some(session) = record.session() {
            let lingers = record.options.lingers();
            self.sessions
                .linger(tenant, &session, &record.vm_id, lingers)?;
        }
        self.note("vm.updated", &record);
        self.ledger.flush().await?;
        Ok(record)
    }

    /// Ends a VM, after the snapshot that was asked for. One that is over already stays as it is.
    ///
    /// # Errors
    /// It is not there, or the snapshot could not be made; it goes on running then.
    pub async fn delete(&self, tenant: &TenantId, vm_id: &str) -> Result<VmRecord, VmError> {
        let record = self.get(tenant, vm_id)?;
        if record.status.is_over() {
            return Ok(record);
        }
        let session = self.session_of(&record)?;
        if record.status == Status::Active && record.options.snapshot_on_terminate {
            let vm = self.sessions.vm(tenant, &session, &record.vm_id)?;
            let name = record.options.snapshot_name.clone();
            let frozen = self.ledger.freeze(&record, Kind::User, name, vm).await;
            frozen.map_err(|error| {
                VmError::State(format!(
                    "VM {vm_id} goes on running, because the snapshot that it is to leave could not be made: {error}; \
                     set snapshot_on_terminate to false to end it without"
                ))
            })?;
        }
        match self.sessions.end_vm(tenant, &session, &record.vm_id) {
            Ok(_) | Err(SessionError::NotFound(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let mut fresh = false;
        let ended = self.ledger.change(&record.vm_id, |record| {
            fresh = !record.status.is_over();
            if fresh {
                record.close(Status::Terminated, None, now_ms());
            }
        });
        if fresh {
            self.note("vm.terminated", &record);
            self.ledger.unpark(&record);
        }
        self.ledger.flush().await?;
        Ok(ended.unwrap_or(record))
    }

    /// Makes a snapshot of a VM that runs. Without `wait` it is told of at once and made afterwards.
    ///
    /// # Errors
    /// The VM does not run, or the snapshot cannot be made.
    pub async fn snapshot(
        &self,
        tenant: &TenantId,
        vm_id: &str,
        name: Option<String>,
        wait: bool,
    ) -> Result<crate::snapshots::View, VmError> {
        let record = self.running(tenant, vm_id, "a snapshot needs one that runs")?;
        let vm = self
            .sessions
            .vm(tenant, &self.session_of(&record)?, &record.vm_id)?;
        let id = self
            .snapshots()
            .begin(&self.ledger.wish(&record, Kind::User, name))?;
        let (ledger, of) = (self.ledger.clone(), id.clone());
        let making = tokio::spawn(async move { ledger.make(&record, of, vm).await });
        if wait {
            making
                .await
                .map_err(|error| SnapshotError::NotMade(error.into()))??;
        }
        Ok(self.snapshots().get(tenant, &id)?)
    }

    /// Freezes a VM to disk and ends it, to go on later.
    ///
    /// # Errors
    /// It does not run, a command has it, or it could not be frozen; it goes on running then.
    pub async fn suspend(&self, tenant: &TenantId, vm_id: &str) -> Result<VmRecord, VmError> {
        let record = self.running(tenant, vm_id, "only one that runs can be suspended")?;
        let session = self.session_of(&record)?;
        let (this, tenant) = (self.clone(), tenant.clone());
        // Whoever asked may go away; a VM that is frozen must be noted as such.
        let suspending = tokio::spawn(async move {
            let (ledger, of) = (this.ledger.clone(), record.clone());
            let wait = this.suspend_wait;
            let save = |vm| -> futures_util::future::BoxFuture<'static, _> {
                Box::pin(async move {
                    let parked = ledger.freeze(&of, Kind::Suspended, None, vm).await;
                    let parked = parked.map_err(|e| SessionError::Conflict(e.to_string()))?;
                    // Before the VM ends: a command that comes then must find this.
                    ledger.change(&of.vm_id, |record| {
                        record.parked_in = Some(parked.id);
                        record.close(Status::Suspended, None, now_ms());
                    });
                    Ok(())
                })
            };
            this.sessions
                .suspend(&tenant, &session, &record.vm_id, wait, save)
                .await?;
            this.note("vm.suspended", &record);
            this.ledger.flush().await?;
            this.get(&tenant, &record.vm_id)
        });
        let cut = |error: tokio::task::JoinError| SessionError::Unavailable(error.into());
        suspending.await.map_err(cut)?
    }

    /// Lets a suspended VM go on, under a new id.
    ///
    /// # Errors
    /// It is not suspended, or cannot be restored; it stays suspended then.
    pub async fn resume(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        vm_id: &str,
        wait: bool,
    ) -> Result<VmRecord, VmError> {
        let record = self.get(tenant, vm_id)?;
        if record.status != Status::Suspended {
            let (id, status) = (&record.vm_id, record.status.name());
            return Err(VmError::State(format!(
                "VM {id} is {status}; only one that is suspended can be resumed"
            )));
        }
        let session = self.session_of(&record)?;
        let parked = record.parked_in.clone().unwrap_or_default();
        let (frozen, _) = self.snapshots().frozen(tenant, &parked).await?;
        let new_id = Sessions::mint_vm_id();
        let from = Some(frozen);
        self.ledger.promise(&new_id, Some(&record.vm_id));
        self.start(tenant, limits, session, new_id.clone(), from, false, wait)
            .await?;
        if wait {
            return self.get(tenant, &new_id);
        }
        Ok(VmRecord {
            vm_id: new_id,
            status: Status::Creating,
            ..record
        })
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
        let (frozen, manifest): (_, Manifest) = self.snapshots().frozen(tenant, snapshot).await?;
        let session = self.sessions.reserve(tenant, spec.clone()).await?;
        let vm_id = Sessions::mint_vm_id();
        let record = VmRecord {
            vm_id: vm_id.clone(),
            session_id: session.to_string(),
            status: Status::Creating,
            memory_mib: manifest.memory_mib,
            created_ms: now_ms(),
            started_ms: None,
            expires_ms: None,
            ended_ms: None,
            snapshot_id: None,
            parked_in: None,
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
        self.start(
            tenant,
            limits,
            session,
            vm_id.clone(),
            Some(frozen),
            true,
            wait,
        )
        .await?;
        self.get(tenant, &vm_id)
    }

    /// Stages variables in a VM, for everything that is run in it from now on.
    ///
    /// # Errors
    /// It does not run, or they would be too many.
    pub fn stage_env(
        &self,
        tenant: &TenantId,
        vm_id: &str,
        env: BTreeMap<String, String>,
    ) -> Result<VmRecord, VmError> {
        let record = self.running(tenant, vm_id, "variables are staged in one that runs")?;
        let session = self.session_of(&record)?;
        self.sessions
            .stage_env(tenant, &session, &record.vm_id, env)?;
        self.note("vm.env_staged", &record);
        Ok(record)
    }

    fn running(&self, tenant: &TenantId, vm_id: &str, need: &str) -> Result<VmRecord, VmError> {
        let record = self.get(tenant, vm_id)?;
        if record.status == Status::Active {
            return Ok(record);
        }
        let (id, status) = (&record.vm_id, record.status.name());
        Err(VmError::State(format!("VM {id} is {status}; {need}")))
    }

    fn session_of(&self, record: &VmRecord) -> Result<SessionId, VmError> {
        let session = record.session();
        session.ok_or_else(|| VmError::NotFound(record.vm_id.clone()))
    }

    fn note(&self, kind: &'static str, record: &VmRecord) {
        self.audit().note(
            &record.owner(),
            Event {
                kind,
                failed: kind == "vm.failed",
                vm_id: Some(record.vm_id.clone()),
                session_id: Some(record.session_id.clone()),
                detail: record.reason.clone(),
                ..Event::default()
            },
        );
    }
}
