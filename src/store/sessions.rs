//! Sessions, so that they outlive the server: what they were made with, not their VMs.

use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use rusqlite::{Connection, Row, params};

use crate::session::{SessionId, SessionRow, SessionRows, SessionSpec, TenantId};

use super::Store;

/// `metadata` and `env` are JSON objects. `generations` has one row: the first VM generation
/// that no run of the server has reserved.
pub(super) const SCHEMA: &str = "
CREATE TABLE sessions (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    lifetime_ms INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    vcpus INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    env TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    last_vm TEXT
) STRICT, WITHOUT ROWID;
CREATE TABLE generations (
    only INTEGER PRIMARY KEY CHECK (only = 0),
    next INTEGER NOT NULL
) STRICT;
INSERT INTO generations (only, next) VALUES (0, 1);
";

/// How long notes of new VMs are gathered before they are written together: each write is
/// synced to disk, and the tasks' acknowledgements wait for the same thread.
const GATHER: Duration = Duration::from_millis(250);

/// Sessions' rows in the store.
#[derive(Debug)]
pub struct StoredSessions {
    store: Store,
    started: std::sync::Mutex<Vec<(SessionId, String)>>,
}

impl StoredSessions {
    /// Over this store.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            started: std::sync::Mutex::default(),
        }
    }

    fn started(&self) -> std::sync::MutexGuard<'_, Vec<(SessionId, String)>> {
        let started = self.started.lock();
        started.unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl SessionRows for StoredSessions {
    fn load(&self) -> BoxFuture<'_, anyhow::Result<Vec<SessionRow>>> {
        Box::pin(async {
            let rows = self.store.call(|connection| {
                let mut select = connection.prepare(
                    "SELECT id, tenant, lifetime_ms, memory_mib, vcpus, metadata, env, created_ms, last_vm FROM sessions",
                )?;
                select.query_map([], read)?.collect::<Result<Vec<_>, _>>()
            });
            Ok(rows.await?)
        })
    }

    fn insert(&self, row: SessionRow) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move {
            let metadata = serde_json::to_string(&row.spec.metadata)?;
            let env = serde_json::to_string(&row.spec.env)?;
            let created = row.created_at.duration_since(SystemTime::UNIX_EPOCH);
            let created_ms = created.map_or(0, millis);
            self.store
                .call(move |connection| {
                    let mut insert = connection.prepare_cached(
                        "INSERT INTO sessions (id, tenant, lifetime_ms, memory_mib, vcpus, metadata, env, created_ms, last_vm)
                         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
                    )?;
                    insert.execute(params![
                        row.id.to_string(),
                        row.tenant.0,
                        millis(row.spec.lifetime),
                        row.spec.memory_mib,
                        row.spec.vcpus,
                        metadata,
                        env,
                        created_ms,
                        row.last_vm,
                    ])
                })
                .await?;
            Ok(())
        })
    }

    fn started(&self, id: SessionId, vm_id: String) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move {
            let gathering = {
                let mut started = StoredSessions::started(self);
                started.push((id, vm_id));
                started.len() > 1
            };
            if gathering {
                return Ok(());
            }
            tokio::time::sleep(GATHER).await;
            let started = std::mem::take(&mut *StoredSessions::started(self));
            let noted = self.store.call(move |connection| {
                in_one(
                    connection,
                    "UPDATE sessions SET last_vm = ?2 WHERE id = ?1",
                    |update| {
                        for (id, vm_id) in started {
                            update.execute(params![id.to_string(), vm_id])?;
                        }
                        Ok(())
                    },
                )
            });
            Ok(noted.await?)
        })
    }

    fn respec(&self, id: SessionId, spec: SessionSpec) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move {
            let metadata = serde_json::to_string(&spec.metadata)?;
            let env = serde_json::to_string(&spec.env)?;
            let changed = self.store.call(move |connection| {
                let mut update = connection.prepare_cached(
                    "UPDATE sessions SET lifetime_ms = ?2, memory_mib = ?3, vcpus = ?4, metadata = ?5, env = ?6
                     WHERE id = ?1",
                )?;
                update.execute(params![
                    id.to_string(),
                    millis(spec.lifetime),
                    spec.memory_mib,
                    spec.vcpus,
                    metadata,
                    env,
                ])
            });
            changed.await?;
            Ok(())
        })
    }

    fn forget(&self, ids: Vec<SessionId>) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move {
            let forgotten = self.store.call(move |connection| {
                in_one(connection, "DELETE FROM sessions WHERE id = ?1", |delete| {
                    for id in ids {
                        delete.execute([id.to_string()])?;
                    }
                    Ok(())
                })
            });
            Ok(forgotten.await?)
        })
    }

    fn reserve_generations(&self, count: u64) -> BoxFuture<'_, anyhow::Result<u64>> {
        Box::pin(async move {
            let count = i64::try_from(count)?;
            // A host whose database was deleted does not start over.
            let at_least = super::now_ms() << 20;
            let next: i64 = self
                .store
                .call(move |connection| {
                    connection.query_row(
                        "UPDATE generations SET next = max(next, ?2) + ?1 RETURNING next",
                        [count, at_least],
                        |row| row.get(0),
                    )
                })
                .await?;
            Ok(u64::try_from(next - count)?)
        })
    }
}

