//! What the guest's kernel says: kept for a post-mortem, and logged within bounds.

use std::collections::VecDeque;
use std::time::Instant;

/// Bytes kept.
const KEPT: usize = 64 * 1024;

/// Bytes of the tail that a death reports.
const TAIL: usize = 4 * 1024;

/// Bytes that may go to the log at once, enough for a boot or an oops.
const BURST: f64 = 64.0 * 1024.0;

/// Bytes a second that may go to the log for long. A guest's chatter must not fill the host's disk:
/// 1 KiB/s is 86 MiB a day.
const RATE: f64 = 1024.0;

/// The console of one VM.
#[derive(Debug)]
pub struct Console {
    kept: VecDeque<u8>,
    line: Vec<u8>,
    allowance: f64,
    refilled: Instant,
    dropped: u64,
}

/// Longest line that is logged in one piece.
const LINE: usize = 1024;

impl Console {
    /// An empty console.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            kept: VecDeque::new(),
            line: Vec::new(),
            allowance: BURST,
            refilled: now,
            dropped: 0,
        }
    }

    /// Takes note of `bytes`, and gives the lines to log.
    pub fn add(&mut self, bytes: &[u8], now: Instant) -> Vec<String> {
        let bytes = &bytes[bytes.len().saturating_sub(KEPT)..];
        let over = (self.kept.len() + bytes.len()).saturating_sub(KEPT);
        self.kept.drain(..over);
        self.kept.extend(bytes);
        let passed = now.saturating_duration_since(self.refilled).as_secs_f64();
        self.refilled = now;
        self.allowance = (self.allowance + passed * RATE).min(BURST);
        let mut lines = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' || self.line.len() >= LINE {
                let line = std::mem::take(&mut self.line);
                self.admit(&line, &mut lines);
            }
        }
        lines
    }

    fn admit(&mut self, line: &[u8], lines: &mut Vec<String>) {
        let cost = line.len() as f64 + 1.0;
        if self.allowance < cost {
            self.dropped += 1;
            return;
        }
        self.allowance -= cost;
        if self.dropped > 0 {
            lines.push(format!("({} lines left out)", self.dropped));
            self.dropped = 0;
        }
        // The log's reader must not have its terminal driven by a guest.
        let text = String::from_utf8_lossy(line);
        lines.push(text.trim_end().replace(char::is_control, " "));
    }

    /// The last lines, at most 4 KiB.
    #[must_use]
    pub fn tail(&self) -> String {
        let bytes: Vec<u8> = self
            .kept
            .iter()
            .skip(self.kept.len().saturating_sub(TAIL))
            .copied()
            .collect();
        let text = String::from_utf8_lossy(&bytes);
        // Replacement characters are longer than what they replace.
        let over = text.len().saturating_sub(TAIL);
        let start = (over..text.len()).find(|&at| text.is_char_boundary(at));
        text[start.unwrap_or(text.len())..].to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_flood_is_cut_and_said() {
        let now = Instant::now();
        let mut console = Console::new(now);
        let mut logged = 0;
        for _ in 0..1000 {
            logged += console.add(&[b'x'; 999], now).len();
            logged += console.add(b"\n", now).len();
        }
        assert!(logged < 70, "{logged}");
        let later = console.add(b"\nhello\n", now + Duration::from_secs(60));
        assert!(
            later.iter().any(|line| line.contains("left out")),
            "{later:?}"
        );
        assert_eq!(later.last().unwrap(), "hello");
        assert!(console.tail().len() <= TAIL);
        assert!(console.tail().ends_with("hello\n"));
    }

    #[test]
    fn a_guest_cannot_drive_the_logs_terminal() {
        let mut console = Console::new(Instant::now());
        let lines = console.add(b"\x1b[2Jboo\r\n\xff\xff\n", Instant::now());
        assert_eq!(lines[0], " [2Jboo");
        console.add(&[0xff; 8192], Instant::now());
        assert!(console.tail().len() <= TAIL);
    }
}
