//! What a running command has written so far, for any number of readers at any pace.

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::line::lock;
use super::types::PartialOutput;

/// Changes between the two outputs whose order is kept: far more than a person reads, and a bound on
/// what a command costs that writes a byte to each in turn. Later text is told output by output.
const MOST_PIECES: usize = 64 * 1024;

/// One of a command's two outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A command's output as it comes. It grows only; the command's own bound on output bounds it.
#[derive(Debug)]
pub struct Feed {
    state: Mutex<State>,
    /// Counts changes.
    news: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    output: PartialOutput,
    /// The order of the two outputs' pieces: which one, and where in its text the piece ends.
    pieces: Vec<(Output, usize)>,
    closed: bool,
}

impl Default for Feed {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            news: watch::Sender::new(0),
        }
    }
}

impl Feed {
    /// Adds text.
    pub fn push(&self, output: Output, text: &str) {
        if text.is_empty() {
            return;
        }
        {
            let mut state = lock(&self.state);
            let whole = match output {
                Output::Stdout => &mut state.output.stdout,
                Output::Stderr => &mut state.output.stderr,
            };
            whole.push_str(text);
            let end = whole.len();
            let has_room = state.pieces.len() < MOST_PIECES;
            match state.pieces.last_mut() {
                Some((last, until)) if *last == output => *until = end,
                _ if has_room => state.pieces.push((output, end)),
                _ => {}
            }
        }
        self.news.send_modify(|count| *count += 1);
    }

    /// No more will come.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.news.send_modify(|count| *count += 1);
    }

    /// All there is by now.
    pub fn so_far(&self) -> PartialOutput {
        lock(&self.state).output.clone()
    }

    /// What came after the first so many bytes of standard output and standard error.
    pub fn since(&self, seen: [usize; 2]) -> PartialOutput {
        let state = lock(&self.state);
        let rest = |text: &str, seen: usize| text.get(seen..).unwrap_or_default().to_owned();
        PartialOutput {
            stdout: rest(&state.output.stdout, seen[0]),
            stderr: rest(&state.output.stderr, seen[1]),
        }
    }

    /// Tells of changes.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// Reads from the beginning.
    pub fn follow(self: &Arc<Self>) -> Follower {
        Follower {
            news: self.news.subscribe(),
            feed: self.clone(),
            piece: 0,
            seen: [0; 2],
        }
    }
}

/// A reader of a [`Feed`].
#[derive(Debug)]
pub struct Follower {
    feed: Arc<Feed>,
    news: watch::Receiver<u64>,
    /// The piece that is being read.
    piece: usize,
    /// How far each output has been read.
    seen: [usize; 2],
}

impl Follower {
    /// The next text, as much of it as there is; `None` at the end. Safe to drop and call again.
    pub async fn next(&mut self) -> Option<(Output, String)> {
        loop {
            // Marked as seen before it is looked at, so that nothing falls in between.
            self.news.borrow_and_update();
            if let Some(found) = self.take() {
                return found;
            }
            if self.news.changed().await.is_err() {
                return None;
            }
        }
    }

    /// Text, or the end; `None` when there is nothing now.
    fn take(&mut self) -> Option<Option<(Output, String)>> {
        let state = lock(&self.feed.state);
        while let Some(&(output, end)) = state.pieces.get(self.piece) {
            if let Some(text) = unseen(&mut self.seen, &state.output, output, end) {
                return Some(Some((output, text)));
            }
            // The last piece may still grow.
            if self.piece + 1 == state.pieces.len() {
                break;
            }
            self.piece += 1;
        }
        for output in [Output::Stdout, Output::Stderr] {
            if let Some(text) = unseen(&mut self.seen, &state.output, output, usize::MAX) {
                return Some(Some((output, text)));
            }
        }
        state.closed.then_some(None)
    }
}

/// What an output has between how far it was read and `end`; it counts as read then.
fn unseen(
    seen: &mut [usize; 2],
    all: &PartialOutput,
    output: Output,
    end: usize,
) -> Option<String> {
    let (whole, seen) = match output {
        Output::Stdout => (&all.stdout, &mut seen[0]),
        Output::Stderr => (&all.stderr, &mut seen[1]),
    };
    let end = end.min(whole.len());
    let text = whole.get(*seen..end).filter(|text| !text.is_empty())?;
    *seen = end;
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_reader_gets_everything_once_and_in_order() {
        let feed = Arc::new(Feed::default());
        feed.push(Output::Stdout, "a");
        feed.push(Output::Stdout, "b");
        let mut early = feed.follow();
        assert_eq!(early.next().await, Some((Output::Stdout, "ab".into())));
        feed.push(Output::Stdout, "c");
        assert_eq!(early.next().await, Some((Output::Stdout, "c".into())));
        feed.push(Output::Stderr, "é");
        feed.push(Output::Stdout, "d");
        feed.close();
        assert_eq!(early.next().await, Some((Output::Stderr, "é".into())));
        assert_eq!(early.next().await, Some((Output::Stdout, "d".into())));
        assert_eq!(early.next().await, None);
        let mut late = feed.follow();
        assert_eq!(late.next().await, Some((Output::Stdout, "abc".into())));
        assert_eq!(late.next().await, Some((Output::Stderr, "é".into())));
        assert_eq!(feed.so_far().stdout, "abcd");
    }

    #[tokio::test]
    async fn beyond_the_kept_order_nothing_is_lost() {
        let feed = Arc::new(Feed::default());
        for _ in 0..MOST_PIECES {
            feed.push(Output::Stdout, "o");
            feed.push(Output::Stderr, "e");
        }
        feed.close();
        assert_eq!(lock(&feed.state).pieces.len(), MOST_PIECES);
        let mut reader = feed.follow();
        let mut lengths = [0; 2];
        while let Some((output, text)) = reader.next().await {
            lengths[usize::from(output == Output::Stderr)] += text.len();
        }
        assert_eq!(lengths, [MOST_PIECES; 2]);
    }

    #[tokio::test]
    async fn a_reader_that_waits_is_woken() {
        let feed = Arc::new(Feed::default());
        let mut reader = feed.follow();
        let waiting = tokio::spawn(async move { reader.next().await });
        tokio::task::yield_now().await;
        feed.push(Output::Stderr, "x");
        assert_eq!(waiting.await.unwrap(), Some((Output::Stderr, "x".into())));
    }
}
