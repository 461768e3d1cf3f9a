//! Tasks: asynchronous commands, durable from the moment they are acknowledged.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::now_ms;
use super::task_output::TaskOutput;
use crate::session::{Command, ContextName, Language, Outcome};

/// How far a task has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// It waits for its turn.
    Queued,
    /// It runs.
    Running,
    /// It has ended; the row has the result.
    Done,
    /// Its owner stopped it, or kept it from starting.
    Cancelled,
    /// The server stopped while it ran; the row has what it had written by then.
    Interrupted,
}

impl TaskState {
    /// Its name in the database and in replies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
        }
    }

    /// No more will happen to the task.
    pub fn is_complete(self) -> bool {
        matches!(self, Self::Done | Self::Cancelled | Self::Interrupted)
    }

    fn parse(text: &str) -> Self {
        match text {
            "queued" => Self::Queued,
            "running" => Self::Running,
            "done" => Self::Done,
            "cancelled" => Self::Cancelled,
            _ => Self::Interrupted,
        }
    }
}

/// A task as stored.
#[derive(Clone, Debug)]
pub struct TaskRow {
    /// A version 4 UUID.
    pub id: String,
    /// Its owner.
    pub tenant: String,
    /// The session it runs in.
    pub session_id: String,
    /// What it runs.
    pub command: Command,
    /// VMs that its owner's plan allowed when it was accepted.
    pub max_vms: u32,
    /// How far it has come.
    pub state: TaskState,
    /// When it was accepted, milliseconds since the Unix epoch.
    pub created_ms: i64,
    /// Output so far.
    pub stdout: String,
    /// Error output so far, and thaw's notes.
    pub stderr: String,
    /// Bytes of output that were thrown away.
    pub truncated_bytes: u64,
    /// Set when complete.
    pub exit_code: Option<i32>,
    /// Microseconds from start to end, when complete.
    pub execution_us: Option<i64>,
    /// Microseconds of processor time, when complete.
    pub cpu_us: Option<i64>,
    /// It ran on a fresh VM because the session's earlier one had ended.
    pub vm_restarted: bool,
    /// See [`Outcome::results`].
    pub results: String,
}

/// A task to be stored.
#[derive(Clone, Debug)]
pub struct NewTask {
    /// A fresh version 4 UUID.
    pub id: String,
    /// Its owner.
    pub tenant: String,
    /// The session it runs in.
    pub session_id: String,
    /// What it runs.
    pub command: Command,
    /// VMs that its owner's plan allows.
    pub max_vms: u32,
    /// The client's own name for the request.
    pub idempotency_key: Option<String>,
    /// SHA-256 of what the request asks for.
    pub body_hash: [u8; 32],
}

/// What became of a task that was handed in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It is stored.
    New,
    /// The same request was accepted before, as this task of this session.
    Same {
        /// The earlier task's id.
        id: String,
        /// Its session.
        session_id: String,
        /// When it was accepted.
        created_ms: i64,
    },
    /// The idempotency key was used for a different request.
    KeyReused,
    /// The tenant has this many tasks waiting already.
    Full(u32),
    /// The code of the tenant's open tasks is as long as it may be.
    TooMuchCode,
}

const COLUMNS: &str = "id, tenant, session_id, language, code, timeout_ms, max_vms, state,
    created_ms, stdout, stderr, truncated_bytes, exit_code, execution_us, cpu_us, vm_restarted, context, results, live";

impl NewTask {
    /// Stores the task unless it is a repetition, the tenant has `limit` open tasks, or there is no room for
    /// its code.
    ///
    /// # Errors
    /// SQLite's.
    pub fn insert(
        &self,
        connection: &mut Connection,
        limit: u32,
        has_room: bool,
    ) -> rusqlite::Result<Submitted> {
        let transaction =
            connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let asked = Asked {
            tenant: &self.tenant,
            key: self.idempotency_key.as_deref(),
            body_hash: &self.body_hash,
        };
        if let Some(not_new) = asked.foresee(&transaction, limit, has_room)? {
            return Ok(not_new);
        }
        transaction
            .prepare_cached(
                "INSERT INTO tasks (id, tenant, session_id, language, code, timeout_ms, max_vms,
                    idempotency_key, body_hash, state, created_ms, context, live)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 'queued', ?10, ?11, ?12)",
            )?
            .execute(params![
                self.id,
                self.tenant,
                self.session_id,
                language_name(self.command.language),
                self.command.code,
                self.command.timeout.as_millis() as i64,
                self.max_vms,
                self.idempotency_key,
                self.body_hash.as_slice(),
                now_ms(),
                self.command.context.as_ref().map(ContextName::as_str),
                self.command.live,
            ])?;
        transaction.commit()?;
        Ok(Submitted::New)
    }
}

