//! The `working_set` file: numbers of pages, `u64` little-endian, ascending.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{SnapshotError, io};
use crate::memory::page_ranges;

/// Most pages that a working set may have: 64 MiB of them. More would make every idle session
/// expensive, and its prefault slower than the faults it saves.
pub const MAX_PAGES: usize = 16 * 1024;

/// Writes the list to an empty file.
///
/// # Errors
/// The file cannot be written.
pub fn write(file: &File, pages: &[u64]) -> Result<(), SnapshotError> {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    file.write_all_at(&bytes, 0)
        .map_err(io("writing the working set"))
}

/// Reads the list as ranges. Pages beyond [`MAX_PAGES`] are left to be faulted in.
///
/// # Errors
/// The file cannot be read.
pub fn read(file: &File) -> Result<Vec<Range<u64>>, SnapshotError> {
    let length = file
        .metadata()
        .map_err(io("reading the working set"))?
        .len();
    // Workers that are restored at the same time share the descriptor's position: never use it.
    let mut bytes = vec![0; length.min(MAX_PAGES as u64 * 8) as usize];
    file.read_exact_at(&mut bytes, 0)
        .map_err(io("reading the working set"))?;
    let pages: Vec<u64> = bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|page| u64::from_le_bytes(*page))
        .collect();
    Ok(page_ranges(&pages))
}
