//! Time travel: steps and their checkpoints while a session is recorded, going back, branching off.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::changes;
use super::{Change, Ledger, NewVm, Options, Status, VmError, VmRecord, Vms};
use crate::session::{
    Begin, Command, Outcome, PlanLimits, SessionId, SessionSpec, Sessions, Step, TenantId, Vm,
    VmStatus,
};
use crate::snapshots::{Kind, SnapshotError};
use crate::store::{NewTapeEvent, TapeRow, language_name};
use crate::tapes::{NewTape, Recording, TapeError, Tapes, excerpt};

/// How often tapes are looked at whose time may be over.
const LOOK: Duration = Duration::from_secs(60);

/// Lifetime of a branch whose session is no longer known.
const BRANCH_LIFETIME: Duration = Duration::from_secs(300);

impl Ledger {
    /// Freezes a VM before a command of a recorded session and puts the step on its tape. Whatever fails, the command
    /// runs: the tape says why there is no checkpoint.
    pub(super) async fn before_step(
        &self,
        tape: String,
        record: VmRecord,
        vm: Arc<dyn Vm>,
        command: &Command,
    ) -> Option<Step> {
        let mut payload = json!({
            "name": "execute",
            "language": language_name(command.language),
            "code": excerpt(&command.code),
            "vm_id": record.vm_id,
        });
        if let Some(context) = &command.context {
            payload["context"] = json!(context.as_str());
        }
        let checkpoint = match self.checkpoint(&record, vm.clone()).await {
            Ok(id) => Some(id),
            Err(error) => {
                payload["checkpoint_error"] = json!(error.to_string());
                None
            }
        };
        let event = NewTapeEvent {
            step: None,
            kind: "tool_call_start".to_owned(),
            payload: payload.to_string(),
            checkpoint,
        };
        let step = self.tapes.append(&tape, event).await;
        let step = step
            .inspect_err(|error| tracing::warn!(tape, "a step is not on its tape: {error}"))
            .ok();
        self.thin_out(&tape, &record.owner()).await;
        let began = SystemTime::now();
        step.map(|number| Step {
            tape,
            number,
            vm,
            began,
        })
    }

    /// Notes how a command of a recorded session ended.
    pub(super) async fn after_step(&self, step: Step, outcome: &Outcome) {
        let payload = json!({
            "name": "execute",
            "ok": outcome.exit_code == 0,
            "status": if outcome.exit_code == 0 { "ok" } else { "failed" },
            "exit_code": outcome.exit_code,
            "duration_ms": u64::try_from(outcome.execution_time.as_millis()).unwrap_or(u64::MAX),
            "timed_out": outcome.timed_out,
        });
        let event = NewTapeEvent {
            step: Some(step.number),
            kind: "tool_call_end".to_owned(),
            payload: payload.to_string(),
            checkpoint: None,
        };
        if let Err(error) = self.tapes.append(&step.tape, event).await {
            tracing::warn!(
                tape = step.tape,
                "the end of a step is not on its tape: {error}"
            );
        }
        let session = self.tapes.recording(&step.tape);
        if let Some(recording) = session.filter(|recording| recording.files) {
            self.note_files(&step, &recording).await;
        }
    }

    /// Notes the files that a step changed, as its guest tells of them.
    async fn note_files(&self, step: &Step, recording: &Recording) {
        let last = recording.looked_ns.load(Ordering::Relaxed);
        let began = step.began.duration_since(SystemTime::UNIX_EPOCH);
        let began_ns = began.map_or(0, |at| u64::try_from(at.as_nanos()).unwrap_or(0));
        // The guest's own clock, once it is known: the host's may be another.
        let since = if last == 0 { began_ns } else { last };
        let payload = match changes::since(&*step.vm, since).await {
            Ok(found) => {
                recording.looked_ns.store(found.now_ns, Ordering::Relaxed);
                json!({ "changed_paths": found.paths, "count": found.count, "status": "ok" })
            }
            Err(error) => {
                tracing::debug!("a guest does not tell which files changed: {error:#}");
                json!({ "changed_paths": [], "error": "the guest does not tell", "status": "failed" })
            }
        };
        let event = NewTapeEvent {
            step: Some(step.number),
            kind: "fs_summary".to_owned(),
            payload: payload.to_string(),
            checkpoint: None,
        };
        if let Err(error) = self.tapes.append(&step.tape, event).await {
            tracing::warn!(
                tape = step.tape,
                "a step's files are not on its tape: {error}"
            );
        }
    }

