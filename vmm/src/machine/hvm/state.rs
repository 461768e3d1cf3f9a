//! A stopped `hvm` machine as bytes, and what a host must have to run it on.

use anyhow::ensure;
use serde::{Deserialize, Serialize};

use super::MAX_VCPUS;
use super::devices::SavedDevices;
use super::layout::Layout;
use crate::kvm::vcpu_state::VcpuState;
use crate::machine::blob::Format;

/// Longest blob that is decoded. A vCPU's state is some 15 KiB, most of it extended state, which is up to 11 KiB where
/// there is AMX; eight of them are a tenth of this.
const MAX_STATE: usize = 1 << 20;
/// The version is that of [`Saved`].
const FORMAT: Format = Format {
    magic: *b"thaw hvm",
    version: 1,
    most: MAX_STATE,
    machine: "hvm",
};
/// Most model-specific registers of a vCPU; KVM lists about 400.
const MAX_MSRS: usize = 2048;
/// Rates of the time stamp counter that differ by less, in millionths, need no scaling: what NTP corrects, and the limit
/// that KVM itself uses.
const TSC_TOLERANCE_PPM: u32 = 250;

/// Everything but memory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Saved {
    pub memory_mib: u32,
    pub tsc_khz: u32,
    /// The guest's clock, nanoseconds.
    pub clock: u64,
    pub vcpus: Vec<VcpuState>,
    pub devices: SavedDevices,
}

pub(super) fn encode(saved: &Saved) -> anyhow::Result<Vec<u8>> {
    FORMAT.encode(saved)
}

/// Decodes and checks a blob; whether this host can run it is [`super::cpuid`]'s to say.
pub(super) fn decode(bytes: &[u8]) -> anyhow::Result<(Saved, Layout)> {
    let saved: Saved = FORMAT.decode(bytes)?;
    let layout = Layout::new(saved.memory_mib)?;
    ensure!(
        (1..=MAX_VCPUS as usize).contains(&saved.vcpus.len())
            && saved.vcpus.iter().all(|vcpu| vcpu.msrs.len() <= MAX_MSRS
                && vcpu.cpuid.len() <= kvm_bindings::KVM_MAX_CPUID_ENTRIES),
        "the VM's state is damaged: it has {} vCPUs, or one of them more registers than there are",
        saved.vcpus.len()
    );
    Ok((saved, layout))
}

/// Whether the rate must be scaled, for a guest that counts at `saved` on a host that counts at `here`.
pub(super) fn must_scale(saved: u32, here: u32) -> bool {
    let tolerance = u64::from(saved) * u64::from(TSC_TOLERANCE_PPM) / 1_000_000;
    u64::from(saved.abs_diff(here)) > tolerance
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> Saved {
        let vcpu = VcpuState {
            xsave: vec![0; 1024],
            msrs: vec![(0x10, 5)],
            ..VcpuState::default()
        };
        Saved {
            memory_mib: 128,
            tsc_khz: 2_000_000,
            clock: 7,
            vcpus: vec![vcpu],
            devices: SavedDevices::default(),
        }
    }

    #[test]
    fn what_was_saved_is_restored() {
        let (back, layout) = decode(&encode(&saved()).unwrap()).unwrap();
        assert_eq!((back.clock, back.vcpus.len()), (7, 1));
        assert_eq!(back.vcpus[0].msr(0x10), Some(5));
        assert_eq!(layout, Layout::new(128).unwrap());
    }

    #[test]
    fn damaged_states_are_refused_or_plausible() {
        let bytes = encode(&saved()).unwrap();
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut]).is_err(), "{cut}");
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0xff;
            if let Ok((saved, _)) = decode(&bytes) {
                assert!(saved.vcpus.len() <= MAX_VCPUS as usize);
            }
        }
        assert!(decode(&vec![0; MAX_STATE + 1]).is_err());
    }

    #[test]
    fn close_rates_need_no_scaling() {
        assert!(!must_scale(2_000_000, 2_000_400));
        assert!(must_scale(2_000_000, 2_000_600));
        assert!(must_scale(2_000_000, 0));
    }
}
