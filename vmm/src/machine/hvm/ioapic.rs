//! The I/O APIC: a table of what each pin sends to which local APIC (Intel 82093AA, section 3).
//!
//! Two registers are in memory, an index and a window. It only keeps what the guest writes; KVM
//! learns of the table's entries as routes.

use serde::{Deserialize, Serialize};

use super::layout::{IO_APIC, LOCAL_APIC};
use crate::kvm::apic::{Message, PINS};

/// Offsets of the index and of the window.
const INDEX: u64 = 0;
const WINDOW: u64 = 0x10;
/// Bytes that it takes up in memory.
const SIZE: u64 = 0x100;

/// Registers behind the index.
const ID: u32 = 0;
const VERSION: u32 = 1;
const ARBITRATION: u32 = 2;
const TABLE: u32 = 0x10;

/// An entry's mask bit, and the bits that are not the guest's to write (delivery status, remote IRR).
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = 1 << 12 | 1 << 14;

/// Its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct IoApic {
    index: u32,
    id: u32,
    entries: [u64; PINS as usize],
}

impl Default for IoApic {
    fn default() -> Self {
        Self {
            index: 0,
            id: 0,
            entries: [MASKED; PINS as usize],
        }
    }
}

impl IoApic {
    /// Whether this address is one of its own.
    pub(super) fn has(address: u64) -> bool {
        (u64::from(IO_APIC)..u64::from(IO_APIC) + SIZE).contains(&address)
    }

    /// What the guest reads at an address.
    pub(super) fn read(&self, address: u64) -> u32 {
        match address - u64::from(IO_APIC) {
            INDEX => self.index,
            WINDOW => match self.index {
                ID | ARBITRATION => self.id,
                VERSION => (PINS - 1) << 16 | 0x11,
                _ => self.entry().map_or(0, |(entry, high)| {
                    (self.entries[entry] >> (32 * u32::from(high))) as u32
                }),
            },
            _ => 0,
        }
    }

    /// The guest writes; whether what a pin sends may have changed.
    pub(super) fn write(&mut self, address: u64, value: u32) -> bool {
        match (address - u64::from(IO_APIC), self.index) {
            (INDEX, _) => self.index = value & 0xff,
            (WINDOW, ID) => self.id = value & 0x0f00_0000,
            (WINDOW, _) => {
                let Some((entry, high)) = self.entry() else {
                    return false;
                };
                let before = self.entries[entry];
                let (old, new) = (before, u64::from(value));
                self.entries[entry] = if high {
                    old & 0xffff_ffff | new << 32
                } else {
                    old >> 32 << 32 | new & !READ_ONLY
                };
                return self.entries[entry] != before;
            }
            _ => {}
        }
        false
    }

    fn entry(&self) -> Option<(usize, bool)> {
        let register = self.index.checked_sub(TABLE)?;
        let entry = usize::try_from(register / 2).ok()?;
        (entry < self.entries.len()).then_some((entry, register % 2 == 1))
    }

    /// What a pin sends; `None` while it is masked.
    pub(super) fn message(&self, pin: u32) -> Option<Message> {
        let entry = *self.entries.get(usize::try_from(pin).ok()?)?;
        if entry & MASKED != 0 {
            return None;
        }
        let (destination, logical) = ((entry >> 56) as u32, (entry >> 11 & 1) as u32);
        let (vector, delivery) = ((entry & 0xff) as u32, (entry >> 8 & 7) as u32);
        Some(Message {
            address: LOCAL_APIC | destination << 12 | logical << 2,
            data: vector | delivery << 8,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(apic: &mut IoApic, register: u32, value: u32) -> bool {
        assert!(!apic.write(u64::from(IO_APIC), register));
        apic.write(u64::from(IO_APIC) + WINDOW, value)
    }

    #[test]
    fn a_pin_sends_what_its_entry_says_once_it_is_unmasked() {
        let mut apic = IoApic::default();
        assert_eq!(apic.message(7), None);
        assert!(set(&mut apic, 0x10 + 15, 3 << 24));
        assert!(set(&mut apic, 0x10 + 14, 0x31 | 1 << 8));
        let message = Message {
            address: 0xfee0_3000,
            data: 0x131,
        };
        assert_eq!(apic.message(7), Some(message));
        assert_eq!(apic.read(u64::from(IO_APIC) + WINDOW), 0x131);
        assert!(!set(&mut apic, 0x10 + 14, 0x131 | 1 << 12));
        assert!(set(&mut apic, 0x10 + 14, 1 << 16));
        assert_eq!(apic.message(7), None);
    }

    proptest::proptest! {
        #[test]
        fn any_writes_are_borne(writes: Vec<(u8, u32)>) {
            let mut apic = IoApic::default();
            for (offset, value) in writes {
                let address = u64::from(IO_APIC) + u64::from(offset);
                apic.write(address, value);
                apic.read(address);
            }
            for pin in 0..64 {
                apic.message(pin);
            }
        }
    }
}
