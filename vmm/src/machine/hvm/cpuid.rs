//! What CPUID shows to an `hvm` guest: what KVM supports, less what a VM that moves, sleeps and forks should not lean on.

use anyhow::bail;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaves whose words are sets of features, with the register they are in (0: eax to 3: edx): what a host must have
/// all of.
const FEATURES: [(u32, u32, usize); 10] = [
    (1, 0, 2),
    (1, 0, 3),
    (7, 0, 1),
    (7, 0, 2),
    (7, 0, 3),
    (7, 1, 0),
    (0xd, 0, 0),
    (0xd, 1, 0),
    (0x8000_0001, 0, 2),
    (0x8000_0001, 0, 3),
];

/// VMX: no VMs within.
const LEAF1_ECX_HIDDEN: u32 = 1 << 5;
/// TSC deadline, which KVM's local APIC has although its list does not say so, and "there is a hypervisor".
const LEAF1_ECX_ADDED: u32 = 1 << 24 | 1 << 31;
/// The local APIC's timer goes on in idle states.
const LEAF6_EAX: u32 = 1 << 2;
/// SVM, and the topology leaf that describes the host's processor.
const EXTENDED_ECX_HIDDEN: u32 = 1 << 2 | 1 << 22;
/// KVM's asynchronous page faults, in each of their forms: the guest would put a task to sleep and run the next one
/// while the host reads a page, but the host reads none from a disk on purpose.
const KVM_HIDDEN: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// CPUID of one vCPU out of `vcpus`, from what KVM supports.
pub(super) fn of_vcpu(supported: &CpuId, vcpu: u32, vcpus: u32) -> Vec<kvm_cpuid_entry2> {
    let mut leaves = supported.as_slice().to_vec();
    for leaf in &mut leaves {
        match (leaf.function, leaf.index) {
            (1, _) => {
                leaf.ebx = leaf.ebx & 0xffff | vcpus << 16 | vcpu << 24;
                leaf.ecx = leaf.ecx & !LEAF1_ECX_HIDDEN | LEAF1_ECX_ADDED;
                leaf.edx = with_bit(leaf.edx, 28, vcpus > 1);
            }
            // Caches: shared by no vCPUs.
            (4, _) => leaf.eax = leaf.eax & 0x3fff | (vcpus - 1) << 26,
            (6, _) => [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = [LEAF6_EAX, 0, 0, 0],
            // No performance counters.
            (0xa, _) => [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = [0; 4],
            (0xb | 0x1f, level) => {
                let bits = u32::BITS - (vcpus - 1).leading_zeros();
                [leaf.eax, leaf.ebx, leaf.ecx] = match level {
                    0 => [0, 1, 0x100],
                    1 => [bits, vcpus, 0x201],
                    other => [0, 0, other],
                };
                leaf.edx = vcpu;
            }
            (0x4000_0001, _) => leaf.eax &= !KVM_HIDDEN,
            (0x8000_0001, _) => leaf.ecx &= !EXTENDED_ECX_HIDDEN,
            (0x8000_0008, _) => leaf.ecx = vcpus - 1,
            // SVM's own features; the host's caches and topology; memory encryption.
            (0x8000_000a | 0x8000_001d | 0x8000_001e | 0x8000_001f, _) => {
                [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = [0; 4];
            }
            _ => {}
        }
    }
    leaves
}

fn with_bit(word: u32, bit: u32, set: bool) -> u32 {
    word & !(1 << bit) | u32::from(set) << bit
}

/// Whether a guest that was shown `saved` can go on where a new one would be shown `here`.
///
/// # Errors
/// What is missing.
pub(super) fn check(saved: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> anyhow::Result<()> {
    let find = |leaves: &[kvm_cpuid_entry2], function, index| {
        leaves
            .iter()
            .find(|leaf| leaf.function == function && leaf.index == index)
            .copied()
            .unwrap_or_default()
    };
    let vendor = |leaves: &[kvm_cpuid_entry2]| {
        let leaf = find(leaves, 0, 0);
        let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
        String::from_utf8_lossy(name.as_flattened()).into_owned()
    };
    if vendor(saved) != vendor(here) {
        bail!(
            "the VM was saved on a processor by {:?}, this host's is by {:?}: build the template on this host",
            vendor(saved),
            vendor(here)
        );
    }
    for (function, index, register) in FEATURES {
        let word = |leaves: &[kvm_cpuid_entry2]| {
            let leaf = find(leaves, function, index);
            [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx][register]
        };
        // Whether there is more than one vCPU, and whether the kernel has turned XSAVE on, are no features of a host.
        let ignored = match (function, register) {
            (1, 2) => 1 << 27,
            (1, 3) => 1 << 28,
            (7, 2) => 1 << 4,
            _ => 0,
        };
        let missing = word(saved) & !word(here) & !ignored;
        if missing != 0 {
            bail!(
                "the VM was saved where processors have features that this host lacks (CPUID leaf {function:#x}, {}: bits {missing:#x}): build the template on this host",
                ["eax", "ebx", "ecx", "edx"][register]
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Host;

    #[test]
    fn vcpus_know_their_number_and_a_host_lacks_nothing_of_its_own() {
        let supported = Host::open().unwrap().supported_cpuid().unwrap();
        let leaves = of_vcpu(&supported, 3, 4);
        let first = leaves.iter().find(|leaf| leaf.function == 1).unwrap();
        assert_eq!(first.ebx >> 24, 3);
        assert_eq!(first.ecx & LEAF1_ECX_ADDED, LEAF1_ECX_ADDED);
        check(&leaves, &of_vcpu(&supported, 0, 1)).unwrap();
    }

    #[test]
    fn a_lesser_or_foreign_host_is_refused_with_the_reason() {
        let supported = Host::open().unwrap().supported_cpuid().unwrap();
        let here = of_vcpu(&supported, 0, 1);
        let mut saved = here.clone();
        let leaf = saved.iter_mut().find(|leaf| leaf.function == 1).unwrap();
        leaf.ecx |= 1 << 2 | 1 << 5;
        let error = check(&saved, &here).unwrap_err().to_string();
        assert!(error.contains("leaf 0x1, ecx: bits 0x24"), "{error}");
        saved[0].ebx ^= 1;
        let error = check(&saved, &here).unwrap_err().to_string();
        assert!(error.contains("a processor by"), "{error}");
    }
}
