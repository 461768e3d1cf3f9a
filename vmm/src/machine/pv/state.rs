//! A stopped machine as bytes, and what a host must have to run it on.

use anyhow::ensure;
use kvm_bindings::{kvm_cpuid_entry2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xsave};
use serde::{Deserialize, Serialize};

use super::cpu::Own;
use super::cpuid;
use super::events::{Events, VcpuInfo};
use super::layout::{Layout, MAX_VCPUS};
use super::time::TIME_INFO;
use crate::machine::blob::Format;
use crate::machine::probe::SyscallPath;

/// Longest blob that is decoded: a state is about 10 KiB, nearly all of it processor state.
const MAX_STATE: usize = 256 << 10;
/// The version is that of [`Saved`], and of the area's layout and the shim's code, which lie in the saved memory.
const FORMAT: Format = Format {
    magic: *b"thaw pv\0",
    version: 2,
    most: MAX_STATE,
    machine: "pv",
};
/// Difference in time stamp counter frequency, in thousandths, that a guest does not notice.
const TSC_TOLERANCE: u32 = 5;

/// What the processor must have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    pub cpu: String,
    pub xcr0: u64,
    pub tsc_khz: u32,
}

/// Everything but memory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Saved {
    pub facts: Facts,
    pub memory_mib: u32,
    pub syscall: SyscallPath,
    pub events: Events,
    /// Guest-physical address of the console's ring page.
    pub console_ring: u64,
    /// Guest time, nanoseconds.
    pub now: u64,
    pub cpuid: Vec<kvm_cpuid_entry2>,
    pub cpus: Vec<SavedCpu>,
}

/// One vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedCpu {
    /// Guest-physical address of its `vcpu_info`.
    pub info: u64,
    /// The guest has switched it on.
    pub up: bool,
    /// The guest has said how it is to start.
    pub initialised: bool,
    pub own: Own,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub events: kvm_vcpu_events,
    pub xsave: kvm_xsave,
    pub xcr0: u64,
}

impl Facts {
    /// Of this host.
    pub(super) fn here(tsc_khz: u32) -> Self {
        Self {
            cpu: cpuid::digest(),
            xcr0: cpuid::xcr0(),
            tsc_khz,
        }
    }

    fn check(&self, here: &Self) -> anyhow::Result<()> {
        ensure!(
            self.xcr0 & !here.xcr0 == 0,
            "the VM was saved where processors have extended state {:#x}, this host has {:#x}: it lacks instructions that the VM's programs may be using",
            self.xcr0,
            here.xcr0
        );
        ensure!(
            self.cpu == here.cpu,
            "the VM was saved on another kind of processor: build the template on this host"
        );
        Ok(())
    }

    /// Whether time stamps count here as they did where the VM was saved.
    pub(super) fn check_tsc(&self, here: u32) -> anyhow::Result<()> {
        let tolerance = self.tsc_khz / 1000 * TSC_TOLERANCE;
        ensure!(
            self.tsc_khz.abs_diff(here) <= tolerance,
            "the VM was saved where time stamps count at {} kHz, here they count at {here} kHz",
            self.tsc_khz,
        );
        Ok(())
    }
}

pub(super) fn encode(saved: &Saved) -> anyhow::Result<Vec<u8>> {
    FORMAT.encode(saved)
}

/// Decodes and checks a blob; whatever is in it, the result is one that this host can run.
pub(super) fn decode(
    bytes: &[u8],
    here: impl FnOnce() -> Facts,
) -> anyhow::Result<(Saved, Layout)> {
    let saved: Saved = FORMAT.decode(bytes)?;
    saved.facts.check(&here())?;
    let layout = Layout::new(saved.memory_mib)?;
    let inside = |address: u64, length: u64| address <= layout.size - length;
    let vcpus = u32::try_from(saved.cpus.len()).unwrap_or(u32::MAX);
    ensure!(
        (1..=MAX_VCPUS).contains(&vcpus),
        "the VM's state is damaged: it has {vcpus} vCPUs"
    );
    let sound = |cpu: &SavedCpu| {
        VcpuInfo(cpu.info).plausible(&layout)
            && cpu.own.time_area.is_none_or(|at| inside(at, TIME_INFO))
    };
    ensure!(
        saved.events.plausible(&layout, vcpus)
            && saved.cpus.iter().all(sound)
            && inside(saved.console_ring, 4096)
            && saved.console_ring.is_multiple_of(4096),
        "the VM's state is damaged: it names memory that the VM does not have"
    );
    Ok((saved, layout))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::pv::cpu::Wait;

    fn saved() -> Saved {
        let layout = Layout::new(128).unwrap();
        let cpu = || SavedCpu {
            info: VcpuInfo::first(&layout, 0).0,
            up: true,
            initialised: true,
            own: Own {
                deadline: Some(5),
                time_area: None,
                cr4: 0,
                wait: Wait::Event,
            },
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            events: kvm_vcpu_events::default(),
            xsave: kvm_xsave::default(),
            xcr0: 7,
        };
        Saved {
            facts: Facts::here(2_000_000),
            memory_mib: 128,
            syscall: SyscallPath::Native,
            events: Events::new(&layout),
            console_ring: 4096,
            now: 7,
            cpuid: vec![kvm_cpuid_entry2::default(); 3],
            cpus: vec![cpu(), cpu()],
        }
    }

    fn decoded(bytes: &[u8]) -> anyhow::Result<(Saved, Layout)> {
        decode(bytes, || Facts::here(0))
    }

    #[test]
    fn what_was_saved_is_restored() {
        let bytes = encode(&saved()).unwrap();
        let (back, layout) = decoded(&bytes).unwrap();
        assert_eq!(
            (back.now, back.cpus[1].own.deadline, back.cpuid.len()),
            (7, Some(5), 3)
        );
        assert_eq!(layout, Layout::new(128).unwrap());
    }

    #[test]
    fn damaged_states_are_refused_or_plausible() {
        let bytes = encode(&saved()).unwrap();
        for cut in 0..bytes.len() {
            assert!(decoded(&bytes[..cut]).is_err(), "{cut}");
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0xff;
            // Whatever is accepted names memory that the VM has.
            if let Ok((saved, layout)) = decoded(&bytes) {
                assert!(saved.cpus.iter().all(|cpu| cpu.info < layout.size));
                assert!(saved.console_ring < layout.size);
            }
        }
        assert!(decoded(&vec![0; MAX_STATE + 1]).is_err());
    }

    #[test]
    fn an_unfit_host_is_refused_with_the_reason() {
        let mut state = saved();
        state.facts.xcr0 |= 1 << 60;
        let error = decoded(&encode(&state).unwrap()).unwrap_err().to_string();
        assert!(error.contains("extended state"), "{error}");
        let mut state = saved();
        state.facts.cpu = "another".to_owned();
        let error = decoded(&encode(&state).unwrap()).unwrap_err().to_string();
        assert!(error.contains("another kind of processor"), "{error}");
        assert!(saved().facts.check_tsc(2_000_100).is_ok());
        assert!(saved().facts.check_tsc(2_100_000).is_err());
    }
}
