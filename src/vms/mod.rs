//! VMs as something that clients make, look at, freeze, copy and end.
//!
//! A VM is what a session runs on; here it has a record of its own, which outlives it. [`Vms`] is what
//! clients may do with them, [`Ledger`] the records, which the sessions report to.

mod books;
mod changes;
mod compare;
mod fork;
mod hibernate;
mod ledger;
mod life;
mod make;
mod record;
#[cfg(test)]
pub(crate) mod tests;
mod travel;
mod watching;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

pub use compare::{Change, How};
pub use fork::{Forked, MOST_FORKS};
pub use ledger::Ledger;
pub(crate) use record::one_core;
pub use record::{Options, Status, VmRecord};
pub use travel::payload;

use crate::audit::{Audit, Event};
use crate::session::{SessionError, SessionId, SessionSpec, Sessions, TenantId};
use crate::snapshots::{SnapshotError, Snapshots};
use crate::store::{StoreError, now_ms};
use crate::tapes::TapeError;

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
    /// A tape.
    #[error(transparent)]
    Tape(#[from] TapeError),
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
    /// Its lifetime begins anew, and is this long.
    pub lifetime: Option<Duration>,
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
        if let Some(lifetime) = change.lifetime {
            self.renew_lifetime(tenant, &record, lifetime)?;
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
            if let Some(lifetime) = change.lifetime {
                record.lifetime_s = lifetime.as_secs();
                let length = i64::try_from(lifetime.as_millis()).unwrap_or(i64::MAX);
                record.expires_ms = Some(now_ms().saturating_add(length));
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

    /// Begins the lifetime of a VM anew that runs or hibernates.
    fn renew_lifetime(
        &self,
        tenant: &TenantId,
        record: &VmRecord,
        lifetime: Duration,
    ) -> Result<(), VmError> {
        match record.status {
            // Asleep, its lifetime goes on by its record.
            Status::Suspended if record.hibernated => Ok(()),
            Status::Active => {
                let session = self.session_of(record)?;
                let vm_id = &record.vm_id;
                self.sessions
                    .renew_lifetime(tenant, &session, vm_id, lifetime)?;
                Ok(())
            }
            _ => Err(VmError::State(format!(
                "VM {} is {}; its lifetime begins anew when it runs",
                record.vm_id,
                record.status.name()
            ))),
        }
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
