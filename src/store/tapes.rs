//! Tapes: what sessions did, step by step, and the checkpoints before the steps.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::now_ms;

/// A tape's `steps` is the number of its last step. Events of one step share its number, in the order of `seq`.
pub(super) const SCHEMA: &str = "
CREATE TABLE tapes (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    session_id TEXT NOT NULL,
    vm_id TEXT,
    status TEXT NOT NULL,
    files INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    stopped_ms INTEGER,
    expires_ms INTEGER NOT NULL,
    parent_tape TEXT,
    parent_step INTEGER,
    steps INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX tapes_by_tenant ON tapes(tenant, created_ms);
CREATE TABLE tape_events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    tape_id TEXT NOT NULL,
    step INTEGER NOT NULL,
    kind TEXT NOT NULL,
    at_ms INTEGER NOT NULL,
    payload TEXT NOT NULL,
    checkpoint TEXT
) STRICT;
CREATE INDEX tape_events_by_step ON tape_events(tape_id, step, seq);
";

/// A tape as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapeRow {
    /// Its id.
    pub id: String,
    /// Who owns it.
    pub tenant: String,
    /// The session that it records.
    pub session_id: String,
    /// The VM that the session had when it began, or last.
    pub vm_id: Option<String>,
    /// `recording`, `stopped` or `expired`.
    pub status: String,
    /// Whether it notes the files that each step changed.
    pub files: bool,
    /// When it began, milliseconds since the Unix epoch.
    pub created_ms: i64,
    /// When it was stopped.
    pub stopped_ms: Option<i64>,
    /// When it is forgotten.
    pub expires_ms: i64,
    /// The tape that it branched from, and at which step.
    pub parent: Option<(String, i64)>,
    /// The number of its last step.
    pub steps: i64,
}

/// Something on a tape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapeEvent {
    /// Its step.
    pub step: i64,
    /// What it is.
    pub kind: String,
    /// When, milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// More, as a JSON object.
    pub payload: String,
    /// The snapshot of the moment before it.
    pub checkpoint: Option<String>,
}

/// Something that is to be put on a tape.
#[derive(Clone, Debug, Default)]
pub struct NewTapeEvent {
    /// The step that it belongs to; none: a new one.
    pub step: Option<i64>,
    /// What it is.
    pub kind: String,
    /// More, as a JSON object.
    pub payload: String,
    /// The snapshot of the moment before it.
    pub checkpoint: Option<String>,
}

/// Which tapes.
#[derive(Clone, Debug, Default)]
pub struct TapeFilter {
    /// Of this tenant.
    pub tenant: String,
    /// Of this session.
    pub session_id: Option<String>,
    /// Of this VM.
    pub vm_id: Option<String>,
    /// In this status.
    pub status: Option<String>,
    /// At most so many.
    pub limit: i64,
    /// After so many, newest first.
    pub offset: i64,
}

const COLUMNS: &str = "id, tenant, session_id, vm_id, status, files, created_ms, stopped_ms, expires_ms, \
                       parent_tape, parent_step, steps";

