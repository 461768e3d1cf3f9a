//! Instructions that ask the host's processor.

use std::arch::x86_64::{__cpuid_count, _rdtsc};

/// The time stamp counter.
#[must_use]
pub fn tsc() -> u64 {
    // SAFETY: RDTSC is permitted to processes on every Linux host.
    unsafe { _rdtsc() }
}

/// CPUID: eax, ebx, ecx, edx.
#[must_use]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let result = __cpuid_count(leaf, subleaf);
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// Whether this host's processor has SVM's notion of virtualization rather than VMX's: AMD's, or Hygon's after it.
#[must_use]
pub fn is_amd() -> bool {
    let [_, ebx, ecx, edx] = cpuid(0, 0);
    let vendor = [ebx, edx, ecx].map(u32::to_le_bytes);
    [b"AuthenticAMD", b"HygonGenuine"]
        .contains(&vendor.as_flattened().try_into().unwrap_or(&[0; 12]))
}
