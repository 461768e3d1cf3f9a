//! Every use of KVM's ioctls, in one place.
//!
//! [`Host`] is the open `/dev/kvm`; [`Vm`] is one virtual machine with one memory slot and its
//! vCPUs, whose registers are read and written through the page shared with KVM
//! (`KVM_CAP_SYNC_REGS`): an ioctl for them costs ten times as much on a software KVM.
//!
//! A [`Vm`] has no interrupt controller: the `pv` machine needs none, and creating one makes
//! set-up and tear-down slower by milliseconds. An [`apic::ApicVm`] has vCPUs with local APICs in
//! KVM, but neither PIC nor I/O APIC there.

pub mod apic;
pub mod cpu;
pub mod kick;
mod registers;
mod vcpu;
pub mod vcpu_state;

use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};

pub use vcpu::{InterruptHandle, Stop, Vcpu};

use crate::memory::GuestMemory;

/// Why KVM could not be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` is missing or not ours to open.
    #[error(
        "/dev/kvm cannot be opened ({0}): load a KVM module (kvm_intel, kvm_amd or kvm_pvm) and let this user read and write /dev/kvm (group kvm)"
    )]
    Open(std::io::Error),
    /// KVM lacks something that thaw needs.
    #[error("this KVM lacks {0}; a newer kernel has it")]
    Lacks(&'static str),
    /// An ioctl failed.
    #[error("{what} failed: {source}")]
    Ioctl {
        /// The ioctl.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

pub(crate) fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Ioctl {
        what,
        source: std::io::Error::from_raw_os_error(error.errno()),
    }
}

/// The host's KVM.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
}

impl Host {
    /// Opens `/dev/kvm` and checks that it can do what every machine needs.
    ///
    /// # Errors
    /// It cannot be opened, or it is too old; the message says what to do.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new()
            .map_err(|error| KvmError::Open(std::io::Error::from_raw_os_error(error.errno())))?;
        if kvm.get_api_version() != 12 {
            return Err(KvmError::Lacks("API version 12"));
        }
        for (capability, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        ] {
            if !kvm.check_extension(capability) {
                return Err(KvmError::Lacks(name));
            }
        }
        if kvm.check_extension_int(Cap::SyncRegs) & 7 != 7 {
            return Err(KvmError::Lacks(
                "KVM_CAP_SYNC_REGS for registers, system registers and events",
            ));
        }
        Ok(Self { kvm })
    }

    /// What KVM says a guest's CPUID may show. Costs 0.4 ms on a software KVM.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))
    }

    /// Makes a VM with one memory slot (guest-physical 0 onwards) and so many vCPUs.
    ///
    /// # Errors
    /// An ioctl fails.
    pub fn create_vm(
        &self,
        memory: Arc<GuestMemory>,
        vcpus: u32,
    ) -> Result<(Vm, Vec<Vcpu>), KvmError> {
        let vm = self.kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        map(&vm, &memory, 0, 0..memory.size())?;
        let vcpus = (0..u64::from(vcpus))
            .map(|index| {
                let fd = vm.create_vcpu(index).map_err(failed("KVM_CREATE_VCPU"))?;
                Ok(Vcpu::new(fd, memory.clone()))
            })
            .collect::<Result<_, KvmError>>()?;
        Ok((Vm { vm, memory }, vcpus))
    }
}

/// Gives a VM part of `memory` at the guest-physical addresses that equal its offsets. The VM's descriptors must not
/// outlive `memory`.
fn map(vm: &VmFd, memory: &GuestMemory, slot: u32, range: Range<u64>) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: range.start,
        memory_size: range.end - range.start,
        userspace_addr: memory.host_address() + range.start,
    };
    if range.start >= range.end || range.end > memory.size() {
        return Err(KvmError::Lacks("memory of that size"));
    }
    // SAFETY: the range lies in the mapping of `memory`, which is kept alive by whoever keeps the VM's descriptors.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
}

/// One virtual machine. Fields are in the order in which they must be dropped.
#[derive(Debug)]
pub struct Vm {
    #[expect(dead_code, reason = "held open until the vCPUs are closed")]
    vm: VmFd,
    memory: Arc<GuestMemory>,
}

impl Vm {
    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }
}
