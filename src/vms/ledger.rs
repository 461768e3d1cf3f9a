//! The records of all VMs, in memory while the server runs and in the database for the next one.
//!
//! Changes are written together a moment later, so that no command waits for the disk; who
//! must be sure of one uses [`Ledger::flush`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;

use super::books::Books;
use super::record::{MOST_ALIASES, Options, Status, VmRecord};
use crate::audit::{Audit, Event};
use crate::session::{
    Frozen, Next, Outcome, Parting, SessionError, Step, TenantId, Vm, VmEnd, VmStarted, VmWatch,
};
use crate::snapshots::{Kind, SnapshotError, Snapshots, Wish};
use crate::store::{Store, StoreError, VmRow, now_ms};
use crate::tapes::Tapes;

/// How long changes are gathered before they are written.
const GATHER: Duration = Duration::from_millis(250);

/// Keeps account of VMs.
#[derive(Debug)]
pub struct Ledger {
    store: Store,
    /// What happened.
    pub(super) audit: Arc<Audit>,
    /// Frozen VMs.
    pub(super) snapshots: Arc<Snapshots>,
    /// Recordings of sessions.
    pub(super) tapes: Tapes,
    keep_records: usize,
    books: Mutex<Books>,
    /// Held while changes are being written, so that they arrive in order.
    writing: tokio::sync::Mutex<()>,
}