/// Runs one statement many times in one transaction.
fn in_one(
    connection: &mut Connection,
    sql: &str,
    run: impl FnOnce(&mut rusqlite::CachedStatement<'_>) -> rusqlite::Result<()>,
) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    run(&mut transaction.prepare_cached(sql)?)?;
    transaction.commit()
}

fn read(row: &Row<'_>) -> rusqlite::Result<SessionRow> {
    let created_ms: i64 = row.get(7)?;
    Ok(SessionRow {
        id: SessionId::parse(&row.get::<_, String>(0)?).ok_or_else(|| wrong(0, "not an id"))?,
        tenant: TenantId(row.get(1)?),
        spec: SessionSpec {
            lifetime: Duration::from_millis(row.get::<_, i64>(2)?.unsigned_abs()),
            memory_mib: row.get(3)?,
            vcpus: row.get(4)?,
            metadata: json(row, 5)?,
            env: json(row, 6)?,
        },
        created_at: SystemTime::UNIX_EPOCH + Duration::from_millis(created_ms.unsigned_abs()),
        last_vm: row.get(8)?,
    })
}

fn json<T: serde::de::DeserializeOwned>(row: &Row<'_>, column: usize) -> rusqlite::Result<T> {
    serde_json::from_str(&row.get::<_, String>(column)?).map_err(|error| wrong(column, error))
}

fn wrong(
    column: usize,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> rusqlite::Error {
    let text = rusqlite::types::Type::Text;
    rusqlite::Error::FromSqlConversionFailure(column, text, error.into())
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::scratch;

    #[tokio::test]
    async fn a_session_comes_back_as_it_was_until_it_is_forgotten() {
        let (_dir, store) = scratch();
        let rows = StoredSessions::new(store);
        let row = SessionRow {
            tenant: TenantId("t".into()),
            id: SessionId::mint(),
            spec: SessionSpec {
                lifetime: Duration::from_secs(300),
                memory_mib: 512,
                vcpus: 2,
                metadata: [("k".to_owned(), serde_json::json!([1, null]))].into(),
                env: [("A".to_owned(), "ü=\n".to_owned())].into(),
            },
            created_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            last_vm: None,
        };
        rows.insert(row.clone()).await.unwrap();
        SessionRows::started(&rows, row.id.clone(), "vm".into())
            .await
            .unwrap();
        let back = rows.load().await.unwrap().remove(0);
        assert_eq!((&back.id, &back.tenant), (&row.id, &row.tenant));
        assert_eq!(back.created_at, row.created_at);
        assert_eq!(back.last_vm.as_deref(), Some("vm"));
        assert_eq!(format!("{:?}", back.spec), format!("{:?}", row.spec));
        rows.forget(vec![row.id]).await.unwrap();
        assert!(rows.load().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn generations_are_never_handed_out_twice_across_runs() {
        let (dir, store) = scratch();
        let first = StoredSessions::new(store)
            .reserve_generations(100)
            .await
            .unwrap();
        let again = Store::open(&dir.path().join("thaw.db")).unwrap();
        let second = StoredSessions::new(again)
            .reserve_generations(100)
            .await
            .unwrap();
        assert!(first > 0 && second >= first + 100, "{first} {second}");
    }
}
