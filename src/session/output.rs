//! What a command writes, made into bounded text.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use thaw_wire::message::RichResult;

use super::feed::{Feed, Output};

/// Bytes of output that all running commands together may hold.
#[derive(Debug)]
pub(crate) struct Budget {
    left: AtomicUsize,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicUsize::new(bytes),
        })
    }

    /// Takes up to `wanted` bytes; says how many.
    fn take(&self, wanted: usize) -> usize {
        let taken = |left: usize| wanted.min(left);
        match self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left - taken(left))
            }) {
            Ok(before) | Err(before) => taken(before),
        }
    }
}

/// One output stream: bytes in, UTF-8 text out, at most so much of it.
#[derive(Debug, Default)]
struct Text {
    text: String,
    /// The beginning of a character whose rest has not come yet: at most 3 bytes.
    pending: Vec<u8>,
    dropped: u64,
    /// Bytes of `text` that a watcher was shown.
    shown: usize,
}

impl Text {
    /// Says how many bytes it took from the budget.
    fn push(&mut self, bytes: &[u8], cap: usize, budget: &Budget) -> usize {
        if self.dropped > 0 {
            self.dropped += bytes.len() as u64;
            return 0;
        }
        let room = cap.saturating_sub(self.text.len() + self.pending.len());
        let granted = budget.take(bytes.len().min(room));
        let (kept, rest) = bytes.split_at(granted);
        self.dropped = rest.len() as u64;
        if self.pending.is_empty() {
            self.decode(kept);
        } else {
            let mut joined = std::mem::take(&mut self.pending);
            joined.extend_from_slice(kept);
            self.decode(&joined);
        }
        if self.dropped > 0 {
            // The text ends here: half a character at its end counts as dropped.
            self.dropped += self.pending.len() as u64;
            self.pending.clear();
        }
        granted
    }

    fn decode(&mut self, mut bytes: &[u8]) {
        loop {
            match std::str::from_utf8(bytes) {
                Ok(valid) => return self.text.push_str(valid),
                Err(error) => {
                    let (valid, rest) = bytes.split_at(error.valid_up_to());
                    self.text.push_str(&String::from_utf8_lossy(valid));
                    let Some(bad) = error.error_len() else {
                        self.pending = rest.to_vec();
                        return;
                    };
                    self.text.push(char::REPLACEMENT_CHARACTER);
                    bytes = rest.get(bad..).unwrap_or_default();
                }
            }
        }
    }

    fn finish(mut self) -> (String, u64) {
        if !self.pending.is_empty() {
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        if self.dropped > 0 {
            let notice = format!("[thaw: output truncated, {} bytes dropped]", self.dropped);
            append_line(&mut self.text, &notice);
        }
        (self.text, self.dropped)
    }
}

/// Appends a line of thaw's own to a text.
pub(crate) fn append_line(text: &mut String, line: &str) {
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(line);
    text.push('\n');
}

/// Collects both outputs of one command.
#[derive(Debug)]
pub(crate) struct Collector {
    stdout: Text,
    stderr: Text,
    rich: Vec<u8>,
    cap: usize,
    budget: Arc<Budget>,
    taken: usize,
}

impl Collector {
    pub(crate) fn new(cap: usize, budget: Arc<Budget>) -> Self {
        Self {
            stdout: Text::default(),
            stderr: Text::default(),
            rich: Vec::new(),
            cap,
            budget,
            taken: 0,
        }
    }

    pub(crate) fn stdout(&mut self, bytes: &[u8]) {
        self.taken += self.stdout.push(bytes, self.cap, &self.budget);
    }

    pub(crate) fn stderr(&mut self, bytes: &[u8]) {
        self.taken += self.stderr.push(bytes, self.cap, &self.budget);
    }

    /// Takes a piece of the command's rich results.
    pub(crate) fn rich(&mut self, bytes: &[u8]) {
        let room = self.cap.saturating_sub(self.rich.len());
        let granted = self.budget.take(bytes.len().min(room));
        self.taken += granted;
        self.rich.extend_from_slice(&bytes[..granted]);
    }

