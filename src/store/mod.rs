//! SQLite: one file, one connection, one thread.
//!
//! Every use is a closure sent to the store's thread with [`Store::call`]; nobody else holds
//! the connection, so there are no locks and no busy retries inside the server. The command
//! line opens the same file from its own process; WAL mode and a busy timeout keep the two
//! apart, and [`Store::watch_changes`] tells the server when somebody else has written.
//!
//! Commits are synchronous (`synchronous=FULL`): when a call that wrote returns, the rows
//! survive `kill -9` and a power cut.

mod audit;
mod egress;
mod keys;
mod migrations;
mod plans;
mod sessions;
mod ssh_keys;
mod tapes;
mod task_output;
mod tasks;
mod users;
mod vms;

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use rusqlite::Connection;
use tokio::sync::{oneshot, watch};

pub use audit::{AuditFilter, AuditRow};
pub use egress::{get_egress, set_egress};
pub use keys::{KeyRow, NewKey};
pub use plans::PlanRow;
pub use sessions::StoredSessions;
pub use ssh_keys::SshKeyRow;
pub use tapes::{NewTapeEvent, TapeEvent, TapeFilter, TapeRow};
pub use task_output::TaskOutput;
pub use tasks::{
    Asked, NewTask, Submitted, TaskEnd, TaskRow, TaskState, WaitingTask, language_name,
};
pub use users::UserRow;
pub use vms::VmRow;

/// Calls that may wait for the store's thread. More than this many concurrent writers means that the
/// disk is far behind; callers then wait to enter the queue instead of growing it.
const QUEUE: usize = 1024;

/// How long a statement waits for another process's write to finish.
const BUSY: Duration = Duration::from_secs(5);

/// How often the file is checked for another process's writes. A revoked key is refused
/// after this long at the latest.
const WATCH_EVERY: Duration = Duration::from_millis(100);

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// A handle on the store's thread. Cheap to clone; the thread ends with the last handle.
#[derive(Clone)]
pub struct Store {
    jobs: mpsc::SyncSender<Job>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

/// Why a call to the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite says no.
    #[error("the database failed: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The store's thread has ended.
    #[error("the database is closed")]
    Closed,
}

impl Store {
    /// Opens the file, makes it when missing (readable by its owner only), brings its schema
    /// up to date and starts the store's thread.
    ///
    /// # Errors
    /// The file cannot be opened, is not a database, or was written by a newer thaw.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .with_context(|| format!("cannot open the database {}", path.display()))?;
        let mut connection = Connection::open(path)
            .with_context(|| format!("cannot open the database {}", path.display()))?;
        connection.busy_timeout(BUSY)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.set_prepared_statement_cache_capacity(64);
        migrations::run(&mut connection)
            .with_context(|| format!("cannot prepare the database {}", path.display()))?;
        let (jobs, queue) = mpsc::sync_channel::<Job>(QUEUE);
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || {
                while let Ok(job) = queue.recv() {
                    job(&mut connection);
                }
            })
            .context("cannot start the database thread")?;
        Ok(Self { jobs })
    }

    /// Runs a closure on the store's thread and waits for what it returns. Dropping the future does
    /// not stop a closure that was sent.
    ///
    /// # Errors
    /// What the closure returns, or that the store is closed.
    pub async fn call<T, F>(&self, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        self.send(move |connection| {
            let result = work(connection);
            // The caller may have gone; the work is done all the same.
            drop(reply.send(result));
        })
        .await?;
        Ok(answer.await.map_err(|_| StoreError::Closed)??)
    }

    /// As [`Store::call`], for places without a runtime: the command line.
    ///
    /// # Errors
    /// As [`Store::call`].
    pub fn call_blocking<T, F>(&self, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (reply, answer) = mpsc::sync_channel(1);
        let job: Job = Box::new(move |connection| drop(reply.send(work(connection))));
        self.jobs.send(job).map_err(|_| StoreError::Closed)?;
        Ok(answer.recv().map_err(|_| StoreError::Closed)??)
    }

    async fn send(
        &self,
        job: impl FnOnce(&mut Connection) + Send + 'static,
    ) -> Result<(), StoreError> {
        let mut job: Job = Box::new(job);
        loop {
            match self.jobs.try_send(job) {
                Ok(()) => return Ok(()),
                Err(mpsc::TrySendError::Disconnected(_)) => return Err(StoreError::Closed),
                Err(mpsc::TrySendError::Full(back)) => {
                    job = back;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
    }

    /// A number that changes when another process has written to the file.
    ///
    /// # Errors
    /// As [`Store::call`].
    pub async fn data_version(&self) -> Result<i64, StoreError> {
        self.call(|c| c.query_row("PRAGMA data_version", [], |row| row.get(0)))
            .await
    }

    /// Watches for other processes' writes until every receiver is gone.
    pub fn watch_changes(&self) -> watch::Receiver<i64> {
        let (tell, told) = watch::channel(0);
        let store = self.clone();
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(WATCH_EVERY);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    () = tell.closed() => return,
                    _ = tick.tick() => {}
                }
                match store.data_version().await {
                    Ok(version) => {
                        tell.send_if_modified(|seen| std::mem::replace(seen, version) != version);
                    }
                    Err(StoreError::Closed) => return,
                    Err(error) => tracing::warn!(%error, "cannot see whether the database changed"),
                }
            }
        });
        told
    }
}

/// Milliseconds since the Unix epoch: how times are stored.
pub fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

#[cfg(test)]
pub(crate) fn scratch() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("thaw.db")).unwrap();
    (dir, store)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_private_and_opens_twice() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, first) = scratch();
        let path = dir.path().join("thaw.db");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let second = Store::open(&path).unwrap();
        first
            .call_blocking(|c| c.execute("INSERT INTO users (id, name, plan, created_ms) VALUES ('u', 'n', 'default', 0)", []))
            .unwrap();
        let users: i64 = second
            .call_blocking(|c| c.query_row("SELECT count(*) FROM users", [], |r| r.get(0)))
            .unwrap();
        assert_eq!(users, 1);
    }

    #[tokio::test]
    async fn another_connection_s_write_is_noticed() {
        let (dir, store) = scratch();
        let mut changes = store.watch_changes();
        changes.changed().await.unwrap();
        let other = Store::open(&dir.path().join("thaw.db")).unwrap();
        other
            .call(|c| c.execute("INSERT INTO users (id, name, plan, created_ms) VALUES ('u', 'n', 'default', 0)", []))
            .await
            .unwrap();
        changes.changed().await.unwrap();
    }

    #[test]
    fn garbage_is_not_a_database() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("thaw.db");
        std::fs::write(&path, [7u8; 4096]).unwrap();
        assert!(Store::open(&path).is_err());
    }
}
