//! All that KVM keeps about a vCPU, taken and given back in the order that loses nothing.
//!
//! The ioctls are not independent: some act on what others set, and some getters change what
//! others would have read. [`TAKE`] and [`GIVE`] are the orders; the tests swap each pair that a
//! reason is given for and see something lost.

use kvm_bindings::{
    CpuId, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use super::{KvmError, Vcpu, cpu, failed};

/// The time stamp counter (SDM 4, `IA32_TIME_STAMP_COUNTER`).
pub const MSR_TSC: u32 = 0x10;
/// When the local APIC's timer fires (SDM 4, `IA32_TSC_DEADLINE`).
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Registers on KVM's list that no guest of ours can have used, so they are not kept: Hyper-V's, which its CPUID does
/// not offer, and those that describe VMX to a nested hypervisor, likewise.
const NOT_KEPT: [std::ops::RangeInclusive<u32>; 2] = [0x4000_0000..=0x4000_01ff, 0x480..=0x493];

/// Most registers that are read or written by one ioctl (`MAX_IO_MSRS` of KVM is 256).
const BATCH: usize = 128;

/// Offset of the timer's entry in the local APIC's page, and the mode bits in it: 2 is TSC-deadline.
const LVT_TIMER: usize = 0x320;

/// One vCPU, stopped.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct VcpuState {
    /// Running, halted, waiting for its start.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
    /// Extended state: the 1024 words of the legacy area and header, then what exceeds them.
    pub xsave: Vec<u32>,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// The local APIC's page.
    pub lapic: kvm_lapic_state,
    /// What CPUID shows.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Model-specific registers.
    pub msrs: Vec<(u32, u64)>,
    /// Exceptions and interrupts in flight.
    pub events: kvm_vcpu_events,
}

/// Model-specific registers: numbers and values.
type Registers = Vec<(u32, u64)>;

/// One part of a vCPU's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    MpState,
    Regs,
    Sregs,
    Xsave,
    Xcrs,
    DebugRegs,
    Lapic,
    Cpuid,
    Msrs,
    Deadline,
    Events,
}

/// The order of taking.
///
/// `MpState` is first: asking for it makes KVM act on an INIT or a SIPI that waits, which changes
/// registers. `Events` is last, after every getter that may act on one.
const TAKE: [Part; 10] = [
    Part::MpState,
    Part::Regs,
    Part::Sregs,
    Part::Xsave,
    Part::Xcrs,
    Part::DebugRegs,
    Part::Lapic,
    Part::Cpuid,
    Part::Msrs,
    Part::Events,
];

/// The order of giving back.
///
/// * `Cpuid` is first: it decides which extended state and which modes of the APIC's timer exist.
/// * `Sregs` come before `Lapic`: they hold the APIC's base and mode; a change of mode alters the APIC's page.
/// * `Lapic` comes before `Deadline`: a deadline is ignored unless the timer is in the mode for it.
/// * `Msrs`, with the time stamp counter, come before `Deadline`: the host's timer is armed for the time that is left by the counter.
/// * `Regs` come before `Events`: setting registers drops a pending exception.
const GIVE: [Part; 11] = [
    Part::Cpuid,
    Part::MpState,
    Part::Regs,
    Part::Sregs,
    Part::Xsave,
    Part::Xcrs,
    Part::DebugRegs,
    Part::Lapic,
    Part::Msrs,
    Part::Deadline,
    Part::Events,
];

impl VcpuState {
    /// Takes the state of a vCPU that is settled. `msrs` is KVM's own list; `xsave_bytes` the size that KVM gives.
    ///
    /// # Errors
    /// An ioctl fails.
    pub fn take(vcpu: &Vcpu, msrs: &[u32], xsave_bytes: usize) -> Result<Self, KvmError> {
        Self::take_in(&TAKE, vcpu, msrs, xsave_bytes)
    }

    fn take_in(
        order: &[Part],
        vcpu: &Vcpu,
        msrs: &[u32],
        xsave_bytes: usize,
    ) -> Result<Self, KvmError> {
        let fd = &vcpu.fd;
        let mut state = Self::default();
        for part in order {
            match part {
                Part::MpState => {
                    state.mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
                }
                Part::Regs => state.regs = fd.get_regs().map_err(failed("KVM_GET_REGS"))?,
                Part::Sregs => state.sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
                Part::Xsave => state.xsave = take_xsave(vcpu, xsave_bytes)?,
                Part::Xcrs => state.xcrs = fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
                Part::DebugRegs => state.debug_regs = vcpu.debug_regs()?,
                Part::Lapic => state.lapic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
                Part::Cpuid => {
                    let cpuid = fd
                        .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
                        .map_err(failed("KVM_GET_CPUID2"))?;
                    state.cpuid = cpuid.as_slice().to_vec();
                }
                Part::Msrs | Part::Deadline => state.msrs = take_msrs(vcpu, msrs)?,
                Part::Events => {
                    state.events = fd
                        .get_vcpu_events()
                        .map_err(failed("KVM_GET_VCPU_EVENTS"))?;
                }
            }
        }
        state.revive_deadline();
        Ok(state)
    }

    /// A timer that fired while the guest was being stopped has no deadline any more, and its
    /// interrupt is not in the state yet. It gets one that is due at once: an interrupt too many
    /// does no harm, one too few hangs the guest.
    fn revive_deadline(&mut self) {
        let Some(entry) = self.lapic.regs.get(LVT_TIMER..LVT_TIMER + 4) else {
            return;
        };
        let masked = entry[2] & 1 != 0;
        let deadline_mode = entry[2] >> 1 & 3 == 2;
        let tsc = self.msr(MSR_TSC).unwrap_or(1);
        for (index, value) in &mut self.msrs {
            if *index == MSR_TSC_DEADLINE && *value == 0 && deadline_mode && !masked {
                tracing::debug!("a timer's deadline was zero: it fires at once after a restore");
                *value = tsc;
            }
        }
    }

