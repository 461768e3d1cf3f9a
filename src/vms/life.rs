//! What is done to a VM that is there: snapshots, suspending, resuming, its end.

use std::time::Duration;

use super::{Status, VmError, VmRecord, Vms};
use crate::session::{Begin, PlanLimits, SessionError, Sessions, TenantId};
use crate::snapshots::{Kind, SnapshotError};
use crate::store::now_ms;

impl Vms {
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
        self.freeze_and_end(tenant, vm_id, self.suspend_wait, Kind::Suspended)
            .await
    }

    /// As [`Self::suspend`], with this patience and into this kind of snapshot; one that hibernates wakes with any command.
    pub(super) async fn freeze_and_end(
        &self,
        tenant: &TenantId,
        vm_id: &str,
        wait: Duration,
        kind: Kind,
    ) -> Result<VmRecord, VmError> {
        let record = self.running(tenant, vm_id, "only one that runs can be suspended")?;
        let session = self.session_of(&record)?;
        let (this, tenant) = (self.clone(), tenant.clone());
        // Whoever asked may go away; a VM that is frozen must be noted as such.
        let suspending = tokio::spawn(async move {
            let (ledger, of) = (this.ledger.clone(), record.clone());
            let terminals = this.sessions.terminals(&tenant, &session);
            let save = |vm| -> futures_util::future::BoxFuture<'static, _> {
                Box::pin(async move {
                    let parked = ledger.freeze(&of, kind, None, vm).await;
                    let parked = parked.map_err(|e| SessionError::Conflict(e.to_string()))?;
                    // Before the VM ends: a command that comes then must find this.
                    ledger.change(&of.vm_id, |record| {
                        record.parked_in = Some(parked.id);
                        record.hibernated = kind == Kind::Hibernated;
                        record.terminals = terminals;
                        record.close(Status::Suspended, None, now_ms());
                    });
                    Ok(())
                })
            };
            this.sessions
                .suspend(&tenant, &session, &record.vm_id, wait, save)
                .await?;
            let said = match kind {
                Kind::Hibernated => "vm.hibernated",
                _ => "vm.suspended",
            };
            this.note(said, &record);
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
        let begin = Begin {
            vm_id: new_id.clone(),
            from: Some(frozen),
            resumes: Some(record.vm_id.clone()),
        };
        self.ledger.promise(&new_id, Some(&record.vm_id));
        self.start(tenant, limits, session, begin, false, wait)
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
}
