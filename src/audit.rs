//! The audit log: who did what to whom, and how it ended.
//!
//! Events are gathered for a moment and written together, so that what they tell of never waits
//! for the disk. Whoever reads the log sees everything that happened before.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::config::AuditConfig;
use crate::session::TenantId;
use crate::store::{AuditFilter, AuditRow, Store, StoreError, now_ms};

/// How long events are gathered before they are written.
const GATHER: Duration = Duration::from_millis(250);

/// Events that wait to be written when the disk is behind; more are dropped, and counted.
const MOST_PENDING: usize = 50_000;

/// How often old events are forgotten, in flushes.
const PRUNE_EVERY: u64 = 1200;

/// Every kind of event, and what it tells.
pub const CATALOG: &[(&str, &str)] = &[
    ("session.created", "a session was made"),
    ("vm.created", "a VM was asked for by itself"),
    (
        "vm.hibernated",
        "a VM that nobody used was frozen to disk; the next command wakes it",
    ),
    ("vm.forked", "live copies were made of a VM"),
    ("vm.started", "a VM began to run"),
    ("vm.updated", "a VM's settings were changed"),
    (
        "vm.env_staged",
        "variables were staged in a VM; their values are not kept",
    ),
    ("vm.suspended", "a VM was frozen and parked"),
    ("vm.resumed", "a suspended VM goes on under a new id"),
    (
        "vm.rewound",
        "a recorded session was taken back to the moment before a step",
    ),
    (
        "vm.terminated",
        "a VM ended: by its owner, its lifetime or the server's end",
    ),
    ("vm.failed", "a VM could not be started, or died"),
    (
        "snapshot.created",
        "a snapshot of a VM was made, or could not be",
    ),
    ("snapshot.deleted", "a snapshot was deleted"),
    ("api_key.created", "an API key was made"),
    ("api_key.updated", "an API key was changed"),
    ("api_key.revoked", "an API key was revoked"),
    ("ssh_key.added", "an SSH key was added"),
    ("ssh_key.removed", "an SSH key was removed"),
    ("egress.changed", "an egress policy was set"),
    (
        "login.token",
        "somebody asked for a bearer token with this user's name",
    ),
];

