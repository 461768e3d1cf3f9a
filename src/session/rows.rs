//! What of a session outlives the server.

use std::fmt::Debug;
use std::time::SystemTime;

use futures_util::future::BoxFuture;

use super::types::{SessionId, SessionSpec, TenantId};

/// A session as it is stored.
#[derive(Clone, Debug)]
pub struct SessionRow {
    /// Who owns it.
    pub tenant: TenantId,
    /// Its id.
    pub id: SessionId,
    /// What it was made with.
    pub spec: SessionSpec,
    /// When it was made.
    pub created_at: SystemTime,
    /// Its latest VM's id, if it ever had one.
    pub last_vm: Option<String>,
}

/// Where sessions are stored. Nothing here is on a warm command's path.
pub trait SessionRows: Debug + Send + Sync + 'static {
    /// All rows.
    ///
    /// # Errors
    /// They cannot be read.
    fn load(&self) -> BoxFuture<'_, anyhow::Result<Vec<SessionRow>>>;

    /// Adds a row; durable when it returns.
    ///
    /// # Errors
    /// It could not be written.
    fn insert(&self, row: SessionRow) -> BoxFuture<'_, anyhow::Result<()>>;

    /// Notes the latest VM of a session.
    ///
    /// # Errors
    /// It could not be written.
    fn started(&self, id: SessionId, vm_id: String) -> BoxFuture<'_, anyhow::Result<()>>;

    /// Changes what a session's next VM is made by.
    ///
    /// # Errors
    /// It could not be written.
    fn respec(&self, id: SessionId, spec: SessionSpec) -> BoxFuture<'_, anyhow::Result<()>>;

    /// Removes rows.
    ///
    /// # Errors
    /// They could not be removed.
    fn forget(&self, ids: Vec<SessionId>) -> BoxFuture<'_, anyhow::Result<()>>;

    /// Reserves so many VM generations for this run of the server and gives the first; none of them was ever
    /// reserved before.
    ///
    /// # Errors
    /// The reservation could not be written.
    fn reserve_generations(&self, count: u64) -> BoxFuture<'_, anyhow::Result<u64>>;
}

/// Remembers nothing: for tests and for servers without a store.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoRows;

impl SessionRows for NoRows {
    fn load(&self) -> BoxFuture<'_, anyhow::Result<Vec<SessionRow>>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn insert(&self, _: SessionRow) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn started(&self, _: SessionId, _: String) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn respec(&self, _: SessionId, _: SessionSpec) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn forget(&self, _: Vec<SessionId>) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn reserve_generations(&self, _: u64) -> BoxFuture<'_, anyhow::Result<u64>> {
        Box::pin(async { Ok(1) })
    }
}
