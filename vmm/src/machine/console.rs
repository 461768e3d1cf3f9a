//! What a guest printed: kept until it is taken, and its last lines for the report of a crash.

/// Most bytes kept between two calls of `take`: what a boot prints at full loglevel; of more, the last are kept.
const KEPT: usize = 256 << 10;
/// Bytes remembered for the line that explains a crash: a screen or two.
const TAIL: usize = 4096;
/// Longest such line, in characters.
const MAX_WORDS: usize = 400;

/// What the guest printed and nobody took yet.
#[derive(Debug, Default)]
pub(super) struct Console {
    kept: Vec<u8>,
    tail: Vec<u8>,
}

impl Console {
    pub(super) fn print(&mut self, bytes: &[u8]) {
        keep_last(&mut self.kept, bytes, KEPT);
        keep_last(&mut self.tail, bytes, TAIL);
    }

    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.kept)
    }

    /// The line by which the kernel said that it panicked, if it did.
    pub(super) fn panic(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.tail);
        text.lines()
            .find(|line| line.contains("Kernel panic") && !line.contains("end Kernel panic"))
            .map(shortened)
    }

    /// The line that says why the kernel stopped, or the last line.
    pub(super) fn last_words(&self) -> String {
        self.panic().unwrap_or_else(|| {
            let text = String::from_utf8_lossy(&self.tail);
            let last = text.lines().rfind(|line| !line.trim().is_empty());
            shortened(last.unwrap_or("nothing on the console"))
        })
    }
}

fn shortened(line: &str) -> String {
    line.trim().chars().take(MAX_WORDS).collect()
}

fn keep_last(kept: &mut Vec<u8>, bytes: &[u8], most: usize) {
    kept.extend_from_slice(bytes);
    if kept.len() > most {
        let excess = kept.len() - most;
        kept.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_output_is_kept() {
        let mut console = Console::default();
        assert_eq!(console.last_words(), "nothing on the console");
        for _ in 0..10_000 {
            console.print(&[b'x'; 100]);
        }
        assert_eq!(console.panic(), None);
        console.print(b"\nKernel panic - not syncing: enough\n---[ end Kernel panic ]---\n");
        assert_eq!(console.last_words(), "Kernel panic - not syncing: enough");
        assert_eq!(console.take().len(), KEPT);
    }
}
