//! Plans: how much a key may ask for.

use rusqlite::{Connection, Row, params};

/// A plan.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PlanRow {
    /// Its name; `default` is what users and keys have when nothing else is said.
    pub name: String,
    /// Requests a key may make in a minute, in the long run.
    pub requests_per_minute: u32,
    /// Requests a key may make at once after a pause.
    pub burst: u32,
    /// VMs a user may have at once.
    pub max_vms: u32,
}

impl PlanRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            name: row.get(0)?,
            requests_per_minute: row.get(1)?,
            burst: row.get(2)?,
            max_vms: row.get(3)?,
        })
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// SQLite's.
    pub fn all(connection: &Connection) -> rusqlite::Result<Vec<Self>> {
        connection
            .prepare("SELECT name, requests_per_minute, burst, max_vms FROM plans ORDER BY name")?
            .query_map([], Self::read)?
            .collect()
    }

    /// Makes the plan or changes it.
    ///
    /// # Errors
    /// SQLite's.
    pub fn set(&self, connection: &Connection) -> rusqlite::Result<()> {
        connection.execute(
            "INSERT INTO plans (name, requests_per_minute, burst, max_vms) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT(name) DO UPDATE SET requests_per_minute = ?2, burst = ?3, max_vms = ?4",
            params![
                self.name,
                self.requests_per_minute,
                self.burst,
                self.max_vms
            ],
        )?;
        Ok(())
    }

    /// Forgets the plan; whoever has it falls back to `default`. Whether there was one.
    ///
    /// # Errors
    /// SQLite's.
    pub fn remove(connection: &Connection, name: &str) -> rusqlite::Result<bool> {
        Ok(connection.execute("DELETE FROM plans WHERE name = ?1", [name])? == 1)
    }
}
