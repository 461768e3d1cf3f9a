//! The guest's memory as a Linux kernel finds it when it starts at its 64-bit entry.
//!
//! After Documentation/arch/x86/boot.rst ("64-bit boot protocol") and zero-page.rst of Linux, and
//! Intel's MultiProcessor Specification 1.4 for the table of processors, which takes the place of
//! ACPI: the stock kernel asks for nothing more.

use std::fs::File;

use anyhow::{Context, ensure};

use super::layout::*;
use crate::kvm::apic::{HOLE, PINS};
use crate::machine::elf;
use crate::memory::{GuestMemory, PAGE};

/// Longest command line, with its final zero: `COMMAND_LINE_SIZE` of Linux on x86.
const MAX_CMDLINE: usize = 2048;

/// Offsets in the zero page.
mod zero_page {
    pub const E820_ENTRIES: u64 = 0x1e8;
    pub const BOOT_FLAG: u64 = 0x1fe;
    pub const HEADER: u64 = 0x202;
    pub const LOADER: u64 = 0x210;
    pub const RAMDISK: u64 = 0x218;
    pub const RAMDISK_SIZE: u64 = 0x21c;
    pub const CMDLINE: u64 = 0x228;
    pub const ALIGNMENT: u64 = 0x230;
    pub const E820: u64 = 0x2d0;
}

/// Loads everything; gives the guest-physical address of the kernel's entry.
pub(super) fn load(
    memory: &GuestMemory,
    layout: &Layout,
    vcpus: u32,
    kernel: &File,
    initramfs: &File,
    cmdline: &str,
) -> anyhow::Result<u64> {
    ensure!(
        cmdline.len() < MAX_CMDLINE && !cmdline.contains('\0'),
        "the kernel command line is longer than {MAX_CMDLINE} bytes"
    );
    let limit = layout.ram.min(MAPPED_LIMIT);
    let loaded = elf::load(kernel, memory, limit)?;
    ensure!(
        loaded.text.0 >= MEGABYTE && (MEGABYTE..limit).contains(&loaded.start),
        "the kernel wants to be loaded into the first megabyte: give an extracted x86-64 vmlinux"
    );
    let initramfs_size = initramfs.metadata().context("the initramfs")?.len();
    // At the end of memory, where the kernel does not unpack it over itself.
    let initramfs_at = layout
        .ram
        .min(HOLE)
        .checked_sub(initramfs_size.next_multiple_of(PAGE))
        .filter(|&at| at >= loaded.end.next_multiple_of(PAGE))
        .with_context(|| {
            format!(
                "kernel and initramfs need more than the VM's {} MiB: give it more memory",
                layout.ram >> 20
            )
        })?;
    elf::copy(initramfs, 0, memory, initramfs_at, initramfs_size)
        .context("reading the initramfs")?;

    memory.write(CMDLINE_AT, cmdline.as_bytes())?;
    write_zero_page(memory, layout, initramfs_at, initramfs_size)?;
    write_page_tables(memory)?;
    for (selector, descriptor) in [(0x10, CODE_DESCRIPTOR), (0x18, DATA_DESCRIPTOR)] {
        memory.write_u64(GDT + selector, descriptor)?;
    }
    memory.write(LOW_END, &processors(vcpus))?;
    Ok(loaded.start)
}

/// Flat 64-bit code, and flat data, where the boot protocol wants their selectors (0x10, 0x18).
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

fn write_zero_page(
    memory: &GuestMemory,
    layout: &Layout,
    initramfs_at: u64,
    initramfs_size: u64,
) -> anyhow::Result<()> {
    let word = |offset: u64, value: u64| -> anyhow::Result<()> {
        let value = u32::try_from(value).context("an address of the zero page")?;
        Ok(memory.write(BOOT_PARAMS + offset, &value.to_le_bytes())?)
    };
    memory.write(BOOT_PARAMS + zero_page::BOOT_FLAG, &[0x55, 0xaa])?;
    memory.write(BOOT_PARAMS + zero_page::HEADER, b"HdrS")?;
    // A loader that nobody has registered.
    memory.write(BOOT_PARAMS + zero_page::LOADER, &[0xff])?;
    word(zero_page::RAMDISK, initramfs_at)?;
    word(zero_page::RAMDISK_SIZE, initramfs_size)?;
    word(zero_page::CMDLINE, CMDLINE_AT)?;
    word(zero_page::ALIGNMENT, 0x0100_0000)?;
    let ranges = layout.usable();
    memory.write(BOOT_PARAMS + zero_page::E820_ENTRIES, &[ranges.len() as u8])?;
    for (index, (start, length)) in (0..).zip(ranges) {
        let at = BOOT_PARAMS + zero_page::E820 + index * 20;
        // They are packed: no address in them is aligned. Type 1 is usable RAM.
        memory.write(at, [start, length].map(u64::to_le_bytes).as_flattened())?;
        memory.write(at + 16, &1_u32.to_le_bytes())?;
    }
    Ok(())
}

fn write_page_tables(memory: &GuestMemory) -> anyhow::Result<()> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE_PAGE: u64 = 0x83;
    memory.write_u64(PML4, PDPT | PRESENT_WRITABLE)?;
    memory.write_u64(PDPT, DIRECTORY | PRESENT_WRITABLE)?;
    for index in 0..512 {
        memory.write_u64(DIRECTORY + index * 8, index << 21 | LARGE_PAGE)?;
    }
    Ok(())
}

/// The floating pointer and, right after it, the table: processors, one ISA bus, one I/O APIC whose pins are the bus's lines.
fn processors(vcpus: u32) -> Vec<u8> {
    let io_apic_id = vcpus as u8;
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut add = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus as u8 {
        // Enabled, and the first one is where the kernel starts. Family 6, with FPU and APIC.
        let flags = if id == 0 { 3 } else { 1 };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[0, id, 0x14, flags]);
        entry[4..8].copy_from_slice(&0x600_u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201_u32.to_le_bytes());
        add(&entry);
    }
    add(b"\x01\x00ISA   ");
    let mut io_apic = [0; 8];
    io_apic[..4].copy_from_slice(&[2, io_apic_id, 0x11, 1]);
    io_apic[4..].copy_from_slice(&IO_APIC.to_le_bytes());
    add(&io_apic);
    for line in 0..PINS as u8 {
        add(&[3, 0, 0, 0, 0, line, io_apic_id, line]);
    }
    // LINT1 of every local APIC takes non-maskable interrupts.
    add(&[4, 1, 0, 0, 0, 0, 0xff, 1]);

    let mut table = Vec::with_capacity(44 + entries.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]);
    table.extend_from_slice(b"THAW    MICROVM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&((LOW_END + 16) as u32).to_le_bytes());
    pointer[8..10].copy_from_slice(&[1, 4]);
    pointer[10] = checksum(&pointer);
    [&pointer[..], &table].concat()
}

/// What makes the bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0, |sum: u8, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_processors_adds_up() {
        for vcpus in [1, 8] {
            let bytes = processors(vcpus);
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(table), 0);
            let length = usize::from(u16::from_le_bytes([table[4], table[5]]));
            assert_eq!(length, table.len());
            let count = usize::from(u16::from_le_bytes([table[34], table[35]]));
            assert_eq!(count, vcpus as usize + 2 + PINS as usize + 1);
            assert!(LOW_END + bytes.len() as u64 <= 0xa_0000);
        }
    }
}
