//! A virtual machine whose vCPUs have local APICs in KVM, and nothing else there.
//!
//! `KVM_CAP_SPLIT_IRQCHIP`: the I/O APIC is the VMM's (a table of what each pin sends), no PIC and
//! no PIT exist. An interrupt is an eventfd that KVM turns into a message to a local APIC, with no
//! way through the VMM's thread and none through a worker of the kernel either, which pins of an
//! I/O APIC in KVM would take.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, MsrList,
    kvm_clock_data, kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{Host, KvmError, Vcpu, failed, map};
use crate::memory::GuestMemory;

/// First address that is no memory: I/O APIC and local APICs live above it, below 4 GiB.
pub const HOLE: u64 = 3 << 30;
/// Where memory goes on.
pub const HIGH: u64 = 4 << 30;
/// Pins that the VMM's I/O APIC has, for which KVM reserves routes.
pub const PINS: u32 = 24;
/// Three pages that VMX uses to run real mode on processors that cannot; nothing else may be there.
const TSS: usize = 0xfffb_d000;

/// A message to a local APIC, as Intel's manual (SDM 3A, 11.11) lays it out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Whom it reaches.
    pub address: u32,
    /// What it does there.
    pub data: u32,
}

/// A VM, without its vCPUs. Fields are in the order in which they must be dropped.
#[derive(Debug)]
pub struct ApicVm {
    vm: VmFd,
    memory: Arc<GuestMemory>,
}

impl Host {
    /// Makes a VM with memory from guest-physical 0 onwards (all but [`HOLE`] to [`HIGH`]) and `vcpus` vCPUs.
    ///
    /// Memory comes before the interrupt controller: after it, each slot waits for readers of KVM's bus lists.
    ///
    /// # Errors
    /// An ioctl fails, or KVM lacks what this needs.
    pub fn create_apic_vm(
        &self,
        memory: Arc<GuestMemory>,
        vcpus: u32,
    ) -> Result<(ApicVm, Vec<Vcpu>), KvmError> {
        if let Some(lacking) = self.lacks_for_apic_vms() {
            return Err(KvmError::Lacks(lacking));
        }
        let vm = self.kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        map(&vm, &memory, 0, 0..memory.size().min(HOLE))?;
        if memory.size() > HIGH {
            map(&vm, &memory, 1, HIGH..memory.size())?;
        }
        vm.set_tss_address(TSS)
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        enable(&vm, KVM_CAP_SPLIT_IRQCHIP, u64::from(PINS))?;
        // An exception that is pending keeps what it will put into CR2 or DR6 to itself until it is delivered, so it can be saved.
        enable(&vm, KVM_CAP_EXCEPTION_PAYLOAD, 1)?;
        let vcpus = (0..u64::from(vcpus))
            .map(|id| {
                let fd = vm.create_vcpu(id).map_err(failed("KVM_CREATE_VCPU"))?;
                Ok(Vcpu::new(fd, memory.clone()))
            })
            .collect::<Result<_, KvmError>>()?;
        Ok((ApicVm { vm, memory }, vcpus))
    }

    /// What this KVM lacks for such VMs, if anything.
    #[must_use]
    pub fn lacks_for_apic_vms(&self) -> Option<&'static str> {
        [
            (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
            (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
            (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
            (Cap::Irqfd, "KVM_CAP_IRQFD"),
        ]
        .into_iter()
        .find(|&(capability, _)| !self.kvm.check_extension(capability))
        .map(|(_, name)| name)
    }

    /// The model-specific registers that KVM keeps for a guest.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn msr_list(&self) -> Result<MsrList, KvmError> {
        self.kvm
            .get_msr_index_list()
            .map_err(failed("KVM_GET_MSR_INDEX_LIST"))
    }

    /// Bytes of a vCPU's extended state, as `KVM_GET_XSAVE2` gives it.
    #[must_use]
    pub fn xsave_bytes(&self) -> usize {
        let bytes = self.kvm.check_extension_int(Cap::Xsave2);
        usize::try_from(bytes).unwrap_or(0).max(4096)
    }

    /// Whether a guest's time stamp counter may run at another rate than the host's.
    #[must_use]
    pub fn scales_tsc(&self) -> bool {
        self.kvm.check_extension(Cap::TscControl)
    }
}

fn enable(vm: &VmFd, capability: u32, argument: u64) -> Result<(), KvmError> {
    let mut request = kvm_enable_cap {
        cap: capability,
        ..Default::default()
    };
    request.args[0] = argument;
    vm.enable_cap(&request).map_err(failed("KVM_ENABLE_CAP"))
}

impl ApicVm {
    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Makes every write to `event` send what pin `pin` is routed to.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn connect(&self, event: &EventFd, pin: u32) -> Result<(), KvmError> {
        self.vm
            .register_irqfd(event, pin)
            .map_err(failed("KVM_IRQFD"))
    }

    /// Says what pins send; those that are not named send nothing.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn route(&self, pins: &[(u32, Message)]) -> Result<(), KvmError> {
        let entries: Vec<kvm_irq_routing_entry> = pins
            .iter()
            .map(|&(gsi, message)| {
                let mut entry = kvm_irq_routing_entry {
                    gsi,
                    type_: KVM_IRQ_ROUTING_MSI,
                    ..Default::default()
                };
                entry.u.msi = kvm_irq_routing_msi {
                    address_lo: message.address,
                    data: message.data,
                    ..Default::default()
                };
                entry
            })
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| KvmError::Lacks("room for that many interrupt routes"))?;
        self.vm
            .set_gsi_routing(&routing)
            .map_err(failed("KVM_SET_GSI_ROUTING"))
    }

    /// Sends a message to local APICs; gives how many took it.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn send(&self, message: Message) -> Result<u32, KvmError> {
        let request = kvm_msi {
            address_lo: message.address,
            data: message.data,
            ..Default::default()
        };
        self.vm
            .signal_msi(request)
            .map(|taken| u32::try_from(taken).unwrap_or(0))
            .map_err(failed("KVM_SIGNAL_MSI"))
    }

    /// The guest's clock: nanoseconds since it booted.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn clock(&self) -> Result<u64, KvmError> {
        let clock = self.vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?;
        Ok(clock.clock)
    }

    /// Sets the guest's clock. No vCPU may have run yet: time must not jump under a guest that has read it.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn set_clock(&self, nanoseconds: u64) -> Result<(), KvmError> {
        let clock = kvm_clock_data {
            clock: nanoseconds,
            ..Default::default()
        };
        self.vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }
}
