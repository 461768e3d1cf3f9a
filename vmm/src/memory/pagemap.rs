//! Which pages of a mapping belong to this process alone, as `/proc/self/pagemap` tells it.
//!
//! One little-endian `u64` per page (Linux, Documentation/admin-guide/mm/pagemap.rst): bit 63 present,
//! bit 62 swapped out, bit 61 page of a file or of shared memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use super::{MemoryError, PAGE};

/// The file, for a process that can open it no more.
static KEPT: OnceLock<File> = OnceLock::new();

/// Opens `/proc/self/pagemap` for good: a worker asks for it again when its jail has no `/proc`.
///
/// # Errors
/// It cannot be opened.
pub fn keep_pagemap_open() -> std::io::Result<()> {
    let file = open()?;
    KEPT.get_or_init(|| file);
    Ok(())
}

fn open() -> std::io::Result<File> {
    File::open("/proc/self/pagemap")
}

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;

/// Entries read at once: 64 KiB of them cover 32 MiB of memory.
const BATCH: u64 = 8192;

pub(super) fn private_pages(
    address: u64,
    pages: u64,
    of_a_file: bool,
) -> Result<Vec<u64>, MemoryError> {
    let failed = |source| MemoryError::Os {
        what: "reading /proc/self/pagemap",
        source,
    };
    let opened;
    let pagemap = match KEPT.get() {
        Some(kept) => kept,
        None => {
            opened = open().map_err(failed)?;
            &opened
        }
    };
    let mut found = Vec::new();
    let mut bytes = vec![0_u8; usize::try_from(BATCH.min(pages) * 8).unwrap_or(0)];
    let mut page = 0;
    while page < pages {
        let count = BATCH.min(pages - page);
        let batch = &mut bytes[..usize::try_from(count * 8).unwrap_or(0)];
        pagemap
            .read_exact_at(batch, (address / PAGE + page) * 8)
            .map_err(failed)?;
        for (number, entry) in (page..).zip(batch.as_chunks::<8>().0) {
            let entry = u64::from_le_bytes(*entry);
            let here = entry & (PRESENT | SWAPPED) != 0;
            if here && (!of_a_file || entry & OF_A_FILE == 0) {
                found.push(number);
            }
        }
        page += count;
    }
    Ok(found)
}
