//! The agent's bell: a parallel port with nothing on it, for the sake of its interrupt line.
//!
//! Of the interrupts that a stock kernel hands to a process as they are, the parallel port's costs
//! least: its driver (`parport_pc`, with `ppdev` above it) touches no register when it fires, the
//! process waits for it with `poll`, and one ioctl takes and clears the count. The driver believes in
//! the port if two of its registers keep what is written to them.

use serde::{Deserialize, Serialize};
use thaw_wire::layout::BELL_PORT;

/// First of its ports: data, status, control.
pub(super) const FIRST: u16 = BELL_PORT;
pub(super) const LAST: u16 = FIRST + 2;

/// Status as the driver reads it: not busy, no error, and the time-out bit of EPP stuck, so that it looks for no EPP.
const STATUS: u8 = 0xdf;
/// The control register's bits that exist.
const CONTROL_BITS: u8 = 0x3f;
/// Interrupts are let through.
const INTERRUPTS: u8 = 0x10;

/// Its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bell {
    data: u8,
    control: u8,
}

impl Bell {
    pub(super) fn read(self, port: u16) -> u8 {
        match port - FIRST {
            0 => self.data,
            1 => STATUS,
            _ => self.control,
        }
    }

    pub(super) fn write(&mut self, port: u16, value: u8) {
        match port - FIRST {
            0 => self.data = value,
            2 => self.control = value & CONTROL_BITS,
            _ => {}
        }
    }

    /// Whether anybody listens.
    pub(super) fn is_armed(self) -> bool {
        self.control & INTERRUPTS != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_finds_a_port_and_arms_it() {
        let mut bell = Bell::default();
        for probe in [0x0c, 0x0e] {
            bell.write(FIRST + 2, probe);
            assert_eq!(bell.read(FIRST + 2) & 0xf, probe);
        }
        assert!(!bell.is_armed());
        bell.write(FIRST + 2, 0x1c);
        assert!(bell.is_armed());
        // The time-out bit of EPP cannot be cleared.
        bell.write(FIRST + 1, 0);
        assert_eq!(bell.read(FIRST + 1) & 1, 1);
    }
}
