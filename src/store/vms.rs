//! Records of VMs, as JSON: what is looked for in them is looked for in memory.

use rusqlite::{Connection, params};

pub(super) const SCHEMA: &str = "
CREATE TABLE vms (
    id TEXT PRIMARY KEY,
    record TEXT NOT NULL
) STRICT, WITHOUT ROWID;
";

/// A record as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRow {
    /// The VM's id.
    pub id: String,
    /// The record.
    pub record: String,
}

impl VmRow {
    /// All of them.
    ///
    /// # Errors
    /// SQLite's.
    pub fn all(connection: &Connection) -> rusqlite::Result<Vec<Self>> {
        connection
            .prepare("SELECT id, record FROM vms")?
            .query_map([], |row| {
                Ok(Self {
                    id: row.get(0)?,
                    record: row.get(1)?,
                })
            })?
            .collect()
    }

    /// Stores some and removes others, in one transaction.
    ///
    /// # Errors
    /// SQLite's.
    pub fn change(
        connection: &mut Connection,
        set: &[Self],
        removed: &[String],
    ) -> rusqlite::Result<()> {
        let transaction = connection.transaction()?;
        {
            let mut insert = transaction
                .prepare_cached("INSERT OR REPLACE INTO vms (id, record) VALUES (?1, ?2)")?;
            for row in set {
                insert.execute(params![row.id, row.record])?;
            }
            let mut delete = transaction.prepare_cached("DELETE FROM vms WHERE id = ?1")?;
            for id in removed {
                delete.execute([id])?;
            }
        }
        transaction.commit()
    }
}
