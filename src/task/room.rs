//! How much code each tenant's open tasks hold in the database.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Counts the bytes of every tenant's open tasks' code.
#[derive(Clone, Debug)]
pub(super) struct CodeRooms {
    most: usize,
    held: Arc<Mutex<HashMap<String, usize>>>,
}

impl CodeRooms {
    /// At most so many bytes a tenant.
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            held: Arc::default(),
        }
    }

    /// Whether so much more would fit now.
    pub(super) fn fits(&self, tenant: &str, bytes: usize) -> bool {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.get(tenant).copied().unwrap_or(0) + bytes <= self.most
    }

    /// Takes room for a task, even if there is none: a task of the last run has been accepted. Says whether it
    /// fits.
    pub(super) fn take(&self, tenant: &str, bytes: usize) -> (CodeRoom, bool) {
        let mut all = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let held = all.entry(tenant.to_owned()).or_default();
        *held += bytes;
        let fits = *held <= self.most;
        let room = CodeRoom {
            rooms: self.clone(),
            tenant: tenant.to_owned(),
            bytes,
        };
        (room, fits)
    }
}

/// One task's room, given back by dropping it.
#[derive(Debug)]
pub(super) struct CodeRoom {
    rooms: CodeRooms,
    tenant: String,
    bytes: usize,
}

impl CodeRoom {
    /// Bytes of the task's code.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for CodeRoom {
    fn drop(&mut self) {
        let mut all = self
            .rooms
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = all.get_mut(&self.tenant) {
            *held = held.saturating_sub(self.bytes);
            if *held == 0 {
                all.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_each_tenant_s_own_and_given_back() {
        let rooms = CodeRooms::new(10);
        let (first, fits) = rooms.take("a", 6);
        assert!(fits && rooms.fits("a", 4) && !rooms.fits("a", 5) && rooms.fits("b", 10));
        let (over, fits) = rooms.take("a", 5);
        assert!(!fits);
        drop(over);
        assert!(rooms.fits("a", 4));
        drop(first);
        assert!(rooms.held.lock().unwrap().is_empty());
    }
}
