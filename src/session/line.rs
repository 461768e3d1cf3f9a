//! A session's line: commands get their turns in the order in which they were accepted.
//!
//! Joining is synchronous, so a command's place is fixed at its acceptance and not by when the
//! runtime first polls it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Locks without caring for poison: every critical section here leaves its data whole.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A bounded first-come, first-served line for one turn.
#[derive(Debug, Default)]
pub(crate) struct Line(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    taken: bool,
    next_ticket: u64,
    waiting: VecDeque<(u64, oneshot::Sender<Turn>)>,
}

/// The line is full.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl Line {
    /// Takes the last place, unless `max` wait already.
    pub(crate) fn join(self: &Arc<Self>, max: usize) -> Result<Place, Full> {
        let mut inner = lock(&self.0);
        if !inner.taken {
            inner.taken = true;
            return Ok(Place(State::Ready(Turn(self.clone()))));
        }
        if inner.waiting.len() >= max {
            return Err(Full);
        }
        let ticket = inner.next_ticket;
        inner.next_ticket += 1;
        let (call, called) = oneshot::channel();
        inner.waiting.push_back((ticket, call));
        Ok(Place(State::Waiting(Waiting {
            line: self.clone(),
            ticket,
            called,
        })))
    }

    /// Whether nobody has the turn.
    pub(crate) fn is_free(&self) -> bool {
        !lock(&self.0).taken
    }
}

/// A place in the line. Dropping it leaves the line.
#[derive(Debug)]
pub(crate) struct Place(State);

#[derive(Debug)]
enum State {
    Ready(Turn),
    Waiting(Waiting),
}

#[derive(Debug)]
struct Waiting {
    line: Arc<Line>,
    ticket: u64,
    called: oneshot::Receiver<Turn>,
}

impl Place {
    /// Waits until the turn has come, and keeps it for [`Self::turn`].
    pub(crate) async fn ready(&mut self) {
        if let State::Waiting(waiting) = &mut self.0
            && let Ok(turn) = (&mut waiting.called).await
        {
            self.0 = State::Ready(turn);
        }
    }

    /// Waits for the turn.
    pub(crate) async fn turn(self) -> Turn {
        match self.0 {
            State::Ready(turn) => turn,
            State::Waiting(mut waiting) => match (&mut waiting.called).await {
                Ok(turn) => turn,
                // Cannot be: the sender is in the line until it is used, and `waiting` keeps the line.
                Err(_) => std::future::pending().await,
            },
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        lock(&self.line.0)
            .waiting
            .retain(|(ticket, _)| *ticket != self.ticket);
        // A turn that was sent and not received is dropped with `called`, which passes it on.
    }
}

/// The right to use the session's VM. Dropping it calls the next.
#[derive(Debug)]
pub(crate) struct Turn(Arc<Line>);

impl Drop for Turn {
    fn drop(&mut self) {
        let next = {
            let mut inner = lock(&self.0.0);
            let next = inner.waiting.pop_front();
            inner.taken = next.is_some();
            next
        };
        if let Some((_, call)) = next
            && let Err(turn) = call.send(Turn(self.0.clone()))
        {
            // It left in this very moment; its turn passes on. No lock is held here.
            drop(turn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_come_in_the_order_of_joining_however_late_they_are_awaited() {
        let line = Arc::new(Line::default());
        let first = line.join(8).unwrap();
        let second = line.join(8).unwrap();
        let third = line.join(8).unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        for (n, place) in [(3, third), (2, second), (1, first)] {
            let order = order.clone();
            tasks.push(tokio::spawn(async move {
                let turn = place.turn().await;
                lock(&order).push(n);
                tokio::task::yield_now().await;
                drop(turn);
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*lock(&order), [1, 2, 3]);
        assert!(line.is_free());
    }

    #[tokio::test]
    async fn who_leaves_the_line_neither_blocks_it_nor_counts() {
        let line = Arc::new(Line::default());
        let turn = line.join(1).unwrap().turn().await;
        let waiting = line.join(1).unwrap();
        assert_eq!(line.join(1).unwrap_err(), Full);
        drop(waiting);
        let next = line.join(1).unwrap();
        drop(turn);
        // It was called, and leaves without listening.
        drop(next);
        assert!(line.is_free());
        line.join(1).unwrap().turn().await;
    }
}