    /// The value of a model-specific register, if it was kept.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        let found = self.msrs.iter().find(|(number, _)| *number == index)?;
        Some(found.1)
    }

    /// Gives it back to a vCPU, which then is as the other one was. `xsave_bytes` as for [`Self::take`].
    ///
    /// # Errors
    /// An ioctl fails, KVM refuses a register, or the extended state has not the size that it has here.
    pub fn give(&self, vcpu: &mut Vcpu, xsave_bytes: usize) -> Result<(), KvmError> {
        self.give_in(&GIVE, vcpu, xsave_bytes)?;
        vcpu.fetch()
    }

    fn give_in(&self, order: &[Part], vcpu: &mut Vcpu, xsave_bytes: usize) -> Result<(), KvmError> {
        for part in order {
            let fd = &vcpu.fd;
            match part {
                Part::Cpuid => {
                    let cpuid = CpuId::from_entries(&self.cpuid)
                        .map_err(|_| KvmError::Lacks("room for that many CPUID leaves"))?;
                    vcpu.set_cpuid(&cpuid)?;
                }
                Part::MpState => fd
                    .set_mp_state(self.mp_state)
                    .map_err(failed("KVM_SET_MP_STATE"))?,
                Part::Regs => fd.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?,
                Part::Sregs => {
                    let sregs = with_task_register_of_host(self.sregs);
                    fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
                }
                Part::Xsave => give_xsave(vcpu, &self.xsave, xsave_bytes)?,
                Part::Xcrs => fd.set_xcrs(&self.xcrs).map_err(failed("KVM_SET_XCRS"))?,
                Part::DebugRegs => vcpu.set_debug_regs(&self.debug_regs)?,
                Part::Lapic => fd.set_lapic(&self.lapic).map_err(failed("KVM_SET_LAPIC"))?,
                Part::Msrs => {
                    let (early, _) = self.split_msrs();
                    for batch in early.chunks(BATCH) {
                        vcpu.set_msrs(batch)?;
                    }
                }
                Part::Deadline => vcpu.set_msrs(&self.split_msrs().1)?,
                Part::Events => fd
                    .set_vcpu_events(&self.events)
                    .map_err(failed("KVM_SET_VCPU_EVENTS"))?,
            }
        }
        Ok(())
    }

    /// The registers, and the deadline alone.
    fn split_msrs(&self) -> (Registers, Registers) {
        self.msrs
            .iter()
            .partition(|(index, _)| *index != MSR_TSC_DEADLINE)
    }
}

/// SVM keeps the task register's segment as "available" where VMX keeps it "busy". KVM shows both as busy, and a
/// processor that holds to the letter (QEMU's) then takes it for none at all: every port is forbidden to
/// processes, whatever their bitmap says.
fn with_task_register_of_host(mut sregs: kvm_sregs) -> kvm_sregs {
    const BUSY: u8 = 2;
    if cpu::is_amd() {
        sregs.tr.type_ &= !BUSY;
    }
    sregs
}

/// Reads what can be read: a register on KVM's list that it refuses to read is none that this vCPU has.
fn take_msrs(vcpu: &Vcpu, list: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let wanted: Vec<u32> = list
        .iter()
        .copied()
        .filter(|index| !NOT_KEPT.iter().any(|range| range.contains(index)))
        .collect();
    let mut read = Vec::with_capacity(wanted.len());
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let values = vcpu.msrs(batch)?;
        let skipped = usize::from(values.len() < batch.len());
        if let Some(index) = batch.get(values.len()) {
            tracing::debug!("KVM lists model-specific register {index:#x} but does not read it");
        }
        rest = &rest[values.len() + skipped..];
        read.extend(values);
    }
    Ok(read)
}

fn take_xsave(vcpu: &Vcpu, bytes: usize) -> Result<Vec<u32>, KvmError> {
    let extra = (bytes / 4).saturating_sub(1024);
    if extra == 0 {
        return Ok(vcpu.xsave()?.region.to_vec());
    }
    let mut area =
        Xsave::new(extra).map_err(|_| KvmError::Lacks("extended state of a sane size"))?;
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 names.
    unsafe { vcpu.fd.get_xsave2(&mut area) }.map_err(failed("KVM_GET_XSAVE2"))?;
    let legacy = &area.as_fam_struct_ref().xsave.region;
    Ok([legacy, area.as_slice()].concat())
}

fn give_xsave(vcpu: &Vcpu, words: &[u32], bytes: usize) -> Result<(), KvmError> {
    let (Some((legacy, extra)), true) = (
        words.split_first_chunk::<1024>(),
        words.len() == bytes.div_ceil(4),
    ) else {
        return Err(KvmError::Lacks(
            "extended processor state of the size that the VM was saved with",
        ));
    };
    if extra.is_empty() {
        let area = kvm_bindings::kvm_xsave {
            region: *legacy,
            ..Default::default()
        };
        return vcpu.set_xsave(&area);
    }
    let mut area =
        Xsave::from_entries(extra).map_err(|_| KvmError::Lacks("extended state of a sane size"))?;
    // SAFETY: the length of the flexible array is left alone.
    unsafe { area.as_mut_fam_struct() }.xsave.region = *legacy;
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 names: checked above.
    unsafe { vcpu.fd.set_xsave2(&area) }.map_err(failed("KVM_SET_XSAVE2"))
}

#[cfg(test)]
mod tests;
