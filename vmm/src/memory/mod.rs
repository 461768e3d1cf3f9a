//! Guest memory: one mapping per VM, and every access to it checked.
//!
//! A VM's memory is one contiguous range of guest-physical addresses from 0. It is either
//! anonymous (a VM that boots) or a private view of a file (a VM that is restored): then pages
//! stay shared with every other VM of the same file until somebody writes them.
//!
//! The guest runs while the host reads, so memory is never lent out as a Rust slice: it is
//! copied in and out, or accessed by atomics. No address or length from a guest can make
//! these functions touch anything outside the mapping.

mod mapping;
mod overlay;
mod pagemap;

use std::ops::Range;

pub use mapping::GuestMemory;
pub use pagemap::keep_pagemap_open;

/// Size of a guest page, bytes.
pub const PAGE: u64 = 4096;

/// Why an access to guest memory failed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The range is not, or not wholly, inside the VM's memory.
    #[error(
        "guest address {address:#x} with length {length:#x} lies outside the VM's {size:#x} bytes of memory"
    )]
    OutOfBounds {
        /// First byte of the access.
        address: u64,
        /// Length of the access, bytes.
        length: u64,
        /// Size of the VM's memory, bytes.
        size: u64,
    },
    /// An atomic access must be naturally aligned.
    #[error("guest address {address:#x} is not aligned to {alignment} bytes")]
    Misaligned {
        /// Address of the access.
        address: u64,
        /// What it must be a multiple of.
        alignment: u64,
    },
    /// A size or a file that guest memory cannot be made of.
    #[error("guest memory cannot be mapped: {0}")]
    Unmappable(String),
    /// The kernel refused.
    #[error("guest memory: {what}: {source}")]
    Os {
        /// What was asked of the kernel.
        what: &'static str,
        /// What it said.
        source: std::io::Error,
    },
}

/// Joins sorted page numbers into ranges of pages.
#[must_use]
pub fn page_ranges(pages: &[u64]) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for &page in pages {
        match ranges.last_mut() {
            Some(last) if last.end == page => last.end += 1,
            Some(last) if last.contains(&page) => {}
            _ => ranges.push(page..page.saturating_add(1)),
        }
    }
    ranges
}