    async fn checkpoint(
        &self,
        record: &VmRecord,
        vm: Arc<dyn Vm>,
    ) -> Result<String, SnapshotError> {
        let id = self
            .snapshots
            .begin(&self.wish(record, Kind::Checkpoint, None))?;
        let (snapshots, of) = (self.snapshots.clone(), id.clone());
        // In a task of its own: whoever asked may go away, the VM's state must not.
        let made = tokio::spawn(async move { snapshots.make(&of, vm).await }).await;
        made.unwrap_or_else(|error| Err(SnapshotError::NotMade(error.into())))?;
        Ok(id)
    }

    async fn thin_out(&self, tape: &str, owner: &TenantId) {
        let keep = self.snapshots.checkpoints_kept();
        match self.tapes.thin_out(tape, keep).await {
            Ok(gone) => {
                self.drop_checkpoints(gone.into_iter().map(|id| (owner.clone(), id)))
                    .await
            }
            Err(error) => tracing::warn!(tape, "old checkpoints stay: {error}"),
        }
    }

    pub(super) async fn drop_checkpoints(
        &self,
        checkpoints: impl IntoIterator<Item = (TenantId, String)>,
    ) {
        for (owner, id) in checkpoints {
            match self.snapshots.delete(&owner, &id).await {
                Ok(_) | Err(SnapshotError::NotFound(_)) => {}
                Err(error) => tracing::warn!(snapshot = id, "a checkpoint stays: {error}"),
            }
        }
    }
}

impl Vms {
    /// The tapes.
    pub fn tapes(&self) -> &Tapes {
        &self.ledger.tapes
    }

    /// Begins to record a session.
    ///
    /// # Errors
    /// There is no such session, or too many tapes.
    pub async fn record(
        &self,
        tenant: &TenantId,
        session: &SessionId,
        files: bool,
        days: i64,
    ) -> Result<TapeRow, VmError> {
        let view = self.sessions.view(tenant, session)?;
        let new = NewTape {
            tenant: tenant.clone(),
            session: session.clone(),
            vm_id: view.vm.map(|(vm_id, _)| vm_id),
            files,
            days,
            parent: None,
        };
        Ok(self.tapes().start(new).await?)
    }

    /// Removes a tape with its checkpoints.
    ///
    /// # Errors
    /// It is not there.
    pub async fn delete_tape(&self, tenant: &TenantId, id: &str) -> Result<(), VmError> {
        let gone = self.tapes().delete(tenant, id).await?;
        let gone = gone.into_iter().map(|id| (tenant.clone(), id));
        self.ledger.drop_checkpoints(gone).await;
        Ok(())
    }

    /// Forgets tapes whose time is over. Never returns.
    pub async fn expire_tapes(self) {
        loop {
            tokio::time::sleep(LOOK).await;
            match self.tapes().expire().await {
                Ok(gone) => self.ledger.drop_checkpoints(gone).await,
                Err(error) => tracing::warn!("old tapes stay: {error}"),
            }
        }
    }

    /// The files that differ between the moments before two steps of a tape. `to` may be one beyond the last step: now.
    ///
    /// # Errors
    /// One of them has no checkpoint, or what comparing snapshots may meet.
    pub async fn tape_diff(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        tape: &str,
        from: i64,
        to: i64,
    ) -> Result<Vec<Change>, VmError> {
        let tape = self.tapes().get(tenant, tape).await?;
        let first = self.tapes().checkpoint(&tape.id, from).await?;
        if to != tape.steps + 1 {
            let second = self.tapes().checkpoint(&tape.id, to).await?;
            return self.changed_files(tenant, limits, &first, &second).await;
        }
        let (record, session) = self.recorded_vm(tenant, limits, &tape).await?;
        let vm = self.sessions.vm(tenant, &session, &record.vm_id)?;
        let now = self.ledger.freeze(&record, Kind::Clone, None, vm).await?;
        let changes = self.changed_files(tenant, limits, &first, &now.id).await;
        self.ledger
            .drop_checkpoints([(tenant.clone(), now.id)])
            .await;
        changes
    }