/// An event to be recorded.
#[derive(Clone, Debug, Default)]
pub struct Event {
    /// One of [`CATALOG`].
    pub kind: &'static str,
    /// It was tried and did not work.
    pub failed: bool,
    /// It happened by itself.
    pub by_itself: bool,
    /// The VM.
    pub vm_id: Option<String>,
    /// The session.
    pub session_id: Option<String>,
    /// The kind and id of what else it was done to.
    pub resource: Option<(&'static str, String)>,
    /// More, for people. Never a secret.
    pub detail: Option<String>,
}

/// The log.
#[derive(Debug)]
pub struct Audit {
    store: Store,
    config: AuditConfig,
    pending: Mutex<Vec<AuditRow>>,
    /// Held while events are being written, so that a reader waits for them.
    writing: tokio::sync::Mutex<u64>,
    dropped: AtomicU64,
}

impl Audit {
    /// Starts the log; it writes until the last handle is dropped.
    pub fn start(store: Store, config: AuditConfig) -> Arc<Self> {
        let audit = Arc::new(Self {
            store,
            config,
            pending: Mutex::default(),
            writing: tokio::sync::Mutex::new(0),
            dropped: AtomicU64::new(0),
        });
        let weak = Arc::downgrade(&audit);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(GATHER).await;
                let Some(audit) = weak.upgrade() else { return };
                if let Err(error) = audit.flush().await {
                    tracing::error!(%error, "events are not stored yet");
                }
            }
        });
        audit
    }

    /// Notes what this tenant did, or what happened to what is the tenant's.
    pub fn note(&self, tenant: &TenantId, event: Event) {
        let (resource_type, resource_id) = event.resource.unzip();
        let row = AuditRow {
            seq: 0,
            id: uuid::Uuid::new_v4().to_string(),
            tenant: tenant.0.clone(),
            created_ms: now_ms(),
            event_type: event.kind.to_owned(),
            status: if event.failed { "failure" } else { "success" }.to_owned(),
            actor_type: if event.by_itself { "system" } else { "user" }.to_owned(),
            actor_id: (!event.by_itself).then(|| tenant.0.clone()),
            vm_id: event.vm_id,
            session_id: event.session_id,
            resource_type: resource_type.map(str::to_owned),
            resource_id,
            detail: event.detail,
        };
        let mut pending = self.pending();
        if pending.len() < MOST_PENDING {
            pending.push(row);
        } else if self.dropped.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::error!("the database is far behind: events are not recorded");
        }
    }

    /// Writes what is pending.
    ///
    /// # Errors
    /// The store's; what is pending stays so.
    pub async fn flush(&self) -> Result<(), StoreError> {
        let mut flushes = self.writing.lock().await;
        *flushes += 1;
        let prune = *flushes % PRUNE_EVERY == 1;
        let events = Arc::new(std::mem::take(&mut *self.pending()));
        if events.is_empty() && !prune {
            return Ok(());
        }
        let rows = events.clone();
        let age = i64::try_from(self.config.keep_s.saturating_mul(1000)).unwrap_or(i64::MAX);
        let (before, keep) = (now_ms().saturating_sub(age), self.config.keep_count);
        let written = self.store.call(move |c| {
            if !rows.is_empty() {
                AuditRow::insert_all(c, &rows)?;
            }
            if prune {
                AuditRow::prune(c, before, keep)?;
            }
            Ok(())
        });
        if let Err(error) = written.await {
            let mut pending = self.pending();
            let newer = std::mem::take(&mut *pending);
            pending.extend(events.iter().cloned().chain(newer));
            pending.truncate(MOST_PENDING);
            return Err(error);
        }
        Ok(())
    }

    /// What the filter finds, newest first.
    ///
    /// # Errors
    /// The store's.
    pub async fn find(&self, filter: AuditFilter) -> Result<Vec<AuditRow>, StoreError> {
        self.flush().await?;
        self.store.call(move |c| AuditRow::find(c, &filter)).await
    }

    /// One of the tenant's events.
    ///
    /// # Errors
    /// The store's.
    pub async fn get(&self, tenant: &TenantId, id: String) -> Result<Option<AuditRow>, StoreError> {
        self.flush().await?;
        let tenant = tenant.0.clone();
        self.store
            .call(move |c| AuditRow::get(c, &tenant, &id))
            .await
    }

    fn pending(&self) -> MutexGuard<'_, Vec<AuditRow>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::scratch;

    fn tenant(name: &str) -> TenantId {
        TenantId(name.into())
    }

    fn event(kind: &'static str, vm_id: &str) -> Event {
        Event {
            kind,
            vm_id: Some(vm_id.into()),
            ..Event::default()
        }
    }

    fn filter(limit: u32) -> AuditFilter {
        AuditFilter {
            tenant: "a".into(),
            limit,
            ..AuditFilter::default()
        }
    }

    #[tokio::test]
    async fn events_are_read_newest_first_page_by_page_and_by_their_owner_only() {
        let (_dir, store) = scratch();
        let audit = Audit::start(store, AuditConfig::default());
        for n in 0..5 {
            audit.note(&tenant("a"), event("vm.started", &format!("vm-{n}")));
        }
        audit.note(&tenant("b"), event("vm.failed", "vm-b"));
        let first = audit.find(filter(2)).await.unwrap();
        let ids: Vec<_> = first.iter().filter_map(|row| row.vm_id.clone()).collect();
        assert_eq!(ids, ["vm-4", "vm-3"]);
        let mut next = filter(10);
        next.before = Some(first[1].seq);
        assert_eq!(audit.find(next).await.unwrap().len(), 3);
        let mut one = filter(10);
        one.vm_id = Some("vm-1".into());
        one.event_group = Some("vm".into());
        assert_eq!(audit.find(one.clone()).await.unwrap().len(), 1);
        one.event_group = Some("v".into());
        assert!(audit.find(one).await.unwrap().is_empty());
        let id = first[0].id.clone();
        assert!(audit.get(&tenant("b"), id.clone()).await.unwrap().is_none());
        assert!(audit.get(&tenant("a"), id).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn the_oldest_events_go_first() {
        let (_dir, store) = scratch();
        let audit = Audit::start(store.clone(), AuditConfig::default());
        for n in 0..10 {
            audit.note(&tenant("a"), event("vm.started", &n.to_string()));
        }
        audit.flush().await.unwrap();
        let gone = store.call(|c| AuditRow::prune(c, 0, 4)).await.unwrap();
        assert_eq!(gone, 6);
        let left = audit.find(filter(100)).await.unwrap();
        assert_eq!(left.last().unwrap().vm_id.as_deref(), Some("6"));
    }

    #[test]
    fn every_kind_has_a_group() {
        assert!(CATALOG.iter().all(|(kind, _)| kind.contains('.')));
    }
}
