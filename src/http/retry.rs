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

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use dashmap::DashMap;
use tokio::sync::watch;
use tokio::time::Instant;

use super::error::ApiError;
use crate::session::TenantId;

/// How long an answer that nobody waited for is kept: longer than the client's pauses of 1, 2
/// and 4 s between tries.
const UNDELIVERED: Duration = Duration::from_secs(5);

/// How long an answer to a named request is kept.
const NAMED: Duration = Duration::from_secs(600);

/// Bytes of kept answers. Beyond it the oldest go early; of a named request it is then still known that it
/// ran, and a repetition is refused instead of run.
const KEPT_BYTES: usize = 64 << 20;

/// Requests that are remembered, answers aside: some hundred bytes each.
const KEPT_REQUESTS: usize = 100_000;

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

/// Requests that run, and answers worth keeping.
#[derive(Clone, Debug, Default)]
pub struct Retries {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    open: DashMap<Same, Vec<Arc<Open>>>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    bytes: usize,
    /// Oldest first.
    answers: std::collections::VecDeque<(Instant, Same, Arc<Open>, usize)>,
}

#[derive(Debug)]
struct Open {
    content: [u8; 32],
    waiting: AtomicUsize,
    answer: watch::Sender<Option<Answer>>,
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
            Some(answer) => answer,
            None => Err(ApiError::internal(
                &"the work of a request ended without an answer",
            )),
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Retries {
    /// The answer to a request: that of an earlier same one, or else of the work that `start` makes.
    /// `start` takes what must be taken in the order of arrival; the work runs to its end even when nobody waits
    /// for it.
    ///
    /// # Errors
    /// The answer's, `start`'s, and 409 for a name that was used for other content.
    pub async fn run<F>(
        &self,
        same: Same,
        content: [u8; 32],
        start: impl FnOnce() -> Result<F, ApiError>,
    ) -> Answer
    where
        F: Future<Output = Answer> + Send + 'static,
    {
        self.forget_old();
        // First of all, so that the order of arrival is kept whatever is waited for below. A request
        // that joins an earlier one gives its place back by dropping the work.
        let work = start();
        self.let_go(&same).await;
        // No await while the map's guard lives.
        let waiter = {
            let mut entry = self.inner.open.entry(same.clone()).or_default();
            let named = matches!(same, Same::Named(..));
            let earlier = entry
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
                            answer: watch::Sender::new(None),
                        });
                        entry.push(open.clone());
                        let waiter = Waiter::new(&open);
                        tokio::spawn(self.clone().finish(same, open, work));
                        waiter
                    }
                    Err(error) => {
                        let empty = entry.is_empty();
                        drop(entry);
                        if empty {
                            self.inner.open.remove_if(&same, |_, open| open.is_empty());
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
    /// request that is identical on purpose loses nothing: its turn comes after the other's anyway.
    async fn let_go(&self, same: &Same) {
        if !matches!(same, Same::Body(..)) {
            return;
        }
        let held = || {
            self.inner.open.get(same).is_some_and(|entry| {
                let waited_for = |open: &Arc<Open>| open.waiting.load(Ordering::Acquire) > 0;
                !entry.is_empty() && entry.iter().all(waited_for)
            })
        };
        let end = Instant::now() + LETTING_GO;
        while held() && Instant::now() < end {
            tokio::time::sleep(LETTING_GO / 10).await;
        }
    }

    async fn finish(
        self,
        same: Same,
        open: Arc<Open>,
        work: impl Future<Output = Answer> + Send + 'static,
    ) {
        let answer = work.await;
        let size = answer.as_ref().map_or(0, Bytes::len);
        let wanted = answer.is_ok();
        open.answer.send_replace(Some(answer));
        let keep = match same {
            Same::Named(..) => Some(NAMED),
            _ if open.waiting.load(Ordering::Acquire) == 0 => Some(UNDELIVERED),
            Same::Body(..) | Same::New(..) => None,
        };
        match keep.filter(|_| wanted) {
            Some(time) => {
                let mut kept = self.kept();
                kept.bytes += size;
                kept.answers
                    .push_back((Instant::now() + time, same, open, size));
            }
            None => self.forget(&same, &open),
        }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.inner
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, same: &Same, gone: &Arc<Open>) {
        if let Some(mut entry) = self.inner.open.get_mut(same) {
            entry.retain(|open| !Arc::ptr_eq(open, gone));
        }
        self.inner.open.remove_if(same, |_, open| open.is_empty());
    }

    fn forget_old(&self) {
        let now = Instant::now();
        let old: Vec<_> = {
            let mut kept = self.kept();
            if kept.answers.is_empty() {
                return;
            }
            let mut old = Vec::new();
            let mut excess = kept.bytes.saturating_sub(KEPT_BYTES);
            let mut crowd = kept.answers.len().saturating_sub(KEPT_REQUESTS);
            let mut freed = 0;
            // The kinds have different times, so the whole queue is looked at.
            kept.answers.retain_mut(|(until, same, open, size)| {
                let is_over = *until <= now || crowd > 0;
                if is_over || excess > 0 {
                    excess = excess.saturating_sub(*size);
                    freed += std::mem::take(size);
                    if !is_over && matches!(same, Same::Named(..)) {
                        open.answer.send_replace(Some(Err(answered_before())));
                        return true;
                    }
                    crowd = crowd.saturating_sub(1);
                    old.push((same.clone(), open.clone()));
                    return false;
                }
                true
            });
            kept.bytes -= freed;
            old
        };
        for (same, open) in old {
            self.forget(&same, &open);
        }
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
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Counted {
        retries: Retries,
        runs: Arc<AtomicUsize>,
    }

    impl Counted {
        /// Sends a request that takes a while, as a task that can be aborted like a connection.
        fn send(&self, same: Same, content: u8) -> tokio::task::JoinHandle<Answer> {
            let this = self.clone();
            tokio::spawn(async move {
                let runs = this.runs.clone();
                let start = || {
                    Ok(async move {
                        let run = runs.fetch_add(1, Ordering::SeqCst);
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        Ok(Bytes::from(run.to_string()))
                    })
                };
                this.retries.run(same, [content; 32], start).await
            })
        }

        fn runs(&self) -> usize {
            self.runs.load(Ordering::SeqCst)
        }
    }

    fn body() -> Same {
        Same::Body(TenantId("t".into()), [1; 32])
    }

    fn named(name: &str) -> Same {
        Same::Named(TenantId("t".into()), "/execute", name.into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_repetition_joins_the_first_when_its_client_is_gone() {
        let counted = Counted::default();
        let first = counted.send(body(), 1);
        tokio::time::sleep(Duration::from_millis(10)).await;
        first.abort();
        assert!(first.await.is_err());
        let again = counted.send(body(), 1).await.unwrap().unwrap();
        assert_eq!((counted.runs(), again), (1, Bytes::from("0")));
    }

    #[tokio::test(start_paused = true)]
    async fn two_clients_who_both_wait_get_two_runs() {
        let counted = Counted::default();
        let (a, b) = (counted.send(body(), 1), counted.send(body(), 1));
        a.await.unwrap().unwrap();
        b.await.unwrap().unwrap();
        assert_eq!(counted.runs(), 2);
        counted.send(body(), 1).await.unwrap().unwrap();
        assert_eq!(counted.runs(), 3, "a delivered answer is not kept");
        assert!(counted.retries.inner.open.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_nobody_waited_for_is_kept_for_the_next_try_only_a_while() {
        let counted = Counted::default();
        let first = counted.send(body(), 1);
        tokio::time::sleep(Duration::from_millis(10)).await;
        first.abort();
        tokio::time::sleep(Duration::from_secs(2)).await;
        counted.send(body(), 1).await.unwrap().unwrap();
        assert_eq!(counted.runs(), 1);
        tokio::time::sleep(UNDELIVERED).await;
        counted.send(body(), 1).await.unwrap().unwrap();
        assert_eq!(counted.runs(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_named_request_runs_once_even_when_both_wait() {
        let counted = Counted::default();
        let (a, b) = (counted.send(named("k"), 1), counted.send(named("k"), 1));
        assert_eq!(a.await.unwrap().unwrap(), b.await.unwrap().unwrap());
        counted.send(named("k"), 1).await.unwrap().unwrap();
        assert_eq!(counted.runs(), 1);
        let other = counted.send(named("k"), 2).await.unwrap().unwrap_err();
        assert_eq!(other.status().as_u16(), 409);
        tokio::time::sleep(NAMED * 2).await;
        counted.send(named("k"), 2).await.unwrap().unwrap();
        assert_eq!(counted.runs(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn places_are_taken_in_the_order_of_arrival() {
        let retries = Retries::default();
        let order = Arc::new(Mutex::new(Vec::new()));
        let send = |same: Same, name: &'static str| {
            let (retries, order) = (retries.clone(), order.clone());
            tokio::spawn(async move {
                let start = || {
                    order.lock().unwrap().push(name);
                    Ok(async {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        Ok(Bytes::new())
                    })
                };
                retries.run(same, [1; 32], start).await
            })
        };
        let other = Same::Body(TenantId("t".into()), [2; 32]);
        let mut sent = Vec::new();
        for (same, name) in [(body(), "a"), (body(), "a again"), (other, "b")] {
            sent.push(send(same, name));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for request in sent {
            request.await.unwrap().unwrap();
        }
        assert_eq!(*order.lock().unwrap(), ["a", "a again", "b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_ran_is_not_run_again_even_when_its_answer_is_gone() {
        let retries = Retries::default();
        let runs = Arc::new(AtomicUsize::new(0));
        let send = |name: String| {
            let (retries, runs) = (retries.clone(), runs.clone());
            async move {
                let start = || {
                    Ok(async move {
                        runs.fetch_add(1, Ordering::SeqCst);
                        Ok(Bytes::from(vec![0; KEPT_BYTES / 8]))
                    })
                };
                retries.run(named(&name), [1; 32], start).await
            }
        };
        for number in 0..12 {
            send(number.to_string()).await.unwrap();
        }
        let again = send("0".into()).await.unwrap_err();
        assert_eq!(again.status().as_u16(), 409);
        assert!(send("11".into()).await.is_ok());
        assert_eq!(runs.load(Ordering::SeqCst), 12);
        assert!(retries.kept().bytes <= KEPT_BYTES);
    }
}