/// What is known of a task before it is put together.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Its owner.
    pub tenant: &'a str,
    /// The client's own name for the request.
    pub key: Option<&'a str>,
    /// SHA-256 of what the request asks for.
    pub body_hash: &'a [u8; 32],
}

impl Asked<'_> {
    /// What [`NewTask::insert`] would say now, if that is not [`Submitted::New`].
    ///
    /// # Errors
    /// SQLite's.
    pub fn foresee(
        &self,
        connection: &Connection,
        limit: u32,
        has_room: bool,
    ) -> rusqlite::Result<Option<Submitted>> {
        if let Some(key) = self.key {
            let earlier: Option<(String, String, i64, Vec<u8>)> = connection
                .prepare_cached(
                    "SELECT id, session_id, created_ms, body_hash FROM tasks
                     WHERE tenant = ?1 AND idempotency_key = ?2",
                )?
                .query_row(params![self.tenant, key], |row| {
                    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
                })
                .optional()?;
            if let Some((id, session_id, created_ms, hash)) = earlier {
                return Ok(Some(if hash == self.body_hash {
                    Submitted::Same {
                        id,
                        session_id,
                        created_ms,
                    }
                } else {
                    Submitted::KeyReused
                }));
            }
        }
        let open: u32 = connection
            .prepare_cached(
                "SELECT count(*) FROM tasks WHERE state IN ('queued', 'running') AND tenant = ?1",
            )?
            .query_row([self.tenant], |row| row.get(0))?;
        Ok(if open >= limit {
            Some(Submitted::Full(limit))
        } else {
            (!has_room).then_some(Submitted::TooMuchCode)
        })
    }
}

/// A task that waits, as it is taken up by the next run of the server.
#[derive(Clone, Debug)]
pub struct WaitingTask {
    /// Its id.
    pub id: String,
    /// Its owner.
    pub tenant: String,
    /// The session it runs in.
    pub session_id: String,
    /// What it runs; without the code if that is long.
    pub command: Command,
    /// Bytes of its code.
    pub code_bytes: usize,
    /// VMs that its owner's plan allowed when it was accepted.
    pub max_vms: u32,
}

/// How a task ended, as it is stored.
#[derive(Clone, Debug)]
pub struct TaskEnd {
    /// The task.
    pub id: String,
    /// Its result.
    pub outcome: Outcome,
}

impl TaskEnd {
    /// Stores the result.
    ///
    /// # Errors
    /// SQLite's.
    pub fn store(&self, connection: &mut Connection) -> rusqlite::Result<()> {
        let outcome = &self.outcome;
        let transaction = connection.transaction()?;
        transaction
            .prepare_cached(
                "UPDATE tasks SET state = ?10, finished_ms = ?2, stdout = ?3, stderr = ?4,
                    truncated_bytes = ?5, exit_code = ?6, execution_us = ?7, cpu_us = ?8,
                    vm_restarted = ?9, results = ?11 WHERE id = ?1",
            )?
            .execute(params![
                self.id,
                now_ms(),
                outcome.stdout,
                outcome.stderr,
                outcome.truncated_bytes as i64,
                outcome.exit_code,
                outcome.execution_time.as_micros() as i64,
                outcome.cpu_time.as_micros() as i64,
                outcome.vm_restarted,
                if outcome.cancelled {
                    "cancelled"
                } else {
                    "done"
                },
                outcome.results,
            ])?;
        TaskOutput::forget(&transaction, &self.id)?;
        transaction.commit()
    }
}