impl TapeRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let (tape, step): (Option<String>, Option<i64>) = (row.get(9)?, row.get(10)?);
        Ok(Self {
            id: row.get(0)?,
            tenant: row.get(1)?,
            session_id: row.get(2)?,
            vm_id: row.get(3)?,
            status: row.get(4)?,
            files: row.get(5)?,
            created_ms: row.get(6)?,
            stopped_ms: row.get(7)?,
            expires_ms: row.get(8)?,
            parent: tape.zip(step),
            steps: row.get(11)?,
        })
    }

    /// Stores a new tape, unless the tenant has `most` already.
    ///
    /// # Errors
    /// SQLite's.
    pub fn insert(&self, connection: &Connection, most: i64) -> rusqlite::Result<bool> {
        let count: i64 = connection.query_row(
            "SELECT COUNT(*) FROM tapes WHERE tenant = ?1",
            [&self.tenant],
            |row| row.get(0),
        )?;
        if count >= most {
            return Ok(false);
        }
        let (tape, step) = self.parent.clone().unzip();
        connection.execute(
            "INSERT INTO tapes (id, tenant, session_id, vm_id, status, files, created_ms, stopped_ms, expires_ms,
             parent_tape, parent_step, steps) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            params![
                self.id,
                self.tenant,
                self.session_id,
                self.vm_id,
                self.status,
                self.files,
                self.created_ms,
                self.stopped_ms,
                self.expires_ms,
                tape,
                step,
                self.steps
            ],
        )?;
        Ok(true)
    }

    /// One of the tenant's.
    ///
    /// # Errors
    /// SQLite's.
    pub fn get(connection: &Connection, tenant: &str, id: &str) -> rusqlite::Result<Option<Self>> {
        let query = format!("SELECT {COLUMNS} FROM tapes WHERE tenant = ?1 AND id = ?2");
        connection
            .query_row(&query, [tenant, id], Self::read)
            .optional()
    }

    /// Those that are recording, of everybody.
    ///
    /// # Errors
    /// SQLite's.
    pub fn recording(connection: &Connection) -> rusqlite::Result<Vec<Self>> {
        let query = format!("SELECT {COLUMNS} FROM tapes WHERE status = 'recording'");
        connection
            .prepare(&query)?
            .query_map([], Self::read)?
            .collect()
    }

    /// The tenant's, newest first.
    ///
    /// # Errors
    /// SQLite's.
    pub fn list(connection: &Connection, filter: &TapeFilter) -> rusqlite::Result<Vec<Self>> {
        let query = format!(
            "SELECT {COLUMNS} FROM tapes WHERE tenant = ?1 AND (?2 IS NULL OR session_id = ?2)
             AND (?3 IS NULL OR vm_id = ?3) AND (?4 IS NULL OR status = ?4)
             ORDER BY created_ms DESC, id LIMIT ?5 OFFSET ?6"
        );
        let wanted = params![
            filter.tenant,
            filter.session_id,
            filter.vm_id,
            filter.status,
            filter.limit,
            filter.offset
        ];
        connection
            .prepare(&query)?
            .query_map(wanted, Self::read)?
            .collect()
    }

    /// Stops recording. False: it was stopped already.
    ///
    /// # Errors
    /// SQLite's.
    pub fn stop(connection: &Connection, id: &str) -> rusqlite::Result<bool> {
        let changed = connection.execute(
            "UPDATE tapes SET status = 'stopped', stopped_ms = ?2 WHERE id = ?1 AND status = 'recording'",
            params![id, now_ms()],
        )?;
        Ok(changed > 0)
    }

    /// Forgets a tape and everything on it; gives the checkpoints that it had.
    ///
    /// # Errors
    /// SQLite's.
    pub fn delete(connection: &mut Connection, id: &str) -> rusqlite::Result<Vec<String>> {
        let transaction = connection.transaction()?;
        let gone = checkpoints_of(&transaction, id)?;
        transaction.execute("DELETE FROM tape_events WHERE tape_id = ?1", [id])?;
        transaction.execute("DELETE FROM tapes WHERE id = ?1", [id])?;
        transaction.commit()?;
        Ok(gone)
    }

    /// Those whose time is over, of everybody: owner and id.
    ///
    /// # Errors
    /// SQLite's.
    pub fn expired(connection: &Connection, now_ms: i64) -> rusqlite::Result<Vec<Self>> {
        let query = format!("SELECT {COLUMNS} FROM tapes WHERE expires_ms <= ?1 LIMIT 100");
        connection
            .prepare(&query)?
            .query_map([now_ms], Self::read)?
            .collect()
    }
}

fn checkpoints_of(connection: &Connection, tape: &str) -> rusqlite::Result<Vec<String>> {
    connection
        .prepare(
            "SELECT checkpoint FROM tape_events WHERE tape_id = ?1 AND checkpoint IS NOT NULL ORDER BY seq",
        )?
        .query_map([tape], |row| row.get(0))?
        .collect()
}

