//! The schema, as the list of steps that lead to it.
//!
//! A step that has been released is never edited: changes are appended. The file's
//! `user_version` counts the steps it has seen.

use rusqlite::Connection;

/// Every step, oldest first.
const STEPS: &[&str] = &[
    USERS_KEYS_PLANS,
    TASKS,
    super::sessions::SCHEMA,
    TASKS_CANCELLED,
    super::vms::SCHEMA,
    super::audit::SCHEMA,
    super::ssh_keys::SCHEMA,
    super::egress::SCHEMA,
    "ALTER TABLE keys ADD COLUMN last_used_ms INTEGER;",
    super::task_output::SCHEMA,
    super::tapes::SCHEMA,
];

/// Times are milliseconds since the Unix epoch. `epoch` invalidates a user's tokens when it grows.
/// A key's `lookup` is not secret and finds the row; `hash` is SHA-256 of the whole key.
const USERS_KEYS_PLANS: &str = "
CREATE TABLE plans (
    name TEXT PRIMARY KEY,
    requests_per_minute INTEGER NOT NULL,
    burst INTEGER NOT NULL,
    max_vms INTEGER NOT NULL
) STRICT;
CREATE TABLE users (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    email TEXT,
    password TEXT,
    plan TEXT NOT NULL,
    epoch INTEGER NOT NULL DEFAULT 0,
    created_ms INTEGER NOT NULL,
    disabled_ms INTEGER
) STRICT;
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL REFERENCES users(id),
    name TEXT NOT NULL,
    lookup TEXT NOT NULL,
    hash BLOB NOT NULL UNIQUE,
    plan TEXT,
    created_ms INTEGER NOT NULL,
    revoked_ms INTEGER
) STRICT;
CREATE INDEX keys_by_lookup ON keys(lookup);
";

const TASKS: &str = "
CREATE TABLE tasks (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    session_id TEXT NOT NULL,
    language TEXT NOT NULL,
    code TEXT NOT NULL,
    timeout_ms INTEGER NOT NULL,
    max_vms INTEGER NOT NULL,
    idempotency_key TEXT,
    body_hash BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'interrupted')),
    created_ms INTEGER NOT NULL,
    started_ms INTEGER,
    finished_ms INTEGER,
    stdout TEXT NOT NULL DEFAULT '',
    stderr TEXT NOT NULL DEFAULT '',
    truncated_bytes INTEGER NOT NULL DEFAULT 0,
    exit_code INTEGER,
    execution_us INTEGER,
    cpu_us INTEGER,
    vm_restarted INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE UNIQUE INDEX tasks_by_idempotency ON tasks(tenant, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX tasks_open ON tasks(seq) WHERE state IN ('queued', 'running');
CREATE INDEX tasks_finished ON tasks(finished_ms) WHERE finished_ms IS NOT NULL;
";

/// Tasks can be cancelled, run in contexts and have rich results. SQLite cannot change a `CHECK`, so the
/// table is copied.
const TASKS_CANCELLED: &str = "
CREATE TABLE tasks_new (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    session_id TEXT NOT NULL,
    language TEXT NOT NULL,
    code TEXT NOT NULL,
    timeout_ms INTEGER NOT NULL,
    max_vms INTEGER NOT NULL,
    idempotency_key TEXT,
    body_hash BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'cancelled', 'interrupted')),
    created_ms INTEGER NOT NULL,
    started_ms INTEGER,
    finished_ms INTEGER,
    stdout TEXT NOT NULL DEFAULT '',
    stderr TEXT NOT NULL DEFAULT '',
    truncated_bytes INTEGER NOT NULL DEFAULT 0,
    exit_code INTEGER,
    execution_us INTEGER,
    cpu_us INTEGER,
    vm_restarted INTEGER NOT NULL DEFAULT 0,
    context TEXT,
    results TEXT NOT NULL DEFAULT '',
    live INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO tasks_new SELECT *, NULL, '', 0 FROM tasks;
DROP TABLE tasks;
ALTER TABLE tasks_new RENAME TO tasks;
CREATE UNIQUE INDEX tasks_by_idempotency ON tasks(tenant, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX tasks_open ON tasks(seq) WHERE state IN ('queued', 'running');
CREATE INDEX tasks_finished ON tasks(finished_ms) WHERE finished_ms IS NOT NULL;
";

/// Takes the file through the steps it has not seen, each in its own transaction.
pub(super) fn run(connection: &mut Connection) -> anyhow::Result<()> {
    let seen: usize = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    anyhow::ensure!(
        seen <= STEPS.len(),
        "it was written by a newer thaw (schema {seen}, this one knows {}); use that version",
        STEPS.len()
    );
    for (index, step) in STEPS.iter().enumerate().skip(seen) {
        let transaction =
            connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        // Another process may have taken this step while we waited for the lock.
        let now: usize = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if now == index {
            transaction.execute_batch(step)?;
            transaction.pragma_update(None, "user_version", index + 1)?;
            transaction.commit()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_run_once_and_a_newer_file_is_refused() {
        let mut connection = Connection::open_in_memory().unwrap();
        run(&mut connection).unwrap();
        run(&mut connection).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        let error = run(&mut connection).unwrap_err().to_string();
        assert!(error.contains("newer thaw"), "{error}");
    }
}
