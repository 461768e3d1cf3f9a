//! Egress policies, as JSON, by what they are for.

use rusqlite::{Connection, OptionalExtension, params};

use super::now_ms;

pub(super) const SCHEMA: &str = "
CREATE TABLE egress (
    tenant TEXT NOT NULL,
    subject TEXT NOT NULL,
    policy TEXT NOT NULL,
    updated_ms INTEGER NOT NULL,
    PRIMARY KEY (tenant, subject)
) STRICT, WITHOUT ROWID;
";

/// Most policies of one tenant; the ones longest unchanged go first. One for each session that a
/// tenant may have by default.
const MOST: i64 = 10_000;

/// Stores a policy for a subject such as `vm/<id>`.
///
/// # Errors
/// SQLite's.
pub fn set_egress(
    connection: &Connection,
    tenant: &str,
    subject: &str,
    policy: &str,
) -> rusqlite::Result<()> {
    connection.execute(
        "INSERT OR REPLACE INTO egress (tenant, subject, policy, updated_ms) VALUES (?1, ?2, ?3, ?4)",
        params![tenant, subject, policy, now_ms()],
    )?;
    connection.execute(
        "DELETE FROM egress WHERE tenant = ?1 AND subject IN
         (SELECT subject FROM egress WHERE tenant = ?1 ORDER BY updated_ms DESC LIMIT -1 OFFSET ?2)",
        params![tenant, MOST],
    )?;
    Ok(())
}

/// The policy of a subject.
///
/// # Errors
/// SQLite's.
pub fn get_egress(
    connection: &Connection,
    tenant: &str,
    subject: &str,
) -> rusqlite::Result<Option<String>> {
    connection
        .query_row(
            "SELECT policy FROM egress WHERE tenant = ?1 AND subject = ?2",
            [tenant, subject],
            |row| row.get(0),
        )
        .optional()
}
