//! The records of all VMs, in memory while the server runs and in the database for the next one.
//!
//! Changes are written together a moment later, so that no command waits for the disk; who
//! must be sure of one uses [`Ledger::flush`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::books::Books;
use super::record::{Status, VmRecord};
use crate::audit::{Audit, Event};
use crate::session::{TenantId, Vm};
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
            cores: record.cores,
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

    pub(super) fn tell(&self, record: &VmRecord, kind: &'static str, by_itself: bool) {
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

    pub(super) fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
