//! The header page, as the host reads it: once, into private memory, checked whole.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use thaw_wire::layout::{self, MAX_RING_PAGES, PAGE, offset};

use super::shared::PagedRing;
use crate::memory::{GuestMemory, MemoryError};

/// What is wrong with a header page.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It does not begin with the magic number.
    #[error("page {0:#x} is no header page")]
    Magic(u64),
    /// The agent speaks another version.
    #[error(
        "the agent speaks version {0} of the wire, this thaw version {ours}: build the image again",
        ours = layout::VERSION
    )]
    Version(u32),
    /// The number of pages is not a power of two within bounds.
    #[error("a ring of {0} pages")]
    RingPages(u32),
    /// A page of a ring is misaligned or outside the memory.
    #[error("page {index} of a ring lies at {address:#x}")]
    RingPage {
        /// Which page of the ring.
        index: usize,
        /// Where the guest says it is.
        address: u64,
    },
    /// The header page itself is outside the memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A checked copy of what the guest wrote.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) generation: u64,
    to_host: Vec<u64>,
    to_guest: Vec<u64>,
}

impl Header {
    pub(super) fn read(memory: &GuestMemory, address: u64) -> Result<Self, HeaderError> {
        let page: [u8; PAGE] = memory.read_array(address)?;
        if u64_at(&page, offset::MAGIC) != layout::MAGIC {
            return Err(HeaderError::Magic(address));
        }
        let version = u32_at(&page, offset::VERSION);
        if version != layout::VERSION {
            return Err(HeaderError::Version(version));
        }
        let ring_pages = u32_at(&page, offset::RING_PAGES);
        let count = ring_pages as usize;
        // At least as large as the largest frame, or a frame could never pass.
        if !ring_pages.is_power_of_two() || !(layout::RING_PAGES..=MAX_RING_PAGES).contains(&count)
        {
            return Err(HeaderError::RingPages(ring_pages));
        }
        Ok(Self {
            generation: u64_at(&page, offset::GENERATION),
            to_host: ring(memory, &page, offset::TO_HOST_PAGES, count)?,
            to_guest: ring(memory, &page, offset::TO_GUEST_PAGES, count)?,
        })
    }

    /// The host's ends: (consumer of what the guest says, producer of what it hears).
    pub(super) fn rings(self, memory: &Arc<GuestMemory>, address: u64) -> (PagedRing, PagedRing) {
        let ring = |pages, mine, theirs| {
            PagedRing::new(
                memory.clone(),
                pages,
                address + mine as u64,
                address + theirs as u64,
            )
        };
        (
            ring(self.to_host, offset::TO_HOST_TAIL, offset::TO_HOST_HEAD),
            ring(self.to_guest, offset::TO_GUEST_HEAD, offset::TO_GUEST_TAIL),
        )
    }
}

/// Tells the agent which generation it is of.
pub(super) fn write_generation(
    memory: &GuestMemory,
    header: u64,
    generation: u64,
) -> Result<(), MemoryError> {
    memory.write_u64(header + offset::GENERATION as u64, generation)
}

fn ring(
    memory: &GuestMemory,
    page: &[u8; PAGE],
    at: usize,
    count: usize,
) -> Result<Vec<u64>, HeaderError> {
    (0..count)
        .map(|index| {
            let address = u64_at(page, at + index * 8);
            let inside = address
                .checked_add(PAGE as u64)
                .is_some_and(|end| end <= memory.size());
            if inside && address.is_multiple_of(PAGE as u64) {
                Ok(address)
            } else {
                Err(HeaderError::RingPage { index, address })
            }
        })
        .collect()
}

fn u64_at(page: &[u8; PAGE], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&page[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn u32_at(page: &[u8; PAGE], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&page[at..at + 4]);
    u32::from_le_bytes(bytes)
}

/// Loads a position that the guest publishes.
pub(super) fn load(word: &AtomicU32) -> u32 {
    u32::from_le(word.load(Ordering::Acquire))
}

/// Publishes a position to the guest.
pub(super) fn store(word: &AtomicU32, value: u32) {
    word.store(value.to_le(), Ordering::Release);
}