    /// Shows a feed what is new.
    pub(crate) fn show(&mut self, feed: &Feed) {
        for (output, text) in [
            (Output::Stdout, &mut self.stdout),
            (Output::Stderr, &mut self.stderr),
        ] {
            feed.push(output, text.text.get(text.shown..).unwrap_or_default());
            text.shown = text.text.len();
        }
    }

    /// The rich results as a JSON array; empty when there are none. What is not whole, or no such
    /// array, counts as none: only the session's own code can have made it so.
    pub(crate) fn results(&mut self) -> String {
        let bytes = std::mem::take(&mut self.rich);
        match serde_json::from_slice::<Vec<RichResult>>(&bytes) {
            Ok(all) if !all.is_empty() => String::from_utf8(bytes).unwrap_or_default(),
            _ => String::new(),
        }
    }

    /// The texts and how many bytes were dropped.
    pub(crate) fn finish(&mut self) -> (String, String, u64) {
        let (stdout, dropped_out) = std::mem::take(&mut self.stdout).finish();
        let (stderr, dropped_err) = std::mem::take(&mut self.stderr).finish();
        (stdout, stderr, dropped_out + dropped_err)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.budget.left.fetch_add(self.taken, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collector(cap: usize) -> Collector {
        Collector::new(cap, Budget::new(1 << 20))
    }

    #[test]
    fn characters_survive_any_chunk_border_and_rubbish_is_replaced() {
        let bytes = b"a\xc3\xa9\xf0\x9f\xa6\x80\xffz\xe2\x82";
        let whole = String::from_utf8_lossy(bytes).into_owned();
        for cut in 0..=bytes.len() {
            let mut collector = collector(1000);
            collector.stdout(&bytes[..cut]);
            collector.stdout(&bytes[cut..]);
            assert_eq!(collector.finish().0, whole, "cut at {cut}");
        }
        let mut single = collector(1000);
        bytes.iter().for_each(|b| single.stdout(&[*b]));
        assert_eq!(single.finish().0, whole);
    }

    #[test]
    fn truncation_is_said_and_counted_and_never_splits_a_character() {
        let mut collector = collector(4);
        collector.stdout("abcé".as_bytes());
        collector.stdout(b"more");
        collector.stderr(b"fine");
        let (stdout, stderr, dropped) = collector.finish();
        assert_eq!(stdout, "abc\n[thaw: output truncated, 6 bytes dropped]\n");
        assert_eq!((stderr.as_str(), dropped), ("fine", 6));
    }

    #[test]
    fn the_common_budget_bounds_and_is_given_back() {
        let budget = Budget::new(10);
        let mut first = Collector::new(100, budget.clone());
        first.stdout(b"12345678");
        let mut second = Collector::new(100, budget.clone());
        second.stderr(b"12345");
        assert_eq!(second.finish().2, 3);
        drop((first, second));
        assert_eq!(budget.left.load(Ordering::Relaxed), 10);
    }

    #[test]
    fn a_watcher_sees_each_byte_once() {
        let feed = Feed::default();
        let mut collector = collector(100);
        collector.stdout(b"one ");
        collector.show(&feed);
        collector.stdout(b"two");
        collector.stderr(b"err");
        collector.show(&feed);
        assert_eq!(feed.so_far().stdout, "one two");
        assert_eq!(feed.so_far().stderr, "err");
    }

    #[test]
    fn rich_results_are_an_array_of_objects_or_nothing() {
        let results = |bytes: &[&[u8]]| {
            let mut collector = collector(64);
            bytes.iter().for_each(|piece| collector.rich(piece));
            collector.results()
        };
        let good = br#"[{"text/plain":"1"}]"#;
        assert_eq!(results(&[&good[..7], &good[7..]]).as_bytes(), good);
        assert_eq!(results(&[b"[]"]), "");
        assert_eq!(results(&[b"[1]"]), "");
        assert_eq!(results(&[b"nonsense"]), "");
        assert_eq!(results(&[&[b'['; 100]]), "");
    }
}
