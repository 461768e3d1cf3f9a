//! The guest's clock: nanoseconds since it booted, counted by the time stamp counter.
//!
//! Guest and VMM compute it by the same formula (Xen's `struct vcpu_time_info`), set once at boot and
//! once at every restore, so the two never disagree and time never jumps back.

use crate::kvm::cpu;
use crate::memory::{GuestMemory, MemoryError};

/// Bytes of `struct vcpu_time_info`.
pub(super) const TIME_INFO: u64 = 32;
/// Flag: the counter is the same on all processors and never stops, so user space may use it.
const TSC_STABLE: u8 = 1;

/// The guest's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    /// Counter value at which...
    tsc: u64,
    /// ...the guest's time was this.
    base: u64,
    multiplier: u32,
    shift: i8,
}

impl Clock {
    /// A clock that shows `now` nanoseconds now.
    pub(super) fn starting_at(now: u64, tsc_khz: u32) -> Self {
        let mut ticks = u64::from(tsc_khz.max(1)) * 1000;
        let mut shift = 0_i8;
        while ticks > 2_000_000_000 {
            ticks >>= 1;
            shift -= 1;
        }
        while ticks <= 1_000_000_000 {
            ticks <<= 1;
            shift += 1;
        }
        let multiplier = u32::try_from((1_000_000_000_u64 << 32) / ticks).unwrap_or(u32::MAX);
        Self {
            tsc: cpu::tsc(),
            base: now,
            multiplier,
            shift,
        }
    }

    /// Guest time now.
    pub(super) fn now(&self) -> u64 {
        self.at(cpu::tsc())
    }

    fn at(&self, tsc: u64) -> u64 {
        let ticks = u128::from(tsc.saturating_sub(self.tsc));
        let ticks = if self.shift < 0 {
            ticks >> self.shift.unsigned_abs()
        } else {
            ticks << self.shift.unsigned_abs()
        };
        self.base
            .wrapping_add(((ticks * u128::from(self.multiplier)) >> 32) as u64)
    }

    /// Writes the formula where the guest reads it.
    pub(super) fn publish(&self, memory: &GuestMemory, at: u64) -> Result<(), MemoryError> {
        let version = u32::from_le_bytes(memory.read_array(at)?) & !1;
        memory.write(at, &(version | 1).to_le_bytes())?;
        memory.write(at + 8, &self.tsc.to_le_bytes())?;
        memory.write(at + 16, &self.base.to_le_bytes())?;
        memory.write(at + 24, &self.multiplier.to_le_bytes())?;
        memory.write(at + 28, &[self.shift.to_le_bytes()[0], TSC_STABLE])?;
        memory.write(at, &version.wrapping_add(2).to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_ticks_is_a_second() {
        for khz in [900_000, 2_250_000, 3_999_999] {
            let clock = Clock {
                tsc: 1000,
                ..Clock::starting_at(5, khz)
            };
            let second = clock.at(1000 + u64::from(khz) * 1000) - 5;
            assert!(second.abs_diff(1_000_000_000) < 10, "{khz} kHz: {second}");
            assert_eq!(clock.at(0), 5);
        }
    }
}
