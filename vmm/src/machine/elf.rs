//! Loading a `vmlinux` and finding its entries.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, ensure};

use crate::memory::GuestMemory;

/// Program headers that are looked at; Debian's kernels have five.
const MAX_HEADERS: u64 = 64;
/// Longest note segment that is read; Debian's has half a KiB.
const MAX_NOTES: u64 = 64 << 10;
/// Bytes copied at once.
const CHUNK: u64 = 1 << 20;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_ENTRY: u32 = 1;

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    /// Guest-physical address of its ordinary 64-bit entry.
    pub start: u64,
    /// Guest-virtual address of its Xen entry, if it has one.
    pub xen: Option<u64>,
    /// First guest-physical address after it.
    pub end: u64,
    /// Guest-physical addresses of its first segment's first byte and the byte after the last: its text.
    pub text: (u64, u64),
}

/// Copies the kernel's segments to the physical addresses they ask for, all below `limit`.
pub(super) fn load(file: &File, memory: &GuestMemory, limit: u64) -> anyhow::Result<Kernel> {
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)
        .context("the kernel is shorter than an ELF header")?;
    ensure!(
        header.starts_with(b"\x7fELF\x02\x01"),
        "the kernel is not a 64-bit ELF file: give the extracted vmlinux, not vmlinuz"
    );
    let table = u64_at(&header, 0x20);
    let size = u64::from(u16_at(&header, 0x36));
    let number = u64::from(u16_at(&header, 0x38)).min(MAX_HEADERS);
    ensure!(
        size >= 56,
        "the kernel's program headers have an impossible size"
    );
    let (mut entry, mut end, mut text) = (None, 0, None);
    for index in 0..number {
        let mut program = [0; 56];
        let at = table
            .checked_add(index * size)
            .context("the kernel's program headers lie outside the file")?;
        file.read_exact_at(&mut program, at)
            .context("the kernel's program headers lie outside the file")?;
        let (offset, physical) = (u64_at(&program, 8), u64_at(&program, 24));
        let (in_file, in_memory) = (u64_at(&program, 32), u64_at(&program, 40));
        match u32_at(&program, 0) {
            PT_LOAD => {
                let after = physical
                    .checked_add(in_memory.max(in_file))
                    .filter(|&after| after <= limit);
                let after = after.context("the kernel does not fit into the guest's memory")?;
                copy(file, offset, memory, physical, in_file).context("the kernel is truncated")?;
                end = end.max(after);
                text = text.or(Some((physical, physical + in_file)));
            }
            PT_NOTE => {
                ensure!(
                    in_file <= MAX_NOTES,
                    "the kernel's notes are implausibly long"
                );
                let mut notes = vec![0; usize::try_from(in_file)?];
                file.read_exact_at(&mut notes, offset)
                    .context("the kernel is truncated")?;
                entry = entry.or(xen_entry(&notes));
            }
            _ => {}
        }
    }
    let text = text.context("the kernel has nothing to load")?;
    Ok(Kernel {
        start: u64_at(&header, 0x18),
        xen: entry,
        end,
        text,
    })
}

/// Copies part of a file into guest memory.
pub(super) fn copy(
    file: &File,
    mut offset: u64,
    memory: &GuestMemory,
    mut to: u64,
    length: u64,
) -> anyhow::Result<()> {
    let mut buffer = vec![0; usize::try_from(length.min(CHUNK))?];
    let mut left = length;
    while left > 0 {
        let part = &mut buffer[..usize::try_from(left.min(CHUNK))?];
        file.read_exact_at(part, offset)?;
        memory.write(to, part)?;
        let done = part.len() as u64;
        offset += done;
        to += done;
        left -= done;
    }
    Ok(())
}

fn xen_entry(mut notes: &[u8]) -> Option<u64> {
    loop {
        let head: &[u8; 12] = notes.first_chunk()?;
        let (name_length, length, kind) = (
            u32_at(head, 0) as usize,
            u32_at(head, 4) as usize,
            u32_at(head, 8),
        );
        let name = notes.get(12..12_usize.checked_add(name_length)?)?;
        let at = 12 + name_length.next_multiple_of(4);
        let description = notes.get(at..at.checked_add(length)?)?;
        if name == b"Xen\0" && kind == XEN_ELFNOTE_ENTRY {
            return description
                .first_chunk()
                .map(|bytes| u64::from_le_bytes(*bytes));
        }
        notes = notes.get(at + length.next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_notes_have_no_entry() {
        let mut notes = Vec::new();
        for word in [4_u32, 8, XEN_ELFNOTE_ENTRY] {
            notes.extend(word.to_le_bytes());
        }
        notes.extend(b"Xen\0");
        notes.extend(0x1234_u64.to_le_bytes());
        assert_eq!(xen_entry(&notes), Some(0x1234));
        for cut in 0..notes.len() {
            assert_eq!(xen_entry(&notes[..cut]), None);
        }
        notes[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(xen_entry(&notes), None);
    }
}
