//! Guest-virtual addresses: what a hypercall's pointers point to.
//!
//! Page tables and pointers are the guest's and may be anything; whatever they say, an access
//! ends inside guest memory or fails.

use crate::memory::{GuestMemory, PAGE};

const PRESENT: u64 = 1;
const LARGE_PAGE: u64 = 0x80;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Guest-physical address of a virtual one, by the page table at `cr3`.
pub(super) fn translate(memory: &GuestMemory, cr3: u64, address: u64) -> Option<u64> {
    let mut table = cr3 & FRAME;
    for level in (0..4).rev() {
        let shift = 12 + 9 * level;
        let entry = memory.read_u64(table + (address >> shift & 511) * 8).ok()?;
        if entry & PRESENT == 0 {
            return None;
        }
        if level == 0 || (level < 3 && entry & LARGE_PAGE != 0) {
            let within = (1_u64 << shift) - 1;
            return Some(entry & FRAME & !within | address & within);
        }
        table = entry & FRAME;
    }
    None
}

/// Copies from a guest-virtual address.
pub(super) fn read(
    memory: &GuestMemory,
    cr3: u64,
    mut address: u64,
    mut into: &mut [u8],
) -> Option<()> {
    while !into.is_empty() {
        let (part, rest) = into.split_at_mut(in_page(address, into.len()));
        memory.read(translate(memory, cr3, address)?, part).ok()?;
        address = address.wrapping_add(part.len() as u64);
        into = rest;
    }
    Some(())
}

/// Copies to a guest-virtual address.
pub(super) fn write(
    memory: &GuestMemory,
    cr3: u64,
    mut address: u64,
    mut bytes: &[u8],
) -> Option<()> {
    while !bytes.is_empty() {
        let (part, rest) = bytes.split_at(in_page(address, bytes.len()));
        memory.write(translate(memory, cr3, address)?, part).ok()?;
        address = address.wrapping_add(part.len() as u64);
        bytes = rest;
    }
    Some(())
}

fn in_page(address: u64, length: usize) -> usize {
    length.min(usize::try_from(PAGE - address % PAGE).unwrap_or(0))
}
