//! Answers that are kept for who asks again, within bounds that tenants share fairly.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::time::Instant;

use super::{KEPT_BYTES, KEPT_REQUESTS, Open, SWEEP, Same, answered_before};
use crate::session::TenantId;

/// A request that has been answered.
#[derive(Debug)]
pub(super) struct Answered {
    /// When it may be forgotten.
    pub(super) until: Instant,
    pub(super) same: Same,
    pub(super) open: Arc<Open>,
    /// Bytes of its answer.
    pub(super) size: usize,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Kept {
    tenants: HashMap<TenantId, Theirs>,
    bytes: usize,
    requests: usize,
    swept: Option<Instant>,
}

/// One tenant's. Each queue is in the order in which its requests are to be forgotten, since all of a kind are
/// kept equally long.
#[derive(Debug, Default)]
struct Theirs {
    bytes: usize,
    undelivered: VecDeque<Answered>,
    named: VecDeque<Answered>,
    /// Named ones without their answers: that they ran.
    ran: VecDeque<Answered>,
}

impl Theirs {
    fn requests(&self) -> usize {
        self.undelivered.len() + self.named.len() + self.ran.len()
    }

    fn queues(&mut self) -> [&mut VecDeque<Answered>; 3] {
        [&mut self.ran, &mut self.named, &mut self.undelivered]
    }
}

impl Kept {
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn keep(&mut self, answered: Answered) {
        let theirs = self
            .tenants
            .entry(answered.same.tenant().clone())
            .or_default();
        theirs.bytes += answered.size;
        self.bytes += answered.size;
        self.requests += 1;
        match answered.same {
            Same::Named(..) => theirs.named.push_back(answered),
            Same::Body(..) | Same::New(..) => theirs.undelivered.push_back(answered),
        }
    }

    /// What is to be forgotten: of this tenant what is over, from time to time of all, and what is too much.
    pub(super) fn old(&mut self, tenant: &TenantId, now: Instant) -> Vec<Answered> {
        let mut old = Vec::new();
        if self.swept.is_none_or(|last| now - last >= SWEEP) {
            self.swept = Some(now);
            let tenants: Vec<TenantId> = self.tenants.keys().cloned().collect();
            for tenant in &tenants {
                self.expire(tenant, now, &mut old);
            }
        } else {
            self.expire(tenant, now, &mut old);
        }
        while self.bytes > KEPT_BYTES && self.shed_answer(&mut old) {}
        while self.requests > KEPT_REQUESTS && self.shed_request(&mut old) {}
        old
    }

    fn expire(&mut self, tenant: &TenantId, now: Instant, old: &mut Vec<Answered>) {
        let Some(theirs) = self.tenants.get_mut(tenant) else {
            return;
        };
        let before = old.len();
        for queue in theirs.queues() {
            while queue.front().is_some_and(|first| first.until <= now) {
                old.extend(queue.pop_front());
            }
        }
        let freed: usize = old[before..].iter().map(|gone| gone.size).sum();
        theirs.bytes -= freed;
        self.bytes -= freed;
        self.requests -= old.len() - before;
        if theirs.requests() == 0 {
            self.tenants.remove(tenant);
        }
    }

    /// Drops an answer of who has most bytes of them; says whether there was one.
    fn shed_answer(&mut self, old: &mut Vec<Answered>) -> bool {
        let most = self.tenants.values_mut().max_by_key(|theirs| theirs.bytes);
        let Some(theirs) = most else { return false };
        let freed = if let Some(mut named) = theirs.named.pop_front() {
            let freed = std::mem::take(&mut named.size);
            named.open.answer.send_replace(Some(Err(answered_before())));
            theirs.ran.push_back(named);
            freed
        } else if let Some(gone) = theirs.undelivered.pop_front() {
            let freed = gone.size;
            self.requests -= 1;
            old.push(gone);
            freed
        } else {
            return false;
        };
        theirs.bytes -= freed;
        self.bytes -= freed;
        true
    }

    /// Drops the oldest request of who has most of them; says whether there was one.
    fn shed_request(&mut self, old: &mut Vec<Answered>) -> bool {
        let most = self
            .tenants
            .values_mut()
            .max_by_key(|theirs| theirs.requests());
        let Some(theirs) = most else { return false };
        let Some(gone) = theirs.queues().into_iter().find_map(VecDeque::pop_front) else {
            return false;
        };
        theirs.bytes -= gone.size;
        self.bytes -= gone.size;
        self.requests -= 1;
        old.push(gone);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    use tokio::sync::watch;

    fn answered(tenant: &str, number: usize, until: Instant) -> Answered {
        let name = number.to_string();
        Answered {
            until,
            same: Same::Named(TenantId(tenant.into()), "/execute", name),
            open: Arc::new(Open {
                content: [0; 32],
                waiting: AtomicUsize::new(0),
                taken: AtomicBool::new(true),
                answer: watch::Sender::new(None),
                changed: Arc::default(),
            }),
            size: 1,
        }
    }

    #[test]
    fn too_many_requests_cost_who_sends_them() {
        let (a, b) = (TenantId("a".into()), TenantId("b".into()));
        let now = Instant::now();
        let later = now + std::time::Duration::from_secs(60);
        let mut kept = Kept::default();
        kept.keep(answered("b", 0, later));
        for number in 0..KEPT_REQUESTS {
            kept.keep(answered("a", number, later));
        }
        let old = kept.old(&b, now);
        assert_eq!(old.len(), 1);
        assert_eq!(old[0].same, answered("a", 0, now).same);
        assert_eq!(kept.old(&a, later).len(), KEPT_REQUESTS);
        assert_eq!((kept.requests, kept.bytes, kept.tenants.len()), (0, 0, 0));
    }
}
