//! Users, keys and plans in memory, so that a request needs no database to be authenticated.
//!
//! The directory is read whole at start-up and again whenever another process (`thaw key revoke`)
//! has written to the database; see [`crate::store::Store::watch_changes`].

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use super::key;
use crate::config::DefaultPlan;
use crate::session::{PlanLimits, TenantId};
use crate::store::{KeyRow, PlanRow, Store, StoreError, UserRow, now_ms};

/// Who makes a request, and what it may cost.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The user as the owner of sessions and tasks.
    pub tenant: TenantId,
    /// The user.
    pub user: Arc<UserRow>,
    /// What the plan allows.
    pub limits: PlanLimits,
    /// The plan of the key alone, if it has one.
    pub key_plan: Option<String>,
    pace: Arc<Pace>,
}

impl Caller {
    /// Counts a request against the plan.
    ///
    /// # Errors
    /// The plan's requests are used up; how many seconds until there is one again.
    pub fn spend(&self) -> Result<(), u64> {
        self.pace.limiter.check().map_err(|until| {
            let wait = until.wait_time_from(DefaultClock::default().now());
            wait.as_secs_f64().ceil().max(1.0) as u64
        })
    }
}

/// A rate limiter with what it was made from, so that a reload does not refill it.
#[derive(Debug)]
struct Pace {
    requests_per_minute: u32,
    burst: u32,
    limiter: DefaultDirectRateLimiter,
}

impl Pace {
    fn new(plan: &PlanRow) -> Self {
        let per_minute = NonZeroU32::new(plan.requests_per_minute).unwrap_or(NonZeroU32::MIN);
        let burst = NonZeroU32::new(plan.burst).unwrap_or(NonZeroU32::MIN);
        Self {
            requests_per_minute: plan.requests_per_minute,
            burst: plan.burst,
            limiter: RateLimiter::direct(Quota::per_minute(per_minute).allow_burst(burst)),
        }
    }
}

#[derive(Debug)]
struct Key {
    id: String,
    hash: Vec<u8>,
    caller: Caller,
    used: Arc<Used>,
}

/// When a key was last used, and what of that is stored: milliseconds since the Unix epoch, or 0.
#[derive(Debug, Default)]
struct Used {
    last_ms: AtomicI64,
    stored_ms: AtomicI64,
}

/// Everybody who may use the server.
#[derive(Debug, Default)]
pub struct Directory {
    keys: HashMap<String, Vec<Key>>,
    /// By user id: for bearer tokens, which count against a limiter of their own.
    users: HashMap<String, Caller>,
    /// Limiters by key or user id.
    paces: HashMap<String, Arc<Pace>>,
    /// Times of use by key id.
    uses: HashMap<String, Arc<Used>>,
}

impl Directory {
    /// Reads the directory. Limiters whose plan has not changed are taken from `before`.
    ///
    /// # Errors
    /// The store's.
    pub async fn load(
        store: &Store,
        default_plan: &DefaultPlan,
        before: &Self,
    ) -> Result<Self, StoreError> {
        let (users, keys, plans) = store
            .call(|c| Ok((UserRow::all(c)?, KeyRow::all(c)?, PlanRow::all(c)?)))
            .await?;
        let mut plans: HashMap<String, PlanRow> = plans
            .into_iter()
            .map(|plan| (plan.name.clone(), plan))
            .collect();
        let default = plans.remove("default").unwrap_or_else(|| PlanRow {
            name: "default".into(),
            requests_per_minute: default_plan.requests_per_minute,
            burst: default_plan.burst,
            max_vms: default_plan.max_vms,
        });
        let mut new = Self::default();
        let enabled = users.into_iter().filter(|user| !user.disabled);
        for user in enabled.map(Arc::new) {
            let plan = plans.get(&user.plan).unwrap_or(&default);
            let caller = new.caller(&user.id, &user, plan, before);
            new.users.insert(user.id.clone(), caller);
        }
        for row in keys.into_iter().filter(|row| row.revoked_ms.is_none()) {
            let Some(user) = new.users.get(&row.user_id).map(|c| c.user.clone()) else {
                continue;
            };
            let plan = row.plan.as_ref().unwrap_or(&user.plan);
            let mut caller =
                new.caller(&row.id, &user, plans.get(plan).unwrap_or(&default), before);
            caller.key_plan = row.plan;
            let slot = new.keys.entry(row.lookup).or_default();
            let used = before.uses.get(&row.id).cloned().unwrap_or_default();
            new.uses.insert(row.id.clone(), used.clone());
            slot.push(Key {
                id: row.id,
                hash: row.hash,
                caller,
                used,
            });
        }
        Ok(new)
    }

    fn caller(&mut self, id: &str, user: &Arc<UserRow>, plan: &PlanRow, before: &Self) -> Caller {
        let kept = before.paces.get(id).filter(|pace| {
            (pace.requests_per_minute, pace.burst) == (plan.requests_per_minute, plan.burst)
        });
        let pace = kept.cloned().unwrap_or_else(|| Arc::new(Pace::new(plan)));
        self.paces.insert(id.to_owned(), pace.clone());
        Caller {
            tenant: TenantId(user.id.clone()),
            user: user.clone(),
            limits: PlanLimits {
                max_vms: plan.max_vms,
            },
            key_plan: None,
            pace,
        }
    }

    /// Whose key this is.
    pub fn by_key(&self, text: &str) -> Option<&Caller> {
        if text.is_empty() || text.len() > key::MOST_CHARS {
            return None;
        }
        let candidates = self.keys.get(&key::lookup(text))?;
        let found = candidates.iter().find(|k| key::matches(text, &k.hash))?;
        found.used.last_ms.store(now_ms(), Ordering::Relaxed);
        Some(&found.caller)
    }

    /// When this key was last used since the server started.
    pub fn last_used(&self, id: &str) -> Option<i64> {
        let last = self.uses.get(id)?.last_ms.load(Ordering::Relaxed);
        (last > 0).then_some(last)
    }

    /// Uses of keys that are not stored yet.
    pub(super) fn new_uses(&self) -> Vec<(String, i64)> {
        let keys = self.keys.values().flatten();
        keys.filter_map(|key| {
            let last = key.used.last_ms.load(Ordering::Relaxed);
            (last > key.used.stored_ms.load(Ordering::Relaxed)).then(|| (key.id.clone(), last))
        })
        .collect()
    }

    /// Notes that these are stored.
    pub(super) fn stored_uses(&self, uses: &[(String, i64)]) {
        for (id, at) in uses {
            if let Some(used) = self.uses.get(id) {
                used.stored_ms.store(*at, Ordering::Relaxed);
            }
        }
    }

    /// The user of this id.
    pub fn by_user_id(&self, id: &str) -> Option<&Caller> {
        self.users.get(id)
    }

    /// The user of this name.
    pub fn by_user_name(&self, name: &str) -> Option<&Caller> {
        self.users.values().find(|caller| caller.user.name == name)
    }

    /// Keys in force.
    pub fn key_count(&self) -> usize {
        self.keys.values().map(Vec::len).sum()
    }
}
