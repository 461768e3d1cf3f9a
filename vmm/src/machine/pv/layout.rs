//! Where everything is in a `pv` guest's physical memory: RAM, then the area of shim and VMM.
//!
//! The numbers shared with the shim come from `shim/layout.h`.

use std::ops::RangeInclusive;

use anyhow::ensure;

#[allow(dead_code, reason = "some are for the shim alone")]
mod shared {
    include!(concat!(env!("OUT_DIR"), "/layout.rs"));
}
pub use shared::*;

/// Guest memory that a VM may have, MiB: a Debian kernel unpacks its initramfs in no less, and the page tables of the area cover no more.
pub const MEMORY_MIB: RangeInclusive<u32> = 128..=8192;

/// vCPUs that a VM may have: there is room for so many copies of the shim.
pub const MAX_VCPUS: u32 = AREA_MOST_VCPUS as u32;

/// Large page, bytes.
pub const LARGE: u64 = 2 << 20;

/// One VM's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of RAM that the guest knows of.
    pub ram: u64,
    /// Guest-physical address of the area: the first large page after RAM.
    pub area: u64,
    /// Bytes of the whole: RAM and area.
    pub size: u64,
}

impl Layout {
    /// The layout for this much RAM.
    ///
    /// # Errors
    /// A size out of [`MEMORY_MIB`].
    pub fn new(memory_mib: u32) -> anyhow::Result<Self> {
        ensure!(
            MEMORY_MIB.contains(&memory_mib),
            "{memory_mib} MiB of guest memory: the pv machine takes {} to {}",
            MEMORY_MIB.start(),
            MEMORY_MIB.end()
        );
        let ram = u64::from(memory_mib) << 20;
        let area = ram.next_multiple_of(LARGE);
        Ok(Self {
            ram,
            area,
            size: area + AREA_M2P + (ram / 512).next_multiple_of(LARGE),
        })
    }

    /// A vCPU's copy of the area.
    #[must_use]
    pub fn copy(&self, vcpu: u32) -> AreaCopy {
        let offset = u64::from(vcpu) * AREA_STRIDE;
        AreaCopy {
            physical: self.area + offset,
            address: AREA_BASE + offset,
        }
    }
}

/// One vCPU's copy of what the area has for each.
#[derive(Clone, Copy, Debug)]
pub struct AreaCopy {
    /// Guest-physical address.
    pub physical: u64,
    /// Guest-virtual address.
    pub address: u64,
}

impl AreaCopy {
    /// Guest-virtual address, in the direct map, of something in it.
    ///
    /// A software KVM walks the guest's page tables for each of the dozen words that it reads and writes
    /// to deliver a page fault. The direct map's large pages save a quarter of each walk.
    #[must_use]
    pub fn direct(&self, offset: u64) -> u64 {
        DIRECT_BASE + self.physical + offset
    }

    /// Guest-physical address of a field of the shared page.
    #[must_use]
    pub fn comm(&self, field: u64) -> u64 {
        self.physical + AREA_COMM + field
    }
}

/// Whether an instruction at this address belongs to the shim or the CPL0 stubs, whichever copy.
#[must_use]
pub fn in_shim(rip: u64) -> bool {
    let offset = rip.wrapping_sub(AREA_BASE);
    offset < AREA_M2P && offset % AREA_STRIDE < AREA_CODE_END
}
