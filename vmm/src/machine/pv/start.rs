//! The guest's memory as a Xen kernel finds it when it starts: kernel, initramfs, tables, start-info page.
//!
//! After Xen's public headers (xen.h, `struct start_info`) and docs/misc/pvh, which say what a loader owes.

use std::fs::File;

use anyhow::{Context, ensure};

use super::layout::*;
use super::patches;
use crate::machine::elf;
use crate::memory::{GuestMemory, PAGE};

/// Where the kernel image is mapped: guest-virtual address of guest-physical 0.
const KERNEL_BASE: u64 = 0xffff_ffff_8000_0000;
/// The initial mapping covers at most one page directory's reach.
const MAPPED_LIMIT: u64 = 1 << 30;
/// Mapped memory after the boot stack that the interface promises.
const SLACK: u64 = 512 << 10;
const PAGE_BITS: u64 = 0x67;
/// Longest command line that fits the start-info page.
const MAX_CMDLINE: usize = 1023;
/// Flag of the start-info page: the module's address is a frame number.
const SIF_MOD_START_PFN: u64 = 8;
/// Event channel of the console, bound from the start.
pub(super) const CONSOLE_PORT: u32 = 1;

/// What the machine must know after loading.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start {
    pub entry: u64,
    pub start_info: u64,
    pub stack: u64,
    pub page_table: u64,
    /// Guest-physical address of the console's ring page.
    pub console: u64,
}

/// Loads everything.
pub(super) fn load(
    memory: &GuestMemory,
    layout: &Layout,
    vcpus: u32,
    kernel: &File,
    initramfs: &File,
    cmdline: &str,
) -> anyhow::Result<Start> {
    ensure!(
        cmdline.len() <= MAX_CMDLINE && !cmdline.contains('\0'),
        "the kernel command line is longer than {MAX_CMDLINE} bytes"
    );
    let limit = layout.ram.min(MAPPED_LIMIT);
    let kernel = elf::load(kernel, memory, limit)?;
    let entry = kernel.xen.context(
        "the kernel has no Xen entry (built without CONFIG_XEN_PV; Debian's cloud flavour is): use the ordinary linux-image-amd64",
    )?;
    patches::apply(memory, kernel.text, vcpus).context("patching the kernel")?;

    let mut next = Allocator {
        next: kernel.end.next_multiple_of(PAGE),
        limit,
    };
    let initramfs_size = initramfs.metadata().context("the initramfs")?.len();
    let initramfs_at = next.take(initramfs_size)?;
    elf::copy(initramfs, 0, memory, initramfs_at, initramfs_size)
        .context("reading the initramfs")?;
    let pages = layout.ram / PAGE;
    let frames = next.take(pages * 8)?;
    let identity: Vec<u8> = (0..pages).flat_map(u64::to_le_bytes).collect();
    memory.write(frames, &identity)?;
    let start_info = next.take(PAGE)?;
    let store = next.take(PAGE)?;
    let console = next.take(PAGE)?;

    let page_table = next.next;
    let mut leaves = 1;
    while page_table + (3 + leaves) * PAGE + PAGE + SLACK > leaves * LARGE {
        leaves += 1;
    }
    let tables = 3 + leaves;
    next.take(tables * PAGE)?;
    let stack = next.take(PAGE)?;
    ensure!(
        stack + PAGE + SLACK <= limit,
        "kernel and initramfs leave no room in {} MiB of guest memory",
        layout.ram >> 20
    );
    map(memory, layout, page_table, leaves)?;

    let info = StartInfo {
        layout,
        store,
        console,
        page_table,
        tables,
        frames,
        initramfs_at,
        initramfs_size,
    };
    info.write(memory, start_info, cmdline)?;
    Ok(Start {
        entry,
        start_info: KERNEL_BASE + start_info,
        stack: KERNEL_BASE + stack + PAGE,
        page_table,
        console,
    })
}

struct Allocator {
    next: u64,
    limit: u64,
}

impl Allocator {
    fn take(&mut self, bytes: u64) -> anyhow::Result<u64> {
        let at = self.next;
        let after = at
            .checked_add(bytes)
            .map(|after| after.next_multiple_of(PAGE))
            .filter(|&after| after <= self.limit);
        self.next = after.with_context(|| format!("kernel and initramfs need more than the {} MiB they may use: give the VM more memory", self.limit >> 20))?;
        Ok(at)
    }
}

fn map(memory: &GuestMemory, layout: &Layout, page_table: u64, leaves: u64) -> anyhow::Result<()> {
    let (l3, l2, l1) = (
        page_table + PAGE,
        page_table + 2 * PAGE,
        page_table + 3 * PAGE,
    );
    memory.write_u64(page_table + (KERNEL_BASE >> 39 & 511) * 8, l3 | PAGE_BITS)?;
    memory.write_u64(
        page_table + AREA_SLOT * 8,
        (layout.area + AREA_SLOT_L3) | PAGE_BITS,
    )?;
    memory.write_u64(
        page_table + DIRECT_SLOT * 8,
        (layout.area + AREA_DIRECT_L3) | PAGE_BITS,
    )?;
    memory.write_u64(l3 + (KERNEL_BASE >> 30 & 511) * 8, l2 | PAGE_BITS)?;
    for leaf in 0..leaves {
        memory.write_u64(l2 + leaf * 8, (l1 + leaf * PAGE) | PAGE_BITS)?;
    }
    let entries: Vec<u8> = (0..leaves * 512)
        .flat_map(|page| ((page * PAGE) | PAGE_BITS).to_le_bytes())
        .collect();
    Ok(memory.write(l1, &entries)?)
}

struct StartInfo<'a> {
    layout: &'a Layout,
    store: u64,
    console: u64,
    page_table: u64,
    tables: u64,
    frames: u64,
    initramfs_at: u64,
    initramfs_size: u64,
}

impl StartInfo<'_> {
    fn write(&self, memory: &GuestMemory, at: u64, cmdline: &str) -> anyhow::Result<()> {
        memory.write(at, b"xen-3.0-x86_64\0")?;
        let flags = if self.initramfs_size > 0 {
            SIF_MOD_START_PFN
        } else {
            0
        };
        for (offset, value) in [
            (32, self.layout.ram / PAGE),
            (40, self.layout.area + AREA_SHARED_INFO),
            (48, flags),
            (56, self.store / PAGE),
            (64, 0),
            (72, self.console / PAGE),
            (80, u64::from(CONSOLE_PORT)),
            (88, KERNEL_BASE + self.page_table),
            (96, self.tables),
            (104, KERNEL_BASE + self.frames),
            (112, self.initramfs_at / PAGE),
            (120, self.initramfs_size),
        ] {
            memory.write_u64(at + offset, value)?;
        }
        memory.write(at + 128, cmdline.as_bytes())?;
        Ok(())
    }
}
