//! The guest's console: the ring of Xen's console device, and `console_io` for early output.

use std::sync::atomic::Ordering;

use crate::memory::{GuestMemory, MemoryError};

/// Most bytes kept between two calls of `take`: what a boot prints at full loglevel; of more, the last are kept.
const KEPT: usize = 256 << 10;

/// Offsets and size in the ring page (`struct xencons_interface`).
const OUT: u64 = 1024;
const OUT_SIZE: u32 = 2048;
const OUT_CONSUMED: u64 = 3080;
const OUT_PRODUCED: u64 = 3084;

/// What the guest printed and nobody took yet.
#[derive(Debug, Default)]
pub(super) struct Console {
    kept: Vec<u8>,
    /// Last bytes ever printed, for the line that explains a crash.
    tail: Vec<u8>,
}

impl Console {
    pub(super) fn print(&mut self, bytes: &[u8]) {
        keep_last(&mut self.kept, bytes, KEPT);
        keep_last(&mut self.tail, bytes, 4096);
    }

    /// Takes what the guest put into the ring.
    pub(super) fn drain(&mut self, memory: &GuestMemory, ring: u64) -> Result<(), MemoryError> {
        let produced = memory
            .atomic_u32(ring + OUT_PRODUCED)?
            .load(Ordering::Acquire);
        let consumed = memory
            .atomic_u32(ring + OUT_CONSUMED)?
            .load(Ordering::Relaxed);
        // A guest that claims more than a ring holds gets the ring as it is.
        let length = produced.wrapping_sub(consumed).min(OUT_SIZE);
        for position in 0..length {
            let at = produced.wrapping_sub(length).wrapping_add(position) % OUT_SIZE;
            let [byte] = memory.read_array(ring + OUT + u64::from(at))?;
            self.print(&[byte]);
        }
        memory
            .atomic_u32(ring + OUT_CONSUMED)?
            .store(produced, Ordering::Release);
        Ok(())
    }

    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.kept)
    }

    /// The line that says why the kernel stopped, or the last line.
    pub(super) fn last_words(&self) -> String {
        let text = String::from_utf8_lossy(&self.tail);
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let telling = lines
            .clone()
            .find(|line| line.contains("Kernel panic") && !line.contains("end Kernel panic"));
        telling
            .or_else(|| lines.next_back())
            .unwrap_or("nothing on the console")
            .chars()
            .take(400)
            .collect()
    }
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
    use crate::memory::PAGE;

    #[test]
    fn a_lying_ring_yields_at_most_a_ring() {
        let memory = GuestMemory::anonymous(PAGE).unwrap();
        let mut console = Console::default();
        memory.write(OUT, b"hello").unwrap();
        memory.write(OUT_PRODUCED, &5_u32.to_le_bytes()).unwrap();
        console.drain(&memory, 0).unwrap();
        assert_eq!(console.take(), b"hello");
        memory.write(OUT_PRODUCED, &u32::MAX.to_le_bytes()).unwrap();
        console.drain(&memory, 0).unwrap();
        assert_eq!(console.take().len(), OUT_SIZE as usize);
        console.drain(&memory, 0).unwrap();
        assert_eq!(console.take().len(), 0);
    }

    #[test]
    fn only_the_last_output_is_kept() {
        let mut console = Console::default();
        for _ in 0..10_000 {
            console.print(&[b'x'; 100]);
        }
        console.print(b"\nKernel panic - not syncing: enough\n---[ end Kernel panic ]---\n");
        assert_eq!(console.last_words(), "Kernel panic - not syncing: enough");
        assert_eq!(console.take().len(), KEPT);
    }
}
