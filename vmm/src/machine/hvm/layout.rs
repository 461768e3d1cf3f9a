//! Where everything is in an `hvm` guest's physical memory.
//!
//! RAM lies as on any PC: 640 KiB, a hole of ROMs that are not there, then the rest up to 3 GiB; what is
//! more goes on at 4 GiB. The memory file has the same shape, hole included: an address is an offset.

use std::ops::RangeInclusive;

use anyhow::ensure;

use crate::kvm::apic::{HIGH, HOLE};

/// Guest memory that a VM may have, MiB: as on the `pv` machine, so that an image fits both.
pub const MEMORY_MIB: RangeInclusive<u32> = 128..=8192;

/// Boot-time structures, all in the first 640 KiB, which the kernel leaves alone until it has read them.
pub const GDT: u64 = 0x500;
/// The zero page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Page tables that map the first GiB to itself: one page of each level.
pub const PML4: u64 = 0x9000;
/// Second level.
pub const PDPT: u64 = 0xa000;
/// Third level.
pub const DIRECTORY: u64 = 0xb000;
/// The kernel's command line.
pub const CMDLINE_AT: u64 = 0x2_0000;
/// End of low memory, where the kernel looks for the table of processors.
pub const LOW_END: u64 = 0x9_fc00;
/// Where memory goes on after the ROMs.
pub const MEGABYTE: u64 = 0x10_0000;
/// Reach of the boot-time page tables.
pub const MAPPED_LIMIT: u64 = 1 << 30;

/// Default address of local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// The I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;

/// One VM's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of RAM.
    pub ram: u64,
    /// Bytes of the memory file: RAM, and the hole if RAM reaches beyond it.
    pub size: u64,
}

impl Layout {
    /// The layout of a VM with so much memory.
    ///
    /// # Errors
    /// A size out of [`MEMORY_MIB`].
    pub fn new(memory_mib: u32) -> anyhow::Result<Self> {
        ensure!(
            MEMORY_MIB.contains(&memory_mib),
            "a VM with {memory_mib} MiB of memory was asked for; it can have {} to {}",
            MEMORY_MIB.start(),
            MEMORY_MIB.end()
        );
        let ram = u64::from(memory_mib) << 20;
        let size = if ram > HOLE { ram + (HIGH - HOLE) } else { ram };
        Ok(Self { ram, size })
    }

    /// Ranges that the kernel may use: start and length.
    pub fn usable(&self) -> Vec<(u64, u64)> {
        let mut ranges = vec![(0, LOW_END), (MEGABYTE, self.ram.min(HOLE) - MEGABYTE)];
        if self.size > HIGH {
            ranges.push((HIGH, self.size - HIGH));
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_memory_is_usable_but_a_hole_and_the_roms() {
        for mib in [128, 512, 3072, 4096, 8192] {
            let layout = Layout::new(mib).unwrap();
            let usable: u64 = layout.usable().iter().map(|(_, length)| length).sum();
            assert_eq!(usable, layout.ram - (MEGABYTE - LOW_END), "{mib}");
            let end = layout.usable().iter().map(|(at, length)| at + length).max();
            assert_eq!(end, Some(layout.size));
        }
        assert!(Layout::new(64).is_err() && Layout::new(9000).is_err());
    }
}