impl TapeEvent {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            step: row.get(0)?,
            kind: row.get(1)?,
            at_ms: row.get(2)?,
            payload: row.get(3)?,
            checkpoint: row.get(4)?,
        })
    }

    /// Puts something on a tape; gives its step. `None`: there is no such tape or step, or the tape is full.
    ///
    /// # Errors
    /// SQLite's.
    pub fn append(
        connection: &mut Connection,
        tape: &str,
        new: &NewTapeEvent,
        most: i64,
    ) -> rusqlite::Result<Option<i64>> {
        let transaction = connection.transaction()?;
        let steps: Option<i64> = transaction
            .query_row("SELECT steps FROM tapes WHERE id = ?1", [tape], |row| {
                row.get(0)
            })
            .optional()?;
        let Some(steps) = steps else { return Ok(None) };
        let step = new.step.unwrap_or(steps + 1);
        let count: i64 = transaction.query_row(
            "SELECT COUNT(*) FROM tape_events WHERE tape_id = ?1",
            [tape],
            |row| row.get(0),
        )?;
        if !(1..=steps + 1).contains(&step) || count >= most {
            return Ok(None);
        }
        transaction.execute(
            "INSERT INTO tape_events (tape_id, step, kind, at_ms, payload, checkpoint) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![tape, step, new.kind, now_ms(), new.payload, new.checkpoint],
        )?;
        transaction.execute(
            "UPDATE tapes SET steps = MAX(steps, ?2) WHERE id = ?1",
            params![tape, step],
        )?;
        transaction.commit()?;
        Ok(Some(step))
    }

    /// What is on a tape after a step, of one kind or of all.
    ///
    /// # Errors
    /// SQLite's.
    pub fn list(
        connection: &Connection,
        tape: &str,
        after: i64,
        kind: Option<&str>,
        limit: i64,
    ) -> rusqlite::Result<Vec<Self>> {
        connection
            .prepare(
                "SELECT step, kind, at_ms, payload, checkpoint FROM tape_events
                 WHERE tape_id = ?1 AND step > ?2 AND (?3 IS NULL OR kind = ?3) ORDER BY step, seq LIMIT ?4",
            )?
            .query_map(params![tape, after, kind, limit], Self::read)?
            .collect()
    }

    /// How many there are of each kind.
    ///
    /// # Errors
    /// SQLite's.
    pub fn lanes(connection: &Connection, tape: &str) -> rusqlite::Result<Vec<(String, i64)>> {
        connection
            .prepare("SELECT kind, COUNT(*) FROM tape_events WHERE tape_id = ?1 GROUP BY kind ORDER BY kind")?
            .query_map([tape], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect()
    }

    /// The checkpoint of the moment before a step.
    ///
    /// # Errors
    /// SQLite's.
    pub fn checkpoint(
        connection: &Connection,
        tape: &str,
        step: i64,
    ) -> rusqlite::Result<Option<String>> {
        connection
            .query_row(
                "SELECT checkpoint FROM tape_events WHERE tape_id = ?1 AND step = ?2 AND checkpoint IS NOT NULL
                 ORDER BY seq LIMIT 1",
                params![tape, step],
                |row| row.get(0),
            )
            .optional()
    }

    /// Takes the oldest checkpoints off a tape until `keep` are left; gives what it took.
    ///
    /// # Errors
    /// SQLite's.
    pub fn thin_out(
        connection: &mut Connection,
        tape: &str,
        keep: usize,
    ) -> rusqlite::Result<Vec<String>> {
        let transaction = connection.transaction()?;
        let mut all = checkpoints_of(&transaction, tape)?;
        all.truncate(all.len().saturating_sub(keep));
        for gone in &all {
            transaction.execute(
                "UPDATE tape_events SET checkpoint = NULL WHERE tape_id = ?1 AND checkpoint = ?2",
                params![tape, gone],
            )?;
        }
        transaction.commit()?;
        Ok(all)
    }

    /// Every checkpoint that is on a tape, of everybody.
    ///
    /// # Errors
    /// SQLite's.
    pub fn all_checkpoints(connection: &Connection) -> rusqlite::Result<Vec<String>> {
        connection
            .prepare("SELECT checkpoint FROM tape_events WHERE checkpoint IS NOT NULL")?
            .query_map([], |row| row.get(0))?
            .collect()
    }
}
