//! A client that sends a request again must not run it again.
//!
//! Clients of this API send a POST again when the connection broke or their time-out passed. The first one may
//! still run then: its work is a task of its own and does not end with its connection. A
//! repetition is recognised
//!
//! * by its `Idempotency-Key`, while the first runs and for a while after;
//! * without one, by the same body from the same tenant for the same session, **when nobody waits for
//!   the first any more**. Two identical requests whose clients both wait are two requests:
//!   `n += 1` sent twice at once adds two.
//!
//! An answer that nobody waited for is kept for [`UNDELIVERED`], which covers the pauses clients
//! make between tries.

mod kept;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use dashmap::DashMap;
use kept::{Answered, Kept};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::error::ApiError;
use crate::session::TenantId;

/// How long an answer that nobody waited for is kept: longer than the client's pauses of 1, 2
/// and 4 s between tries.
const UNDELIVERED: Duration = Duration::from_secs(5);

/// How long an answer to a named request is kept.
const NAMED: Duration = Duration::from_secs(600);

/// Bytes of kept answers. Beyond it those go early, oldest first, of the tenant that has the most of them: what
/// one tenant's answers take is no other's loss. Of a named request it is then still known that it ran,
/// and a repetition is refused instead of run.
const KEPT_BYTES: usize = 64 << 20;

/// Requests that are remembered, answers aside: some hundred bytes each. Beyond it, likewise, but then all of it
/// is forgotten.
const KEPT_REQUESTS: usize = 100_000;

/// How often every tenant's answers are looked at, whoever asks.
const SWEEP: Duration = Duration::from_secs(1);

/// How long a closed connection may take to be noticed.
const LETTING_GO: Duration = Duration::from_millis(60);

/// What a request is answered with.
pub type Answer = Result<Bytes, ApiError>;

/// What makes two requests the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Same {
    /// The tenant's own name for the request, at this route.
    Named(TenantId, &'static str, String),
    /// A hash over route, session and content.
    Body(TenantId, [u8; 32]),
    /// A hash over route and content of a request for a new session. Many clients may send the same
    /// one at once and none waits for another's connection; a repetition is joined if it comes when the first
    /// one's client is seen to be gone.
    New(TenantId, [u8; 32]),
}

impl Same {
    fn tenant(&self) -> &TenantId {
        let (Self::Named(tenant, ..) | Self::Body(tenant, _) | Self::New(tenant, _)) = self;
        tenant
    }
}

/// Requests that run, and answers worth keeping.
#[derive(Clone, Debug, Default)]
pub struct Retries {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    open: DashMap<Same, Alike>,
    kept: Mutex<Kept>,
}

/// The same request, as often as it was sent by somebody who waits.
#[derive(Debug, Default)]
struct Alike {
    open: Vec<Arc<Open>>,
    /// Told when one of them has ended or is not waited for any more.
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Open {
    content: [u8; 32],
    waiting: AtomicUsize,
    /// Somebody has taken the answer.
    taken: AtomicBool,
    answer: watch::Sender<Option<Answer>>,
    changed: Arc<Notify>,
}

/// Somebody who waits for an answer. Its drop is how a lost connection is noticed.
struct Waiter(Arc<Open>);

impl Waiter {
    fn new(open: &Arc<Open>) -> Self {
        open.waiting.fetch_add(1, Ordering::AcqRel);
        Self(open.clone())
    }

    async fn answer(self) -> Answer {
        let mut answer = self.0.answer.subscribe();
        let found = answer.wait_for(Option::is_some).await;
        match found.ok().and_then(|answer| answer.clone()) {
            Some(answer) => {
                self.0.taken.store(true, Ordering::Release);
                answer
            }
            None => Err(ApiError::internal(
                &"the work of a request ended without an answer",
            )),
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_waiters();
    }
}

impl Retries {
    /// The answer to a request: that of an earlier same one, or else of the work that `start` makes.
    /// `start` takes what must be taken in the order of arrival; the work runs to its end even when nobody waits
    /// for it. `unclaimed` is what is left to do if nobody has come for an answer without a name.
    ///
    /// # Errors
    /// The answer's, `start`'s, and 409 for a name that was used for other content.
    pub async fn run<F>(
        &self,
        same: Same,
        content: [u8; 32],
        start: impl FnOnce() -> Result<F, ApiError>,
        unclaimed: impl Future<Output = ()> + Send + 'static,
    ) -> Answer
    where
        F: Future<Output = Answer> + Send + 'static,
    {
        self.forget_old(same.tenant());
        // First of all, so that the order of arrival is kept whatever is waited for below. A request
        // that joins an earlier one gives its place back by dropping the work.
        let work = start();
        self.let_go(&same).await;
        // No await while the map's guard lives.
        let waiter = {
            let mut alike = self.inner.open.entry(same.clone()).or_default();
            let named = matches!(same, Same::Named(..));
            let earlier = alike
                .open
                .iter()
                .find(|open| named || open.waiting.load(Ordering::Acquire) == 0);
            match earlier {
                Some(open) if open.content == content => Waiter::new(open),
                Some(_) => return Err(name_reused()),
                None => match work {
                    Ok(work) => {
                        let open = Arc::new(Open {
                            content,
                            waiting: AtomicUsize::new(0),
                            taken: AtomicBool::new(false),
                            answer: watch::Sender::new(None),
                            changed: alike.changed.clone(),
                        });
                        alike.open.push(open.clone());
                        let waiter = Waiter::new(&open);
                        tokio::spawn(self.clone().finish(same, open, work, unclaimed));
                        waiter
                    }
                    Err(error) => {
                        let empty = alike.open.is_empty();
                        drop(alike);
                        if empty {
                            self.inner
                                .open
                                .remove_if(&same, |_, alike| alike.open.is_empty());
                        }
                        return Err(error);
                    }
                },
            }
        };
        waiter.answer().await
    }

