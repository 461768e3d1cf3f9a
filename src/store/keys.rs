//! API keys. The key itself is never stored: only its SHA-256 (keys have 256 random bits, so a
//! slow hash would add nothing) and a lookup text that finds the row.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::now_ms;

/// A key's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    /// A version 4 UUID.
    pub id: String,
    /// Its owner.
    pub user_id: String,
    /// What the owner calls it.
    pub name: String,
    /// Finds the row; the key's first characters, when it was minted here.
    pub lookup: String,
    /// SHA-256 of the whole key.
    pub hash: Vec<u8>,
    /// The key's own plan, instead of its owner's.
    pub plan: Option<String>,
    /// Milliseconds since the Unix epoch.
    pub created_ms: i64,
    /// When it was revoked, if it was.
    pub revoked_ms: Option<i64>,
    /// When it was last used, as far as that is stored.
    pub last_used_ms: Option<i64>,
}

/// A key to be stored.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// Its owner.
    pub user_id: String,
    /// What the owner calls it.
    pub name: String,
    /// See [`KeyRow::lookup`].
    pub lookup: String,
    /// SHA-256 of the whole key.
    pub hash: Vec<u8>,
    /// The key's own plan, instead of its owner's.
    pub plan: Option<String>,
}

const COLUMNS: &str = "id, user_id, name, lookup, hash, plan, created_ms, revoked_ms, last_used_ms";

impl KeyRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            user_id: row.get(1)?,
            name: row.get(2)?,
            lookup: row.get(3)?,
            hash: row.get(4)?,
            plan: row.get(5)?,
            created_ms: row.get(6)?,
            revoked_ms: row.get(7)?,
            last_used_ms: row.get(8)?,
        })
    }

    /// All of them, revoked ones included, oldest first.
    ///
    /// # Errors
    /// SQLite's.
    pub fn all(connection: &Connection) -> rusqlite::Result<Vec<Self>> {
        connection
            .prepare(&format!(
                "SELECT {COLUMNS} FROM keys ORDER BY created_ms, id"
            ))?
            .query_map([], Self::read)?
            .collect()
    }

    /// The user's keys in force, oldest first.
    ///
    /// # Errors
    /// SQLite's.
    pub fn of_user(connection: &Connection, user_id: &str) -> rusqlite::Result<Vec<Self>> {
        connection
            .prepare_cached(&format!(
                "SELECT {COLUMNS} FROM keys WHERE user_id = ?1 AND revoked_ms IS NULL ORDER BY created_ms, id"
            ))?
            .query_map([user_id], Self::read)?
            .collect()
    }

    /// One of the user's keys in force.
    ///
    /// # Errors
    /// SQLite's.
    pub fn get(connection: &Connection, user_id: &str, id: &str) -> rusqlite::Result<Option<Self>> {
        connection
            .query_row(
                &format!(
                    "SELECT {COLUMNS} FROM keys WHERE user_id = ?1 AND id = ?2 AND revoked_ms IS NULL"
                ),
                [user_id, id],
                Self::read,
            )
            .optional()
    }

    /// Gives one of the user's keys another name. Whether there is such a key in force.
    ///
    /// # Errors
    /// SQLite's.
    pub fn rename(
        connection: &Connection,
        user_id: &str,
        id: &str,
        name: &str,
    ) -> rusqlite::Result<bool> {
        let changed = connection.execute(
            "UPDATE keys SET name = ?3 WHERE user_id = ?1 AND id = ?2 AND revoked_ms IS NULL",
            params![user_id, id, name],
        )?;
        Ok(changed == 1)
    }

    /// Revokes one of the user's keys. Whether there was such a key in force.
    ///
    /// # Errors
    /// SQLite's.
    pub fn revoke_of(connection: &Connection, user_id: &str, id: &str) -> rusqlite::Result<bool> {
        let changed = connection.execute(
            "UPDATE keys SET revoked_ms = ?3 WHERE user_id = ?1 AND id = ?2 AND revoked_ms IS NULL",
            params![user_id, id, now_ms()],
        )?;
        Ok(changed == 1)
    }

    /// Stores when keys were last used: ids and times.
    ///
    /// # Errors
    /// SQLite's.
    pub fn used(connection: &mut Connection, uses: &[(String, i64)]) -> rusqlite::Result<()> {
        let transaction = connection.transaction()?;
        {
            let mut update = transaction.prepare_cached(
                "UPDATE keys SET last_used_ms = max(coalesce(last_used_ms, 0), ?2) WHERE id = ?1",
            )?;
            for (id, at) in uses {
                update.execute(params![id, at])?;
            }
        }
        transaction.commit()
    }

    /// Revokes the key of this id or lookup text. How many were revoked.
    ///
    /// # Errors
    /// SQLite's.
    pub fn revoke(connection: &Connection, id: &str) -> rusqlite::Result<usize> {
        connection.execute(
            "UPDATE keys SET revoked_ms = ?2 WHERE (id = ?1 OR lookup = ?1) AND revoked_ms IS NULL",
            params![id, now_ms()],
        )
    }
}

impl NewKey {
    /// Stores it and returns its id. A key that is there already, revoked or not, stays as it is.
    ///
    /// # Errors
    /// SQLite's.
    pub fn insert(&self, connection: &Connection) -> rusqlite::Result<String> {
        let id = uuid::Uuid::new_v4().to_string();
        connection.execute(
            "INSERT INTO keys (id, user_id, name, lookup, hash, plan, created_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT(hash) DO NOTHING",
            params![
                id,
                self.user_id,
                self.name,
                self.lookup,
                self.hash,
                self.plan,
                now_ms()
            ],
        )?;
        Ok(id)
    }
}
