//! What the guest kernel sees of the processor.
//!
//! KVM's own list of supported features hides XSAVE, AVX and POPCNT on a software KVM, although code at
//! CPL3 has them; so the kernel gets the host's CPUID, less what does not exist at CPL3 or is
//! the host's business. (Processes execute CPUID themselves and see the host's.)

use sha2::{Digest, Sha256};

use super::layout::XEN_INTERFACE;
use crate::kvm::cpu;

/// Extended state that a guest may use: x87, SSE, AVX, AVX-512. Not PKU (nothing may be execute-only for
/// the shim) nor AMX (needs a permission of the kernel).
const XCR0_ALLOWED: u64 = 0xe7;

/// `features`, without those bits.
const fn without(bits: &[u32]) -> u32 {
    let mut mask = !0;
    let mut index = 0;
    while index < bits.len() {
        mask &= !(1 << bits[index]);
        index += 1;
    }
    mask
}

/// DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, xTPR, PDCM, PCID, DCA, x2APIC, TSC deadline.
const LEAF1_ECX: u32 = without(&[2, 3, 4, 5, 6, 7, 8, 14, 15, 17, 18, 21, 24]);
/// VME, DE, PSE, MCE, SEP, MTRR, PGE, MCA, PSE-36, DS, ACPI, HTT, TM, PBE.
const LEAF1_EDX: u32 = without(&[1, 2, 3, 7, 11, 12, 13, 14, 17, 21, 22, 28, 29, 31]);
const LEAF1_ECX_ADDED: u32 = 1 << 27 | 1 << 31;
/// FSGSBASE (hiding it keeps the kernel from reading an MSR at every task switch; processes are told by AT_HWCAP2
/// that they cannot use it), TSC_ADJUST, SGX, SMEP, INVPCID, RDT, RDT-A, SMAP, PT, (CET follows in ecx).
const LEAF7_EBX: u32 = without(&[0, 1, 2, 7, 10, 12, 15, 20, 25]);
/// UMIP, PKU, OSPKE, WAITPKG, CET-SS, LA57, RDPID is kept, bus lock, ENQCMD.
const LEAF7_ECX: u32 = without(&[2, 3, 4, 5, 7, 16, 24, 29]);
/// FSRM only: no speculation controls, no hybrid, no AMX, no CET-IBT.
const LEAF7_EDX: u32 = 1 << 4;
/// LAHF, ABM, SSE4A, misaligned SSE, 3DNow prefetch, XOP, FMA4.
const EXTENDED_ECX: u32 = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 16;
const EXTENDED_EDX: u32 = without(&[1, 2, 3, 7, 12, 13, 14, 17, 25, 26, 27, 30, 31]);

/// Leaves where a Xen guest looks for its hypervisor.
const XEN_FIRST: u32 = 0x4000_0000;
const XEN_LAST: u32 = 0x4000_00ff;

/// Extended state that guests get on this host.
pub(super) fn xcr0() -> u64 {
    let [low, _, _, high] = cpu::cpuid(0xd, 0);
    (u64::from(high) << 32 | u64::from(low)) & XCR0_ALLOWED
}

/// CPUID as the guest kernel gets it: eax, ebx, ecx, edx.
pub(super) fn for_kernel(leaf: u32, subleaf: u32, xcr0: u64, vcpu: u32) -> [u32; 4] {
    if (XEN_FIRST..=XEN_LAST).contains(&leaf) {
        return match leaf - XEN_FIRST {
            0 => [
                XEN_FIRST + 2,
                u32::from_le_bytes(*b"XenV"),
                u32::from_le_bytes(*b"MMXe"),
                u32::from_le_bytes(*b"nVMM"),
            ],
            1 => [XEN_INTERFACE as u32, 0, 0, 0],
            _ => [0; 4],
        };
    }
    let [eax, ebx, ecx, edx] = cpu::cpuid(leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) => [
            eax,
            // One logical processor per package, and the number of its APIC.
            ebx & 0xff00 | 1 << 16 | vcpu << 24,
            ecx & LEAF1_ECX | LEAF1_ECX_ADDED,
            edx & LEAF1_EDX,
        ],
        (7, 0) => [eax, ebx & LEAF7_EBX, ecx & LEAF7_ECX, edx & LEAF7_EDX],
        (0xd, 0) => [xcr0 as u32, xsave_size(xcr0), xsave_size(xcr0), 0],
        (0xd, 1) => [eax & 1, 0, 0, 0],
        (0xd, 2..=62) if xcr0 >> subleaf & 1 == 1 => [eax, ebx, ecx, edx],
        (4 | 5 | 6 | 0xa | 0xb | 0xd | 0x14 | 0x1f, _) => [0; 4],
        (0x8000_0001, _) => [eax, ebx, ecx & EXTENDED_ECX, edx & EXTENDED_EDX],
        (0x8000_0008, _) => [eax, ebx & 1, 0, edx],
        (0x8000_000a | 0x8000_001a..=0x8000_0026, _) => [0; 4],
        _ => [eax, ebx, ecx, edx],
    }
}

/// Bytes of an uncompacted XSAVE area with these components.
fn xsave_size(xcr0: u64) -> u32 {
    let components = (2..63).filter(|component| xcr0 >> component & 1 == 1);
    components
        .map(|component| cpu::cpuid(0xd, component))
        .map(|[size, offset, ..]| offset + size)
        .max()
        .unwrap_or(0)
        .max(576)
}

/// A digest of what a running guest relies on: it may move to hosts with the same one alone.
pub(super) fn digest() -> String {
    let mut hash = Sha256::new();
    for (leaf, subleaf) in [
        (0, 0),
        (1, 0),
        (7, 0),
        (0xd, 1),
        (0x8000_0001, 0),
        (0x8000_0008, 0),
    ] {
        // Leaf 1's ebx names the processor one happens to run on.
        let [eax, ebx, ecx, edx] = for_kernel(leaf, subleaf, xcr0(), 0);
        for word in [eax, ebx, ecx, edx] {
            hash.update(word.to_le_bytes());
        }
    }
    hex::encode(hash.finalize())
}