    /// Gives the connection of an identical request in flight time to be seen closed. A client that gave up
    /// closes it and asks again at once; which of the two this server learns first is chance. A
    /// request that is identical on purpose loses nothing: its turn, which it has its place for, comes after
    /// the other's end, and that ends the wait.
    async fn let_go(&self, same: &Same) {
        if !matches!(same, Same::Body(..)) {
            return;
        }
        let end = Instant::now() + LETTING_GO;
        while let Some(changed) = self.held(same) {
            let mut change = std::pin::pin!(changed.notified());
            change.as_mut().enable();
            // What happened before it listened is seen now, what happens after is told.
            if self.held(same).is_none() || tokio::time::timeout_at(end, change).await.is_err() {
                return;
            }
        }
    }

    /// Where changes are told if this request runs already and all who sent it wait.
    fn held(&self, same: &Same) -> Option<Arc<Notify>> {
        let alike = self.inner.open.get(same)?;
        let waited_for = |open: &Arc<Open>| open.waiting.load(Ordering::Acquire) > 0;
        let held = !alike.open.is_empty() && alike.open.iter().all(waited_for);
        held.then(|| alike.changed.clone())
    }

    async fn finish(
        self,
        same: Same,
        open: Arc<Open>,
        work: impl Future<Output = Answer> + Send + 'static,
        unclaimed: impl Future<Output = ()> + Send + 'static,
    ) {
        let answer = work.await;
        let size = answer.as_ref().map_or(0, Bytes::len);
        let wanted = answer.is_ok();
        open.answer.send_replace(Some(answer));
        let is_named = matches!(same, Same::Named(..));
        let waited_for = open.waiting.load(Ordering::Acquire) > 0;
        if !wanted || (waited_for && !is_named) {
            self.forget(&same, &open);
            return;
        }
        let time = if is_named { NAMED } else { UNDELIVERED };
        self.kept().keep(Answered {
            until: Instant::now() + time,
            same,
            open: open.clone(),
            size,
        });
        if !is_named {
            tokio::time::sleep(UNDELIVERED).await;
            if !open.taken.load(Ordering::Acquire) && open.waiting.load(Ordering::Acquire) == 0 {
                unclaimed.await;
            }
        }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.inner
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, same: &Same, gone: &Arc<Open>) {
        if let Some(mut alike) = self.inner.open.get_mut(same) {
            alike.open.retain(|open| !Arc::ptr_eq(open, gone));
        }
        self.inner
            .open
            .remove_if(same, |_, alike| alike.open.is_empty());
        gone.changed.notify_waiters();
    }

    fn forget_old(&self, tenant: &TenantId) {
        let old = self.kept().old(tenant, Instant::now());
        for answered in old {
            self.forget(&answered.same, &answered.open);
        }
    }

    /// As after a restart.
    #[cfg(test)]
    pub(super) fn forget_all(&self) {
        self.inner.open.clear();
        *self.kept() = Kept::default();
    }
}

/// 409 for a named request that has run, whose answer is not kept any more.
fn answered_before() -> ApiError {
    ApiError::new(
        hyper::StatusCode::CONFLICT,
        "The request with this Idempotency-Key has run; its answer was too large to be kept",
    )
}

/// 409 for an idempotency key that was used for a different request.
pub fn name_reused() -> ApiError {
    ApiError::new(
        hyper::StatusCode::CONFLICT,
        "This Idempotency-Key was used for a different request",
    )
}

#[cfg(test)]
mod tests;
