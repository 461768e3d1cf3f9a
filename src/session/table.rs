//! The session table. Only `Arc`s come out of it, so no map guard can live across an await.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dashmap::DashMap;

use super::line::lock;
use super::session::Session;
use super::types::{SessionId, TenantId};

/// All sessions. The owner is part of the key: the look-up is the owner check.
#[derive(Debug, Default)]
pub(crate) struct Table {
    map: DashMap<(TenantId, SessionId), Arc<Session>>,
    counts: Mutex<HashMap<TenantId, usize>>,
}

/// The tenant has too many sessions and none can be forgotten.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

impl Table {
    /// This tenant's session of this id.
    pub(crate) fn get(&self, tenant: &TenantId, id: &SessionId) -> Option<Arc<Session>> {
        let key = (tenant.clone(), id.clone());
        self.map.get(&key).map(|session| session.value().clone())
    }

    /// Adds a session. At the limit the tenant's sessions longest unused are forgotten, a
    /// tenth of them at once so that the search is paid for seldom; gives what was forgotten.
    pub(crate) fn insert(
        &self,
        session: Arc<Session>,
        max: usize,
    ) -> Result<Vec<SessionId>, TooMany> {
        let tenant = session.tenant.clone();
        let mut forgotten = Vec::new();
        if self.count(&tenant) >= max {
            let mut unused: Vec<_> = self
                .all()
                .into_iter()
                .filter(|s| s.tenant == tenant)
                .filter_map(|s| Some((s.unused_for()?, s)))
                .collect();
            unused.sort_by_key(|(unused, _)| std::cmp::Reverse(*unused));
            for (_, old) in unused.into_iter().take((max / 10).max(1)) {
                self.remove(&tenant, &old.id);
                forgotten.push(old.id.clone());
            }
        }
        {
            let mut counts = lock(&self.counts);
            let count = counts.entry(tenant.clone()).or_insert(0);
            if *count >= max {
                return Err(TooMany);
            }
            *count += 1;
        }
        self.map.insert((tenant, session.id.clone()), session);
        Ok(forgotten)
    }

    /// Takes a session out.
    pub(crate) fn remove(&self, tenant: &TenantId, id: &SessionId) {
        let key = (tenant.clone(), id.clone());
        if self.map.remove(&key).is_some() {
            let mut counts = lock(&self.counts);
            if let Some(count) = counts.get_mut(tenant) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    counts.remove(tenant);
                }
            }
        }
    }

    /// Takes out the sessions unused for this long; gives their ids.
    pub(crate) fn remove_unused(&self, age: Duration) -> Vec<SessionId> {
        let old = self.all().into_iter();
        old.filter(|s| s.unused_for().is_some_and(|unused| unused >= age))
            .map(|session| {
                self.remove(&session.tenant, &session.id);
                session.id.clone()
            })
            .collect()
    }

    /// All sessions, in no order.
    pub(crate) fn all(&self) -> Vec<Arc<Session>> {
        self.map.iter().map(|entry| entry.value().clone()).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    fn count(&self, tenant: &TenantId) -> usize {
        lock(&self.counts).get(tenant).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::types::SessionSpec;
    use super::*;

    fn session(tenant: &str) -> Arc<Session> {
        let spec = SessionSpec {
            lifetime: Duration::from_secs(300),
            memory_mib: 512,
            vcpus: 1,
            metadata: BTreeMap::new(),
            env: BTreeMap::new(),
        };
        Arc::new(Session::new(
            TenantId(tenant.into()),
            SessionId::mint(),
            spec,
        ))
    }

    #[test]
    fn another_tenant_sees_nothing() {
        let table = Table::default();
        let mine = session("a");
        table.insert(mine.clone(), 10).unwrap();
        assert!(table.get(&mine.tenant, &mine.id).is_some());
        assert!(table.get(&TenantId("b".into()), &mine.id).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_limit_the_longest_unused_goes_and_a_used_one_stays() {
        let table = Table::default();
        let (old, newer) = (session("a"), session("a"));
        tokio::time::advance(Duration::from_secs(1)).await;
        newer.touch();
        table.insert(old.clone(), 2).unwrap();
        table.insert(newer.clone(), 2).unwrap();
        assert_eq!(table.insert(session("a"), 2), Ok(vec![old.id.clone()]));
        assert!(table.get(&newer.tenant, &newer.id).is_some());
        let _turns = table
            .all()
            .into_iter()
            .map(|s| s.line.join(1))
            .collect::<Vec<_>>();
        assert_eq!(table.insert(session("a"), 2), Err(TooMany));
        table.insert(session("b"), 2).unwrap();
        assert_eq!(table.len(), 3);
    }
}
