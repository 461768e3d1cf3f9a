//! Building the area: descriptor tables, the shim's code, and the page tables that show it to the guest.

use super::layout::*;
use crate::machine::probe::SyscallPath;
use crate::memory::{GuestMemory, MemoryError, PAGE};

/// The shim and the CPL0 stubs, flat, from the area's first byte.
const SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shim.bin"));

/// Page-table entry bits: present, writable, accessed, dirty; and with the user bit; and as a large page.
const CPL0_PAGE: u64 = 0x63;
const ANY_PAGE: u64 = 0x67;
const ANY_LARGE: u64 = 0xe7;

/// Interrupt stacks in the TSS.
const EXCEPTION_IST: u64 = 1;
const FAULT_IST: u64 = 2;

/// Words of [`SHIM`] that are addresses in the first copy, and are that much more in another's: where each of the two
/// frames goes on, and the stack of the first.
const RELOCATED: [u64; 3] = [
    CPL0_BREAKPOINT_FRAME,
    CPL0_BREAKPOINT_FRAME + 24,
    CPL0_SYSCALL_FRAME,
];

/// Fills the area of a VM that boots.
pub(super) fn build(
    memory: &GuestMemory,
    layout: &Layout,
    syscall: SyscallPath,
    vcpus: u32,
) -> Result<(), MemoryError> {
    for copy in (0..vcpus).map(|vcpu| layout.copy(vcpu)) {
        memory.write(copy.physical, SHIM)?;
        for word in RELOCATED {
            let first: [u8; 8] = memory.read_array(copy.physical + word)?;
            let moved = u64::from_le_bytes(first) + (copy.address - AREA_BASE);
            memory.write_u64(copy.physical + word, moved)?;
        }
        interrupt_table(memory, copy, syscall)?;
        descriptors(memory, copy)?;
    }
    page_tables(memory, layout, vcpus)?;
    let identity: Vec<u8> = (0..layout.ram / PAGE).flat_map(u64::to_le_bytes).collect();
    memory.write(layout.area + AREA_M2P, &identity)
}

fn interrupt_table(
    memory: &GuestMemory,
    copy: AreaCopy,
    syscall: SyscallPath,
) -> Result<(), MemoryError> {
    for vector in 0..256_u64 {
        let to_cpl3 = (CODE_CPL3, SHIM_VECTORS + vector * SHIM_VECTOR_SIZE);
        let ((selector, offset), ist, privilege) = match (vector, syscall) {
            (3, _) => ((CODE_CPL0, CPL0_BREAKPOINT), 0, 3),
            (14, SyscallPath::Native) => (to_cpl3, FAULT_IST, 0),
            (14, SyscallPath::Bounce) => ((CODE_CPL3, SHIM_FAULT_BOUNCE), FAULT_IST, 0),
            (2 | 8, _) | (32.., _) => ((CODE_CPL0, CPL0_VECTORS + vector * 8), 0, 0),
            (4, _) => (to_cpl3, EXCEPTION_IST, 3),
            _ => (to_cpl3, EXCEPTION_IST, 0),
        };
        let address = copy.address + offset;
        let gate = copy.physical + AREA_IDT + vector * 16;
        let attributes = 0x8e00 | privilege << 13 | ist;
        memory.write_u64(
            gate,
            address & 0xffff | selector << 16 | attributes << 32 | (address >> 16 & 0xffff) << 48,
        )?;
        memory.write_u64(gate + 8, address >> 32)?;
    }
    Ok(())
}

fn descriptors(memory: &GuestMemory, copy: AreaCopy) -> Result<(), MemoryError> {
    let gdt = copy.physical + AREA_GDT;
    for (selector, descriptor) in [
        (CODE_CPL0, 0x00af_9b00_0000_ffff),
        (0x18, 0x00cf_9300_0000_ffff),
        (DATA_CPL3, 0x00cf_f300_0000_ffff),
        (CODE_CPL3, 0x00af_fb00_0000_ffff),
    ] {
        memory.write_u64(gdt + (selector & !7), descriptor)?;
    }
    let tss = copy.physical + AREA_TSS;
    let unaligned = |offset: u64, stack: u64| memory.write(tss + offset, &stack.to_le_bytes());
    unaligned(0x04, copy.address + AREA_CPL0_STACK)?;
    unaligned(
        0x24 + 8 * (EXCEPTION_IST - 1),
        copy.address + AREA_EXCEPTION_STACK,
    )?;
    // For the reason given at `AreaCopy::direct`.
    unaligned(0x24 + 8 * (FAULT_IST - 1), copy.direct(AREA_FAULT_STACK))?;
    memory.write(
        tss + 0x66,
        &u16::try_from(TSS_BITMAP).unwrap_or(0).to_le_bytes(),
    )?;
    // Every port is refused at CPL3 but those by which the shim calls the VMM, which checks who calls.
    let mut bitmap = [0xff_u8; (TSS_SIZE - TSS_BITMAP) as usize];
    for port in [
        PORT_HYPERCALL,
        PORT_INVALID_OPCODE,
        PORT_PROTECTION,
        PORT_PANIC,
    ] {
        bitmap[usize::try_from(port / 8).unwrap_or(0)] &= !(1 << (port % 8));
    }
    memory.write(tss + TSS_BITMAP, &bitmap)
}

fn page_tables(memory: &GuestMemory, layout: &Layout, vcpus: u32) -> Result<(), MemoryError> {
    let area = layout.area;
    memory.write_u64(area + AREA_SLOT_L3, (area + AREA_SLOT_L2) | ANY_PAGE)?;
    memory.write_u64(area + AREA_SLOT_L2, (area + AREA_SLOT_L1) | ANY_PAGE)?;
    for page in 0..u64::from(vcpus) * AREA_STRIDE / PAGE {
        let bits = match page * PAGE % AREA_STRIDE {
            AREA_CODE_END.. => continue,
            AREA_SHARED_INFO.. => ANY_PAGE,
            _ => CPL0_PAGE,
        };
        memory.write_u64(area + AREA_SLOT_L1 + page * 8, (area + page * PAGE) | bits)?;
    }
    for (index, address) in (1..).zip((area + AREA_M2P..layout.size).step_by(LARGE as usize)) {
        memory.write_u64(area + AREA_SLOT_L2 + index * 8, address | ANY_LARGE)?;
    }
    for gigabyte in 0..layout.size.div_ceil(1 << 30) {
        let table = area + AREA_DIRECT_L2 + gigabyte * PAGE;
        memory.write_u64(area + AREA_DIRECT_L3 + gigabyte * 8, table | ANY_PAGE)?;
        for index in 0..512 {
            let address = (gigabyte << 30) + index * LARGE;
            if address < layout.size {
                memory.write_u64(table + index * 8, address | ANY_LARGE)?;
            }
        }
    }
    Ok(())
}