impl Ledger {
    /// Reads the records. Those that say that a VM runs are of a server that did not end in order.
    ///
    /// # Errors
    /// The store's.
    pub async fn open(
        store: Store,
        audit: Arc<Audit>,
        snapshots: Arc<Snapshots>,
        keep_records: usize,
    ) -> Result<Arc<Self>, StoreError> {
        let rows = store.call(|c| VmRow::all(c)).await?;
        let mut books = Books::default();
        for row in rows {
            let mut record: VmRecord = match serde_json::from_str(&row.record) {
                Ok(record) => record,
                Err(error) => {
                    tracing::warn!(vm = row.id, %error, "a VM's record cannot be read");
                    continue;
                }
            };
            let reason = match record.status {
                Status::Creating | Status::Active => Some("the server ended without warning"),
                Status::Suspended => {
                    let there = record
                        .parked_in
                        .as_ref()
                        .is_some_and(|id| snapshots.has(id));
                    (!there).then_some("its snapshot is gone")
                }
                Status::Terminated | Status::Failed => None,
            };
            if let Some(reason) = reason {
                record.close(Status::Failed, Some(reason.to_owned()), now_ms());
                books.changed.insert(record.vm_id.clone());
            }
            for alias in &record.aliases {
                books.aliases.insert(alias.clone(), record.vm_id.clone());
            }
            books.records.insert(record.vm_id.clone(), record);
        }
        let records = books.records.values();
        let parked = records.filter(|record| record.status == Status::Suspended);
        let parked = parked.filter_map(|record| record.parked_in.clone());
        let tapes = Tapes::open(store.clone()).await?;
        let named = parked.chain(tapes.all_checkpoints().await?).collect();
        snapshots.remove_unnamed(&named);
        let ledger = Arc::new(Self {
            store,
            audit,
            snapshots,
            tapes,
            keep_records,
            books: Mutex::new(books),
            writing: tokio::sync::Mutex::default(),
        });
        let weak = Arc::downgrade(&ledger);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(GATHER).await;
                let Some(ledger) = weak.upgrade() else { return };
                if let Err(error) = ledger.flush().await {
                    tracing::error!(%error, "records of VMs are not stored yet");
                }
            }
        });
        Ok(ledger)
    }

    /// Writes what has changed; durable when it returns.
    ///
    /// # Errors
    /// The store's; what has changed is written later then.
    pub async fn flush(&self) -> Result<(), StoreError> {
        let _writing = self.writing.lock().await;
        let (changed, removed) = {
            let mut books = self.books();
            let changed = std::mem::take(&mut books.changed);
            (changed, std::mem::take(&mut books.removed))
        };
        if changed.is_empty() && removed.is_empty() {
            return Ok(());
        }
        let rows = {
            let books = self.books();
            let records = changed.iter().filter_map(|vm_id| books.records.get(vm_id));
            let row = |record: &VmRecord| match serde_json::to_string(record) {
                Ok(text) => Some(VmRow {
                    id: record.vm_id.clone(),
                    record: text,
                }),
                Err(error) => {
                    tracing::error!(%error, "a VM's record cannot be written as JSON");
                    None
                }
            };
            records.filter_map(row).collect::<Vec<_>>()
        };
        let gone = removed.clone();
        let written = self.store.call(move |c| VmRow::change(c, &rows, &gone));
        if let Err(error) = written.await {
            let mut books = self.books();
            books.changed.extend(changed);
            books.removed.extend(removed);
            return Err(error);
        }
        Ok(())
    }

    /// The tenant's VM of this id, or that had this id before it was resumed.
    pub fn get(&self, tenant: &TenantId, vm_id: &str) -> Option<VmRecord> {
        let books = self.books();
        let found = books.get(vm_id).filter(|record| record.tenant == tenant.0);
        found.cloned()
    }

    /// The tenant's VMs, newest first; only those that are not over if `live`.
    pub fn list(&self, tenant: &TenantId, live: bool) -> Vec<VmRecord> {
        let books = self.books();
        let mine = books
            .records
            .values()
            .filter(|record| record.tenant == tenant.0 && !(live && record.status.is_over()));
        let mut found: Vec<VmRecord> = mine.cloned().collect();
        found.sort_by(|a, b| {
            let key = |record: &VmRecord| (record.created_ms, record.vm_id.clone());
            key(b).cmp(&key(a))
        });
        found
    }

    /// VMs that hibernate although their lifetime has passed by then.
    pub(super) fn sleepers(&self, now_ms: i64) -> Vec<VmRecord> {
        let books = self.books();
        let found = books.records.values().filter(|vm| vm.sleeps_beyond(now_ms));
        found.cloned().collect()
    }

    /// Adds a record.
    pub(super) fn put(&self, record: VmRecord) {
        self.books().put(record);
    }

    /// Lets a VM be found by the id that it is going to have, or no longer.
    pub(super) fn promise(&self, id: &str, vm_id: Option<&str>) {
        let mut books = self.books();
        match vm_id {
            Some(vm_id) => books.aliases.insert(id.to_owned(), vm_id.to_owned()),
            None => books.aliases.remove(id),
        };
    }

    /// Changes a record; gives what it is then.
    pub(super) fn change(
        &self,
        vm_id: &str,
        change: impl FnOnce(&mut VmRecord),
    ) -> Option<VmRecord> {
        let mut books = self.books();
        let id = books.resolve(vm_id).to_owned();
        let record = books.records.get_mut(&id)?;
        change(record);
        let record = record.clone();
        books.changed.insert(id);
        if record.status.is_over() {
            books.prune(&record.tenant, self.keep_records);
        }
        Some(record)
    }

    /// Freezes a VM, as its record wants it.
    pub(super) async fn freeze(
        &self,
        record: &VmRecord,
        kind: Kind,
        name: Option<String>,
        vm: Arc<dyn Vm>,
    ) -> Result<crate::snapshots::Manifest, SnapshotError> {
        let id = self.snapshots.begin(&self.wish(record, kind, name))?;
        self.make(record, id, vm).await
    }

    /// What a snapshot of this VM is.
    pub(super) fn wish(&self, record: &VmRecord, kind: Kind, name: Option<String>) -> Wish {
        Wish {
            tenant: record.owner(),
            name: name.unwrap_or_default(),
            kind,
            vm_id: record.vm_id.clone(),
            session: record
                .session()
                .unwrap_or_else(crate::session::SessionId::mint),
            memory_mib: record.memory_mib,
            vcpus: record.vcpus,
            parent: record.snapshot_id.clone(),
            aliases: record.aliases.clone(),
            rewound: record.rewound.clone(),
        }
    }

    /// Makes a snapshot that was begun, and notes it.
    pub(super) async fn make(
        &self,
        record: &VmRecord,
        id: String,
        vm: Arc<dyn Vm>,
    ) -> Result<crate::snapshots::Manifest, SnapshotError> {
        // In a task of its own: whoever asked may go away, the VM's state must not.
        let (snapshots, of) = (self.snapshots.clone(), id.clone());
        let made = tokio::spawn(async move { snapshots.make(&of, vm).await }).await;
        let made = made.unwrap_or_else(|error| Err(SnapshotError::NotMade(error.into())));
        self.audit.note(
            &record.owner(),
            Event {
                kind: "snapshot.created",
                failed: made.is_err(),
                vm_id: Some(record.vm_id.clone()),
                session_id: Some(record.session_id.clone()),
                resource: Some(("snapshot", id)),
                detail: made.as_ref().err().map(ToString::to_string),
                ..Event::default()
            },
        );
        made
    }

    /// Removes the snapshot that a VM was while it was suspended.
    pub(super) fn unpark(&self, record: &VmRecord) {
        let Some(id) = record.parked_in.clone() else {
            return;
        };
        let (snapshots, tenant) = (self.snapshots.clone(), record.owner());
        tokio::spawn(async move {
            if let Err(error) = snapshots.unpark(&tenant, &id).await {
                tracing::warn!(
                    snapshot = id,
                    "a resumed VM's snapshot is still there: {error}"
                );
            }
        });
    }

    fn tell(&self, record: &VmRecord, kind: &'static str, by_itself: bool) {
        self.audit.note(
            &record.owner(),
            Event {
                kind,
                failed: kind == "vm.failed",
                by_itself,
                vm_id: Some(record.vm_id.clone()),
                session_id: Some(record.session_id.clone()),
                detail: record.reason.clone(),
                ..Event::default()
            },
        );
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VmWatch for Ledger {
    fn started(&self, vm: VmStarted) -> bool {
        let now = now_ms();
        let expires = vm.expires_at.duration_since(SystemTime::UNIX_EPOCH);
        let expires_ms = expires.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX));
        let (record, parked) = {
            let mut books = self.books();
            let before = vm.resumes.as_deref().and_then(|old| books.remove(old));
            let expected = books.records.get(&vm.vm_id).cloned();
            let options = before.as_ref().or(expected.as_ref());
            let options = options.map_or_else(Options::default, |record| record.options.clone());
            let mut aliases = before.as_ref().map_or_else(Vec::new, |old| {
                let mut aliases = old.aliases.clone();
                aliases.push(old.vm_id.clone());
                aliases
            });
            let beyond = aliases.len().saturating_sub(MOST_ALIASES);
            aliases.drain(..beyond);
            let origin = before.as_ref().or(expected.as_ref());
            let record = VmRecord {
                vm_id: vm.vm_id,
                tenant: vm.tenant.0,
                session_id: vm.session.to_string(),
                status: Status::Active,
                reason: None,
                memory_mib: vm.memory_mib,
                vcpus: vm.spec.vcpus,
                lifetime_s: vm.spec.lifetime.as_secs(),
                created_ms: origin.map_or(now, |record| record.created_ms),
                started_ms: Some(now),
                expires_ms: Some(expires_ms),
                ended_ms: None,
                metadata: origin.map_or_else(
                    || vm.spec.metadata.clone(),
                    |record| record.metadata.clone(),
                ),
                snapshot_id: match origin {
                    Some(record) => record.snapshot_id.clone(),
                    None => vm.snapshot,
                },
                parked_in: None,
                hibernated: false,
                rewound: origin.and_then(|record| record.rewound.clone()),
                terminals: Vec::new(),
                options,
                aliases,
            };
            books.put(record.clone());
            (record, before)
        };
        match parked {
            Some(old) => {
                self.unpark(&old);
                self.tell(&record, "vm.resumed", false);
            }
            None => self.tell(&record, "vm.started", false),
        }
        record.options.lingers()
    }

    fn ended(&self, vm_id: &str, how: VmEnd) {
        let now = now_ms();
        let (status, reason, kind, by_itself) = match how {
            VmEnd::Killed => (Status::Terminated, None, "vm.terminated", false),
            VmEnd::Expired => {
                let reason = Some("its lifetime passed".to_owned());
                (Status::Terminated, reason, "vm.terminated", true)
            }
            VmEnd::Drained => {
                let reason = Some("the server shut down".to_owned());
                (Status::Terminated, reason, "vm.terminated", true)
            }
            VmEnd::Failed(reason) => (Status::Failed, Some(reason), "vm.failed", true),
            VmEnd::Suspended => (Status::Suspended, None, "vm.suspended", false),
        };
        let mut fresh = false;
        let record = self.change(vm_id, |record| {
            // Who suspended or ended it may have noted that already, and more may have happened since.
            fresh = matches!(record.status, Status::Creating | Status::Active);
            if fresh {
                record.close(status, reason, now);
            }
        });
        if let Some(record) = record.filter(|_| fresh) {
            self.tell(&record, kind, by_itself);
        }
    }

    fn expiring<'a>(&'a self, vm_id: &'a str, vm: &'a Arc<dyn Vm>) -> BoxFuture<'a, Parting> {
        Box::pin(async move {
            let Some(record) = self.books().get(vm_id).cloned() else {
                return Parting::End;
            };
            if record.options.auto_suspend {
                let parked = self.freeze(&record, Kind::Suspended, None, vm.clone());
                match parked.await {
                    Ok(parked) => {
                        // Before the VM ends: a command that comes then must find this.
                        let suspended = self.change(vm_id, |record| {
                            record.parked_in = Some(parked.id);
                            record.close(Status::Suspended, None, now_ms());
                        });
                        self.tell(&suspended.unwrap_or(record), "vm.suspended", true);
                        return Parting::Suspend;
                    }
                    Err(error) => {
                        tracing::warn!(vm = vm_id, "a VM is not suspended but ended: {error}");
                    }
                }
            }
            if record.options.snapshot_on_terminate {
                let name = record.options.snapshot_name.clone();
                if let Err(error) = self.freeze(&record, Kind::User, name, vm.clone()).await {
                    tracing::warn!(vm = vm_id, "no snapshot at the end of a lifetime: {error}");
                }
            }
            Parting::End
        })
    }

    fn before<'a>(&'a self, next: Next<'a>) -> Option<BoxFuture<'a, Option<Step>>> {
        let tape = self.tapes.of(next.session)?.tape;
        let record = self.books().get(next.vm_id).cloned()?;
        let vm = next.vm.clone();
        Some(Box::pin(self.before_step(tape, record, vm, next.command)))
    }

    fn after<'a>(&'a self, step: Step, outcome: &'a Outcome) -> BoxFuture<'a, ()> {
        Box::pin(self.after_step(step, outcome))
    }

    fn remaining(&self, vm_id: &str) -> Option<Duration> {
        let books = self.books();
        let record = books.get(vm_id).filter(|record| record.hibernated)?;
        let left = record.expires_ms?.saturating_sub(now_ms());
        Some(Duration::from_millis(u64::try_from(left).unwrap_or(0)))
    }

    fn is_suspended(&self, vm_id: &str) -> bool {
        let books = self.books();
        books
            .get(vm_id)
            .is_some_and(|record| record.status == Status::Suspended)
    }

    fn terminals(&self, vm_id: &str) -> Vec<String> {
        let record = self.books().get(vm_id).cloned();
        record.map(|record| record.terminals).unwrap_or_default()
    }

    fn wake<'a>(
        &'a self,
        vm_id: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<Frozen>>, SessionError>> {
        Box::pin(async move {
            let record = self.books().get(vm_id).cloned();
            let record = record.filter(|record| record.status == Status::Suspended);
            let Some(record) =
                record.filter(|record| record.options.auto_resume || record.hibernated)
            else {
                return Err(SessionError::Asleep(vm_id.to_owned()));
            };
            let parked = record.parked_in.clone().unwrap_or_default();
            let opened = self.snapshots.frozen(&record.owner(), &parked).await;
            match opened {
                Ok((frozen, _)) => Ok(Some(frozen)),
                // Nobody asked for it to sleep, so nobody need know why it does not wake: an upgrade, another image.
                Err(error @ SnapshotError::Unfit { .. }) if record.hibernated => {
                    tracing::warn!(vm = vm_id, "a hibernated VM is lost: {error}");
                    let reason = "it hibernated, and cannot be restored by this server";
                    let lost = self.change(vm_id, |record| {
                        record.close(Status::Failed, Some(reason.to_owned()), now_ms());
                    });
                    self.unpark(&record);
                    self.tell(&lost.unwrap_or(record), "vm.failed", true);
                    Ok(None)
                }
                Err(error) => Err(SessionError::Conflict(error.to_string())),
            }
        })
    }
}
