//! A stopped machine as bytes, and what a host must have to run it on.

use anyhow::ensure;
use kvm_bindings::{kvm_cpuid_entry2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xsave};
use serde::{Deserialize, Serialize};

use super::cpuid;
use super::events::Events;
use super::layout::Layout;
use super::time::TIME_INFO;
use crate::machine::blob::Format;
use crate::machine::probe::SyscallPath;

/// Longest blob that is decoded: a state is about 10 KiB, nearly all of it processor state.
const MAX_STATE: usize = 256 << 10;
/// The version is that of [`Saved`], and of the area's layout and the shim's code, which lie in the saved memory.
const FORMAT: Format = Format {
    magic: *b"thaw pv\0",
    version: 1,
    most: MAX_STATE,
    machine: "pv",
};
/// Difference in time stamp counter frequency, in thousandths, that a guest does not notice.
const TSC_TOLERANCE: u32 = 5;

/// What the machine keeps about the guest, besides memory and vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PvState {
    pub events: Events,
    /// When the guest's timer fires, in its time.
    pub deadline: Option<u64>,
    /// Guest-physical address of the copy of the clock's formula that user space reads.
    pub time_area: Option<u64>,
    /// CR4 as the guest wrote it.
    pub cr4: u64,
    /// Stopped until an event comes.
    pub halted: bool,
    /// Guest-physical address of the console's ring page.
    pub console_ring: u64,
    pub syscall: SyscallPath,
}

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
    pub pv: PvState,
    /// Guest time, nanoseconds.
    pub now: u64,
    pub cpuid: Vec<kvm_cpuid_entry2>,
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
    ensure!(
        saved.pv.events.plausible(&layout)
            && saved.pv.time_area.is_none_or(|at| inside(at, TIME_INFO))
            && inside(saved.pv.console_ring, 4096)
            && saved.pv.console_ring.is_multiple_of(4096),
        "the VM's state is damaged: it names memory that the VM does not have"
    );
    Ok((saved, layout))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> Saved {
        let layout = Layout::new(128).unwrap();
        Saved {
            facts: Facts::here(2_000_000),
            memory_mib: 128,
            pv: PvState {
                events: Events::new(&layout),
                deadline: Some(5),
                time_area: None,
                cr4: 0,
                halted: true,
                console_ring: 4096,
                syscall: SyscallPath::Native,
            },
            now: 7,
            cpuid: vec![kvm_cpuid_entry2::default(); 3],
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            events: kvm_vcpu_events::default(),
            xsave: kvm_xsave::default(),
            xcr0: 7,
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
            (back.now, back.pv.deadline, back.cpuid.len()),
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
                assert!(saved.pv.events.vcpu_info < layout.size);
                assert!(saved.pv.console_ring < layout.size);
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
