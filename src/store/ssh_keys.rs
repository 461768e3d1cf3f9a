//! Public SSH keys.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::now_ms;

pub(super) const SCHEMA: &str = "
CREATE TABLE ssh_keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    public_key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    comment TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    UNIQUE (tenant, fingerprint)
) STRICT;
";

/// A key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshKeyRow {
    /// A small number, which people type.
    pub id: i64,
    /// As in `authorized_keys`, without options.
    pub public_key: String,
    /// `SHA256:` and the digest in base64, as `ssh-keygen -l` shows it.
    pub fingerprint: String,
    /// What the key says about itself.
    pub comment: String,
    /// Milliseconds since the Unix epoch.
    pub created_ms: i64,
}

impl SshKeyRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            public_key: row.get(1)?,
            fingerprint: row.get(2)?,
            comment: row.get(3)?,
            created_ms: row.get(4)?,
        })
    }

    /// The tenant's keys, oldest first.
    ///
    /// # Errors
    /// SQLite's.
    pub fn of(connection: &Connection, tenant: &str) -> rusqlite::Result<Vec<Self>> {
        connection
            .prepare_cached(
                "SELECT id, public_key, fingerprint, comment, created_ms FROM ssh_keys WHERE tenant = ?1 ORDER BY id",
            )?
            .query_map([tenant], Self::read)?
            .collect()
    }

    /// Stores a key, unless the tenant has `most`. A key that is there already stays as it is. Gives
    /// the row, and whether it is new; `None`: too many.
    ///
    /// # Errors
    /// SQLite's.
    pub fn add(
        connection: &mut Connection,
        tenant: &str,
        new: &Self,
        most: usize,
    ) -> rusqlite::Result<Option<(Self, bool)>> {
        let transaction = connection.transaction()?;
        let all = Self::of(&transaction, tenant)?;
        let there = all.iter().find(|key| key.fingerprint == new.fingerprint);
        if let Some(key) = there {
            return Ok(Some((key.clone(), false)));
        }
        if all.len() >= most {
            return Ok(None);
        }
        transaction.execute(
            "INSERT INTO ssh_keys (tenant, public_key, fingerprint, comment, created_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![tenant, new.public_key, new.fingerprint, new.comment, now_ms()],
        )?;
        let id = transaction.last_insert_rowid();
        let key = transaction.query_row(
            "SELECT id, public_key, fingerprint, comment, created_ms FROM ssh_keys WHERE id = ?1",
            [id],
            Self::read,
        )?;
        transaction.commit()?;
        Ok(Some((key, true)))
    }

    /// Removes one of the tenant's keys; gives it.
    ///
    /// # Errors
    /// SQLite's.
    pub fn remove(
        connection: &Connection,
        tenant: &str,
        id: i64,
    ) -> rusqlite::Result<Option<Self>> {
        connection
            .query_row(
                "DELETE FROM ssh_keys WHERE tenant = ?1 AND id = ?2
                 RETURNING id, public_key, fingerprint, comment, created_ms",
                params![tenant, id],
                Self::read,
            )
            .optional()
    }
}