    /// Takes a recorded session back to the moment before a step. What it is now becomes a step of its own, so that the
    /// session can come back from there.
    ///
    /// # Errors
    /// There is no checkpoint, a command runs in the VM, or it cannot be restored; the session is as it was then.
    pub async fn rewind(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        tape: &str,
        step: i64,
    ) -> Result<(VmRecord, i64), VmError> {
        let tape = self.tapes().get(tenant, tape).await?;
        let target = self.tapes().checkpoint(&tape.id, step).await?;
        // Opened before anything ends: what cannot be restored must not cost the present.
        let (frozen, _) = self.snapshots().frozen(tenant, &target).await?;
        let (record, session) = self.recorded_vm(tenant, limits, &tape).await?;
        let (this, tenant) = (self.clone(), tenant.clone());
        // Whoever asked may go away; between the end and the start there is no VM.
        let going = tokio::spawn(async move {
            let parked = this
                .freeze_and_end(&tenant, &record.vm_id, this.suspend_wait, Kind::Checkpoint)
                .await?;
            let event = NewTapeEvent {
                step: None,
                kind: "rewind".to_owned(),
                payload: json!({ "to_step": step, "vm_id": parked.vm_id }).to_string(),
                checkpoint: parked.parked_in.clone(),
            };
            let here = this.tapes().append(&tape.id, event).await?;
            let new_id = Sessions::mint_vm_id();
            let begin = Begin {
                vm_id: new_id.clone(),
                from: Some(frozen),
                resumes: Some(parked.vm_id.clone()),
            };
            this.ledger.promise(&new_id, Some(&parked.vm_id));
            this.start(&tenant, limits, session, begin, false, true)
                .await?;
            this.ledger.change(&new_id, |record| {
                record.rewound = Some((target, crate::store::now_ms()));
            });
            let record = this.get(&tenant, &new_id)?;
            this.note("vm.rewound", &record);
            this.ledger.flush().await?;
            this.ledger.thin_out(&tape.id, &tenant).await;
            Ok((record, here))
        });
        let cut = |error: tokio::task::JoinError| {
            VmError::Session(crate::session::SessionError::Unavailable(error.into()))
        };
        going.await.map_err(cut)?
    }

    /// A new session that begins at the moment before a step of a tape, and is recorded as that one was.
    ///
    /// # Errors
    /// There is no checkpoint, or what making a VM from a snapshot may meet.
    pub async fn branch(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        tape: &str,
        step: i64,
    ) -> Result<(TapeRow, VmRecord), VmError> {
        let tape = self.tapes().get(tenant, tape).await?;
        let snapshot = self.tapes().checkpoint(&tape.id, step).await?;
        let manifest = self.snapshots().any(tenant, &snapshot)?.manifest;
        let session = SessionId::parse(&tape.session_id);
        let spec = session.and_then(|session| self.sessions.spec(tenant, &session).ok());
        let spec = spec.map_or_else(
            || SessionSpec {
                lifetime: BRANCH_LIFETIME,
                memory_mib: manifest.memory_mib,
                vcpus: manifest.vcpus,
                metadata: BTreeMap::new(),
                env: BTreeMap::new(),
            },
            |spec| (*spec).clone(),
        );
        let new = NewVm {
            session: None,
            spec,
            options: Options::default(),
            snapshot: Some(snapshot),
            memory_asked: false,
        };
        let vm = self.create(tenant, limits, new, true).await?;
        let new = NewTape {
            tenant: tenant.clone(),
            session: self.session_of(&vm)?,
            vm_id: Some(vm.vm_id.clone()),
            files: tape.files,
            days: crate::tapes::days_left(&tape),
            parent: Some((tape.id.clone(), step)),
        };
        let branch = self.tapes().start(new).await?;
        let event = NewTapeEvent {
            step: Some(step),
            kind: "branch".to_owned(),
            payload:
                json!({ "tape_id": branch.id, "vm_id": vm.vm_id, "session_id": vm.session_id })
                    .to_string(),
            checkpoint: None,
        };
        self.tapes().append(&tape.id, event).await?;
        Ok((branch, vm))
    }

    /// The VM of a recorded session, woken if it sleeps.
    async fn recorded_vm(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        tape: &TapeRow,
    ) -> Result<(VmRecord, SessionId), VmError> {
        let gone = || {
            TapeError::State(format!(
                "the session of tape {} has no VM; branch from it instead",
                tape.id
            ))
        };
        let session = SessionId::parse(&tape.session_id).ok_or_else(gone)?;
        let vm = match self.sessions.view(tenant, &session) {
            Ok(view) => view.vm,
            Err(crate::session::SessionError::NotFound(_)) => None,
            Err(error) => return Err(error.into()),
        };
        let (vm_id, status) = vm.ok_or_else(gone)?;
        let record = match status {
            VmStatus::Active => self.get(tenant, &vm_id)?,
            VmStatus::Suspended => self.resume(tenant, limits, &vm_id, true).await?,
            VmStatus::Killed | VmStatus::Failed => return Err(gone().into()),
        };
        match record.status {
            Status::Active => Ok((record, session)),
            _ => Err(gone().into()),
        }
    }
}

/// An event's payload as JSON; nothing of a tape can be no JSON, but a file can be edited.
pub fn payload(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| json!({}))
}
