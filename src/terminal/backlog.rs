//! What a terminal wrote and nobody has seen yet.

use std::collections::VecDeque;
use std::sync::Mutex;

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use super::lock;

/// Unseen output that is kept: some thousand screens' lines. With a viewer the terminal waits at this
/// point, without one the oldest goes.
const MOST: usize = 256 * 1024;

/// Bytes given to a viewer at once.
const PIECE: usize = 32 * 1024;

#[derive(Debug, Default)]
struct State {
    unseen: VecDeque<u8>,
    /// Whose turn it is to see; counts attachments.
    turn: u64,
    attached: bool,
}

/// The unseen output of one terminal. One viewer at a time takes from it.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    state: Mutex<State>,
    /// There is more to see, or another viewer.
    changed: Notify,
    /// There is room again.
    room: Notify,
}

impl Backlog {
    /// Adds output. While somebody looks on, waits until there is room for it.
    pub(super) async fn push(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            let taken = self.take_in(bytes);
            bytes = &bytes[taken..];
            if taken > 0 {
                self.changed.notify_waiters();
            } else {
                room.await;
            }
        }
    }

    /// Adds what there is room for; how many bytes.
    fn take_in(&self, bytes: &[u8]) -> usize {
        let mut state = lock(&self.state);
        let free = MOST - state.unseen.len();
        if state.attached {
            let count = bytes.len().min(free);
            state.unseen.extend(&bytes[..count]);
            return count;
        }
        // The newest stays.
        let kept = &bytes[bytes.len().saturating_sub(MOST)..];
        let excess = (state.unseen.len() + kept.len()).saturating_sub(MOST);
        state.unseen.drain(..excess);
        state.unseen.extend(kept);
        bytes.len()
    }

    /// Makes the caller the viewer; its turn.
    pub(super) fn attach(&self) -> u64 {
        let turn = {
            let mut state = lock(&self.state);
            state.attached = true;
            state.turn += 1;
            state.turn
        };
        self.changed.notify_waiters();
        turn
    }

    /// The viewer of this turn looks no more.
    pub(super) fn detach(&self, turn: u64) {
        {
            let mut state = lock(&self.state);
            if state.turn == turn {
                state.attached = false;
            }
        }
        // A terminal that waits for its viewer must not wait for one that is gone.
        self.room.notify_waiters();
    }

    /// Unseen output for the viewer of this turn, perhaps none; `None` when it is another's turn.
    pub(super) fn take(&self, turn: u64) -> Option<Vec<u8>> {
        let bytes: Vec<u8> = {
            let mut state = lock(&self.state);
            if state.turn != turn {
                return None;
            }
            let count = state.unseen.len().min(PIECE);
            state.unseen.drain(..count).collect()
        };
        if !bytes.is_empty() {
            self.room.notify_waiters();
        }
        Some(bytes)
    }

    /// Resolves when there may be something new.
    pub(super) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn without_a_viewer_the_newest_stays() {
        let backlog = Backlog::default();
        backlog.push(&vec![1; MOST]).await;
        backlog.push(b"new").await;
        backlog.push(&[]).await;
        let turn = backlog.attach();
        let mut all = Vec::new();
        while let Some(bytes) = backlog.take(turn).filter(|bytes| !bytes.is_empty()) {
            all.extend(bytes);
        }
        assert_eq!(all.len(), MOST);
        assert_eq!(&all[MOST - 3..], b"new");
    }

    #[tokio::test]
    async fn with_a_viewer_nothing_is_lost_however_slow_it_is() {
        let backlog = Arc::new(Backlog::default());
        let turn = backlog.attach();
        let writer = backlog.clone();
        let text: Vec<u8> = (0..3 * MOST).map(|n| (n % 251) as u8).collect();
        let sent = text.clone();
        let writing = tokio::spawn(async move { writer.push(&sent).await });
        let mut all = Vec::new();
        while all.len() < text.len() {
            all.extend(backlog.take(turn).unwrap());
            tokio::task::yield_now().await;
        }
        writing.await.unwrap();
        assert!(all == text);
    }

    #[tokio::test]
    async fn a_viewer_that_goes_or_is_replaced_holds_nobody_up() {
        let backlog = Arc::new(Backlog::default());
        let first = backlog.attach();
        let writer = backlog.clone();
        let writing = tokio::spawn(async move { writer.push(&vec![7; 2 * MOST]).await });
        tokio::task::yield_now().await;
        let second = backlog.attach();
        assert_eq!(backlog.take(first), None);
        backlog.detach(first);
        assert!(!writing.is_finished());
        backlog.detach(second);
        writing.await.unwrap();
    }
}
