//! The records of VMs in memory: found by every id that a VM had, and what of them is not written yet.

use std::collections::{HashMap, HashSet};

use super::record::VmRecord;

#[derive(Debug, Default)]
pub(super) struct Books {
    pub(super) records: HashMap<String, VmRecord>,
    pub(super) aliases: HashMap<String, String>,
    pub(super) changed: HashSet<String>,
    pub(super) removed: Vec<String>,
}

impl Books {
    pub(super) fn resolve<'a>(&'a self, vm_id: &'a str) -> &'a str {
        self.aliases.get(vm_id).map_or(vm_id, String::as_str)
    }

    pub(super) fn get(&self, vm_id: &str) -> Option<&VmRecord> {
        self.records.get(self.resolve(vm_id))
    }

    pub(super) fn put(&mut self, record: VmRecord) {
        self.aliases.remove(&record.vm_id);
        for alias in &record.aliases {
            self.aliases.insert(alias.clone(), record.vm_id.clone());
        }
        self.changed.insert(record.vm_id.clone());
        self.records.insert(record.vm_id.clone(), record);
    }

    pub(super) fn remove(&mut self, vm_id: &str) -> Option<VmRecord> {
        let record = self.records.remove(vm_id)?;
        self.changed.remove(vm_id);
        self.removed.push(vm_id.to_owned());
        for alias in &record.aliases {
            self.aliases.remove(alias);
        }
        Some(record)
    }

    /// Forgets the oldest records of the tenant's VMs that are over, beyond a number.
    pub(super) fn prune(&mut self, tenant: &str, keep: usize) {
        let mut over: Vec<(i64, String)> = self
            .records
            .values()
            .filter(|record| record.tenant == tenant && record.status.is_over())
            .map(|record| (record.created_ms, record.vm_id.clone()))
            .collect();
        // A tenth more than asked for, so that the search is paid for seldom.
        if over.len() <= keep + keep / 10 {
            return;
        }
        over.sort_unstable();
        let beyond = over.len() - keep;
        for (_, vm_id) in over.into_iter().take(beyond) {
            self.remove(&vm_id);
        }
    }
}
