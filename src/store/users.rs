//! Users: who owns sessions, tasks and keys.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::now_ms;

/// A user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserRow {
    /// A version 4 UUID; the tenant id.
    pub id: String,
    /// What the user logs in as.
    pub name: String,
    /// Where to reach the user.
    pub email: Option<String>,
    /// The argon2id hash in PHC form, when a password is set.
    pub password: Option<String>,
    /// The name of the plan that applies where a key has none of its own.
    pub plan: String,
    /// Tokens of an earlier epoch are refused.
    pub epoch: i64,
    /// The user may not do anything.
    pub disabled: bool,
}

const COLUMNS: &str = "id, name, email, password, plan, epoch, disabled_ms IS NOT NULL";

impl UserRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            name: row.get(1)?,
            email: row.get(2)?,
            password: row.get(3)?,
            plan: row.get(4)?,
            epoch: row.get(5)?,
            disabled: row.get(6)?,
        })
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// SQLite's.
    pub fn all(connection: &Connection) -> rusqlite::Result<Vec<Self>> {
        connection
            .prepare(&format!("SELECT {COLUMNS} FROM users ORDER BY name"))?
            .query_map([], Self::read)?
            .collect()
    }

    /// The one of this name.
    ///
    /// # Errors
    /// SQLite's.
    pub fn by_name(connection: &Connection, name: &str) -> rusqlite::Result<Option<Self>> {
        connection
            .query_row(
                &format!("SELECT {COLUMNS} FROM users WHERE name = ?1"),
                [name],
                Self::read,
            )
            .optional()
    }

    /// Makes a user and returns its id. The name must be free.
    ///
    /// # Errors
    /// SQLite's, a constraint violation when the name is taken.
    pub fn insert(
        connection: &Connection,
        name: &str,
        email: Option<&str>,
        plan: &str,
    ) -> rusqlite::Result<String> {
        let id = uuid::Uuid::new_v4().to_string();
        connection.execute(
            "INSERT INTO users (id, name, email, plan, created_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![id, name, email, plan, now_ms()],
        )?;
        Ok(id)
    }

    /// Sets the password's hash, and ends every token given out before. Whether there is such a user.
    ///
    /// # Errors
    /// SQLite's.
    pub fn set_password(connection: &Connection, name: &str, hash: &str) -> rusqlite::Result<bool> {
        let changed = connection.execute(
            "UPDATE users SET password = ?2, epoch = epoch + 1 WHERE name = ?1",
            params![name, hash],
        )?;
        Ok(changed == 1)
    }

    /// Puts the user on a plan. Whether there is such a user.
    ///
    /// # Errors
    /// SQLite's.
    pub fn set_plan(connection: &Connection, name: &str, plan: &str) -> rusqlite::Result<bool> {
        let changed = connection.execute(
            "UPDATE users SET plan = ?2 WHERE name = ?1",
            params![name, plan],
        )?;
        Ok(changed == 1)
    }

    /// Locks the user out (keys and tokens) or lets the user in again. Whether there is such a user.
    ///
    /// # Errors
    /// SQLite's.
    pub fn set_disabled(
        connection: &Connection,
        name: &str,
        disabled: bool,
    ) -> rusqlite::Result<bool> {
        let at = disabled.then(now_ms);
        let changed = connection.execute(
            "UPDATE users SET disabled_ms = ?2, epoch = epoch + 1 WHERE name = ?1",
            params![name, at],
        )?;
        Ok(changed == 1)
    }
}