impl TaskRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            tenant: row.get(1)?,
            session_id: row.get(2)?,
            command: Command {
                language: parse_language(&row.get::<_, String>(3)?),
                code: row.get(4)?,
                timeout: std::time::Duration::from_millis(row.get::<_, i64>(5)?.max(0) as u64),
                answer_within: None,
                live: row.get(18)?,
                context: row
                    .get::<_, Option<String>>(16)?
                    .as_deref()
                    .and_then(ContextName::parse),
            },
            max_vms: row.get(6)?,
            state: TaskState::parse(&row.get::<_, String>(7)?),
            created_ms: row.get(8)?,
            stdout: row.get(9)?,
            stderr: row.get(10)?,
            truncated_bytes: row.get::<_, i64>(11)?.max(0) as u64,
            exit_code: row.get(12)?,
            execution_us: row.get(13)?,
            cpu_us: row.get(14)?,
            vm_restarted: row.get(15)?,
            results: row.get(17)?,
        })
    }

    /// The tenant's task of this id.
    ///
    /// # Errors
    /// SQLite's.
    pub fn find(connection: &Connection, tenant: &str, id: &str) -> rusqlite::Result<Option<Self>> {
        connection
            .prepare_cached(&format!(
                "SELECT {COLUMNS} FROM tasks WHERE id = ?1 AND tenant = ?2"
            ))?
            .query_row(params![id, tenant], Self::read)
            .optional()
    }

    /// Every task that waits, in the order of acceptance. Code of more than `short` bytes is left where it is.
    ///
    /// # Errors
    /// SQLite's.
    pub fn queued(connection: &Connection, short: usize) -> rusqlite::Result<Vec<WaitingTask>> {
        connection
            .prepare(&format!(
                "SELECT {COLUMNS} FROM tasks WHERE state = 'queued' ORDER BY seq"
            ))?
            .query_map([], |row| {
                let mut row = Self::read(row)?;
                let code_bytes = row.command.code.len();
                if code_bytes > short {
                    row.command.code = String::new();
                }
                Ok(WaitingTask {
                    id: row.id,
                    tenant: row.tenant,
                    session_id: row.session_id,
                    command: row.command,
                    code_bytes,
                    max_vms: row.max_vms,
                })
            })?
            .collect()
    }

    /// A task's code.
    ///
    /// # Errors
    /// SQLite's; there is no such task.
    pub fn code(connection: &Connection, id: &str) -> rusqlite::Result<String> {
        connection
            .prepare_cached("SELECT code FROM tasks WHERE id = ?1")?
            .query_row([id], |row| row.get(0))
    }

    /// Notes that the task runs now.
    ///
    /// # Errors
    /// SQLite's.
    pub fn mark_running(connection: &Connection, id: &str) -> rusqlite::Result<()> {
        connection
            .prepare_cached("UPDATE tasks SET state = 'running', started_ms = ?2 WHERE id = ?1")?
            .execute(params![id, now_ms()])?;
        Ok(())
    }

    /// Forgets complete tasks that ended before `before_ms`, and the oldest complete ones beyond
    /// `keep`. At most `batch` at a time, so that others get their turn. How many went.
    ///
    /// # Errors
    /// SQLite's.
    pub fn reap(
        connection: &Connection,
        before_ms: i64,
        keep: u32,
        batch: u32,
    ) -> rusqlite::Result<usize> {
        let old = connection.execute(
            "DELETE FROM tasks WHERE seq IN (SELECT seq FROM tasks
                WHERE finished_ms IS NOT NULL AND finished_ms < ?1 LIMIT ?2)",
            params![before_ms, batch],
        )?;
        let many = connection.execute(
            "DELETE FROM tasks WHERE seq IN (SELECT seq FROM tasks
                WHERE finished_ms IS NOT NULL ORDER BY finished_ms DESC LIMIT ?2 OFFSET ?1)",
            params![keep, batch],
        )?;
        Ok(old + many)
    }

    /// Forgets the oldest complete tasks, at most `batch`, while the file's content is larger than `most_bytes`.
    /// How many went.
    ///
    /// # Errors
    /// SQLite's.
    pub fn reap_bytes(
        connection: &Connection,
        most_bytes: u64,
        batch: u32,
    ) -> rusqlite::Result<usize> {
        let pragma = |name: &str| -> rusqlite::Result<i64> {
            connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))
        };
        let pages = pragma("page_count")? - pragma("freelist_count")?;
        let bytes = u64::try_from(pages * pragma("page_size")?).unwrap_or(0);
        if bytes <= most_bytes {
            return Ok(0);
        }
        connection.execute(
            "DELETE FROM tasks WHERE seq IN (SELECT seq FROM tasks
                WHERE finished_ms IS NOT NULL ORDER BY finished_ms LIMIT ?1)",
            [batch],
        )
    }
}

/// A language's name in the database and in replies.
pub fn language_name(language: Language) -> &'static str {
    match language {
        Language::Python => "python",
        Language::Bash => "bash",
        Language::Javascript => "javascript",
    }
}

fn parse_language(name: &str) -> Language {
    match name {
        "bash" => Language::Bash,
        "javascript" => Language::Javascript,
        _ => Language::Python,
    }
}

#[cfg(test)]
pub(super) mod tests;
