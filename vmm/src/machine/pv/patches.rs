//! Text patches that save the guest kernel a trap. All are optional: a kernel in which a
//! pattern is not found runs unpatched, a little slower.
//!
//! * `xen_hypercall_pv` (push rcx, push r11, syscall, ...) becomes a jump into the shim;
//! * `xen_iret` (..., mov $23, eax; syscall) becomes a jump into the shim;
//! * `this_cpu_cmpxchg16b_emu` becomes the instruction it stands in for, which CPL3 has.
//!
//! The jumps go through 14-byte indirect jumps laid over `xen_hypercall_hvm`'s saving
//! trampoline (`__xen_hypercall_setfunc`'s caller), which a PV guest never runs.

use super::layout::*;
use crate::memory::{GuestMemory, MemoryError};

const HYPERCALL: &[u8] = &[0x51, 0x41, 0x53, 0x0f, 0x05, 0x41, 0x5b, 0x59, 0xe9];
const IRET: &[u8] = &[
    0x6a, 0x00, 0x51, 0x41, 0x53, 0x50, 0xb8, 0x17, 0x00, 0x00, 0x00, 0x0f, 0x05,
];
const UNUSED: &[u8] = &[
    0x50, 0x51, 0x52, 0x57, 0x56, 0x41, 0x53, 0x41, 0x52, 0x41, 0x51, 0x41, 0x50, 0xe8,
];
const CMPXCHG16B_EMULATED: &[u8] = &[0x9c, 0xfa, 0x65, 0x48, 0x3b, 0x06];
/// gs: cmpxchg16b (%rsi); sete %al; ret
const CMPXCHG16B: &[u8] = &[0x65, 0x48, 0x0f, 0xc7, 0x0e, 0x0f, 0x94, 0xc0, 0xc3];
/// Length of an indirect jump: jmp *0(%rip), then the address.
const FAR_JUMP: u64 = 14;
/// Most text that is searched: twice what Debian's kernels have.
const MAX_TEXT: u64 = 64 << 20;

/// Patches the kernel's text at these guest-physical addresses. The jumps lead into the first vCPU's copy of the shim, so
/// a kernel that runs on several vCPUs gets none.
pub(super) fn apply(
    memory: &GuestMemory,
    (start, end): (u64, u64),
    vcpus: u32,
) -> Result<(), MemoryError> {
    let mut text = vec![0; usize::try_from((end - start).min(MAX_TEXT)).unwrap_or(0)];
    memory.read(start, &mut text)?;
    let find = |pattern: &[u8]| only(&text, pattern).map(|at| start + at as u64);
    if let Some(at) = find(CMPXCHG16B_EMULATED) {
        memory.write(at, CMPXCHG16B)?;
    }
    let Some(room) = find(UNUSED).filter(|_| vcpus == 1) else {
        return Ok(());
    };
    for (pattern, room, target) in [
        (HYPERCALL, room, SHIM_HYPERCALL),
        (IRET, room + FAR_JUMP, SHIM_IRET),
    ] {
        let Some(at) = find(pattern) else { continue };
        let Ok(distance) = i32::try_from(room.wrapping_sub(at + 5).cast_signed()) else {
            continue;
        };
        memory.write(room, &[0xff, 0x25, 0, 0, 0, 0])?;
        memory.write(room + 6, &(AREA_BASE + target).to_le_bytes())?;
        memory.write(at, &[0xe9])?;
        memory.write(at + 1, &distance.to_le_bytes())?;
    }
    Ok(())
}

/// Where the pattern is, if it is there exactly once.
fn only(text: &[u8], pattern: &[u8]) -> Option<usize> {
    let (first, rest) = pattern.split_first()?;
    let mut found = text
        .iter()
        .enumerate()
        .filter(|&(at, byte)| byte == first && text[at + 1..].starts_with(rest))
        .map(|(at, _)| at);
    let at = found.next()?;
    found.next().is_none().then_some(at)
}
