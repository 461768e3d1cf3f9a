//! Events: what happened to whom.

use rusqlite::{Connection, OptionalExtension, Row, params};

pub(super) const SCHEMA: &str = "
CREATE TABLE audit (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    event_type TEXT NOT NULL,
    status TEXT NOT NULL,
    actor_type TEXT NOT NULL,
    actor_id TEXT,
    vm_id TEXT,
    session_id TEXT,
    resource_type TEXT,
    resource_id TEXT,
    detail TEXT
) STRICT;
CREATE INDEX audit_by_tenant ON audit(tenant, seq);
";

/// An event as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditRow {
    /// Its place in the order of events; 0 until it is stored.
    pub seq: i64,
    /// A version 4 UUID.
    pub id: String,
    /// Whom it concerns.
    pub tenant: String,
    /// Milliseconds since the Unix epoch.
    pub created_ms: i64,
    /// Such as `vm.started`; what is before the dot is its group.
    pub event_type: String,
    /// `success` or `failure`.
    pub status: String,
    /// `user`, or `system` for what happened by itself.
    pub actor_type: String,
    /// The user who did it.
    pub actor_id: Option<String>,
    /// The VM it was done to.
    pub vm_id: Option<String>,
    /// The session it was done to.
    pub session_id: Option<String>,
    /// What kind of thing else it was done to.
    pub resource_type: Option<String>,
    /// Which one.
    pub resource_id: Option<String>,
    /// More, for people.
    pub detail: Option<String>,
}

/// Which events are asked for.
#[derive(Clone, Debug, Default)]
pub struct AuditFilter {
    /// Whose.
    pub tenant: String,
    /// Only this group.
    pub event_group: Option<String>,
    /// Only this type.
    pub event_type: Option<String>,
    /// Only this status.
    pub status: Option<String>,
    /// Only of this VM.
    pub vm_id: Option<String>,
    /// Only of this session.
    pub session_id: Option<String>,
    /// Only by this user.
    pub actor_id: Option<String>,
    /// Only before this place.
    pub before: Option<i64>,
    /// At most so many.
    pub limit: u32,
}

const COLUMNS: &str = "seq, id, tenant, created_ms, event_type, status, actor_type, actor_id, vm_id, session_id, \
                       resource_type, resource_id, detail";

impl AuditRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            seq: row.get(0)?,
            id: row.get(1)?,
            tenant: row.get(2)?,
            created_ms: row.get(3)?,
            event_type: row.get(4)?,
            status: row.get(5)?,
            actor_type: row.get(6)?,
            actor_id: row.get(7)?,
            vm_id: row.get(8)?,
            session_id: row.get(9)?,
            resource_type: row.get(10)?,
            resource_id: row.get(11)?,
            detail: row.get(12)?,
        })
    }

    /// Stores events, in one transaction.
    ///
    /// # Errors
    /// SQLite's.
    pub fn insert_all(connection: &mut Connection, events: &[Self]) -> rusqlite::Result<()> {
        let transaction = connection.transaction()?;
        {
            let mut insert = transaction.prepare_cached(
                "INSERT INTO audit (id, tenant, created_ms, event_type, status, actor_type, actor_id, vm_id,
                 session_id, resource_type, resource_id, detail)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            )?;
            for event in events {
                insert.execute(params![
                    event.id,
                    event.tenant,
                    event.created_ms,
                    event.event_type,
                    event.status,
                    event.actor_type,
                    event.actor_id,
                    event.vm_id,
                    event.session_id,
                    event.resource_type,
                    event.resource_id,
                    event.detail,
                ])?;
            }
        }
        transaction.commit()
    }

    /// What the filter finds, newest first.
    ///
    /// # Errors
    /// SQLite's.
    pub fn find(connection: &Connection, filter: &AuditFilter) -> rusqlite::Result<Vec<Self>> {
        let group = filter.event_group.as_ref().map(|group| format!("{group}."));
        connection
            .prepare_cached(&format!(
                "SELECT {COLUMNS} FROM audit WHERE tenant = ?1
                 AND (?2 IS NULL OR substr(event_type, 1, length(?2)) = ?2)
                 AND (?3 IS NULL OR event_type = ?3) AND (?4 IS NULL OR status = ?4)
                 AND (?5 IS NULL OR vm_id = ?5) AND (?6 IS NULL OR session_id = ?6)
                 AND (?7 IS NULL OR actor_id = ?7) AND (?8 IS NULL OR seq < ?8)
                 ORDER BY seq DESC LIMIT ?9"
            ))?
            .query_map(
                params![
                    filter.tenant,
                    group,
                    filter.event_type,
                    filter.status,
                    filter.vm_id,
                    filter.session_id,
                    filter.actor_id,
                    filter.before,
                    filter.limit,
                ],
                Self::read,
            )?
            .collect()
    }

    /// One of the tenant's events.
    ///
    /// # Errors
    /// SQLite's.
    pub fn get(connection: &Connection, tenant: &str, id: &str) -> rusqlite::Result<Option<Self>> {
        connection
            .query_row(
                &format!("SELECT {COLUMNS} FROM audit WHERE tenant = ?1 AND id = ?2"),
                [tenant, id],
                Self::read,
            )
            .optional()
    }

    /// Forgets events from before a time, and the oldest beyond a number. How many.
    ///
    /// # Errors
    /// SQLite's.
    pub fn prune(connection: &Connection, before_ms: i64, keep: u64) -> rusqlite::Result<usize> {
        let keep = i64::try_from(keep).unwrap_or(i64::MAX);
        let old = connection.execute("DELETE FROM audit WHERE created_ms < ?1", [before_ms])?;
        let beyond = connection.execute(
            "DELETE FROM audit WHERE seq <= (SELECT seq FROM audit ORDER BY seq DESC LIMIT 1 OFFSET ?1)",
            [keep],
        )?;
        Ok(old + beyond)
    }
}
