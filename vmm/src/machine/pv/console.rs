//! The guest's console: the ring of Xen's console device, and `console_io` for early output.

use std::sync::atomic::Ordering;

use crate::machine::console::Console;
use crate::memory::{GuestMemory, MemoryError};

/// Offsets and size in the ring page (`struct xencons_interface`).
const OUT: u64 = 1024;
const OUT_SIZE: u32 = 2048;
const OUT_CONSUMED: u64 = 3080;
const OUT_PRODUCED: u64 = 3084;

/// Takes what the guest put into the ring.
pub(super) fn drain(
    console: &mut Console,
    memory: &GuestMemory,
    ring: u64,
) -> Result<(), MemoryError> {
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
        console.print(&[byte]);
    }
    memory
        .atomic_u32(ring + OUT_CONSUMED)?
        .store(produced, Ordering::Release);
    Ok(())
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
        drain(&mut console, &memory, 0).unwrap();
        assert_eq!(console.take(), b"hello");
        memory.write(OUT_PRODUCED, &u32::MAX.to_le_bytes()).unwrap();
        drain(&mut console, &memory, 0).unwrap();
        assert_eq!(console.take().len(), OUT_SIZE as usize);
        drain(&mut console, &memory, 0).unwrap();
        assert_eq!(console.take().len(), 0);
    }
}
