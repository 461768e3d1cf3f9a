//! How a VM runs its kernel.
//!
//! A [`Machine`] is one VM on the calling thread. The same thread waits for the host's
//! sockets whenever the guest is idle, so a message for an idle guest costs no thread switch;
//! while the guest runs, a signal brings it back (see [`crate::worker`]).

mod blob;
mod console;
mod crew;
mod elf;
pub mod hvm;
pub mod probe;
pub mod pv;

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::kvm::InterruptHandle;
use crate::memory::GuestMemory;
use crate::protocol::Tuning;
use crate::snapshot::FrozenMemory;

pub use probe::{Probe, probe};

/// Which way a VM runs its kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineKind {
    /// The kernel's Xen PV entry, served by a shim inside the guest; needs no hardware virtualization.
    Pv,
    /// Hardware virtualization runs the kernel's ring 0.
    Hvm,
}

impl MachineKind {
    /// Its name, as users write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pv => "pv",
            Self::Hvm => "hvm",
        }
    }

    /// The kernel command line that this machine wants; more may be appended.
    #[must_use]
    pub fn cmdline(self) -> &'static str {
        match self {
            Self::Pv => pv::CMDLINE,
            Self::Hvm => hvm::CMDLINE,
        }
    }

    /// Most vCPUs that a VM on it may have.
    #[must_use]
    pub fn max_vcpus(self) -> u32 {
        match self {
            Self::Pv => pv::MAX_VCPUS,
            Self::Hvm => hvm::MAX_VCPUS,
        }
    }
}

/// How to boot.
#[derive(Debug)]
pub struct BootConfig<'a> {
    /// Guest memory, MiB: 128 to 8192.
    pub memory_mib: u32,
    /// vCPUs ([`MachineKind::max_vcpus`]).
    pub vcpus: u32,
    /// Kernel command line; usually [`MachineKind::cmdline`].
    pub cmdline: &'a str,
    /// An ELF `vmlinux`.
    pub kernel: &'a File,
    /// The initramfs (cpio, possibly compressed).
    pub initramfs: &'a File,
    /// Options.
    pub tuning: Tuning,
    /// What [`probe()`] found on this host.
    pub probe: &'a Probe,
}

/// Boots a VM. Nothing runs until [`Machine::run`], which must be called on the thread that called this.
///
/// # Errors
/// A kernel that cannot be booted this way, sizes out of range, or a refusal of KVM.
pub fn boot(kind: MachineKind, config: &BootConfig<'_>) -> anyhow::Result<Box<dyn Machine>> {
    anyhow::ensure!(
        (1..=kind.max_vcpus()).contains(&config.vcpus),
        "a VM with {} vCPUs was asked for; on the {} machine it can have up to {}",
        config.vcpus,
        kind.name(),
        kind.max_vcpus()
    );
    Ok(match kind {
        MachineKind::Pv => Box::new(pv::boot(config)?),
        MachineKind::Hvm => Box::new(hvm::boot(config)?),
    })
}

/// Restores a VM from [`Machine::save`]'s blob and its memory, of which it gets a private view.
/// Nothing runs until [`Machine::run`], which must be called on the thread that called this.
/// The working set is best prefaulted (`machine.memory().prefault(..)`) before the first run.
///
/// # Errors
/// A blob that is damaged or of another version, a host that lacks what the VM was saved with (the message says what), or a refusal of KVM.
pub fn restore(
    kind: MachineKind,
    state: &[u8],
    memory: &FrozenMemory,
    tuning: Tuning,
) -> anyhow::Result<Box<dyn Machine>> {
    Ok(match kind {
        MachineKind::Pv => Box::new(pv::restore(state, memory, tuning)?),
        MachineKind::Hvm => Box::new(hvm::restore(state, memory)?),
    })
}

/// Why [`Machine::run`] came back.
#[derive(Debug)]
pub enum Exit {
    /// The agent wrote this word to the doorbell port.
    Doorbell(u32),
    /// The guest is halted; call [`Machine::run`] again at the deadline (its next timer) or
    /// after [`Machine::raise_wire`].
    Idle {
        /// When the guest wants to run again by itself.
        deadline: Option<Instant>,
    },
    /// A signal arrived.
    Interrupted,
    /// The guest ended by itself.
    Shutdown,
    /// The guest ended by an error of its own (panic, triple fault, protocol breach).
    Crashed(String),
}

/// One VM.
pub trait Machine: std::fmt::Debug {
    /// Which kind this is.
    fn kind(&self) -> MachineKind;
    /// Runs the guest until something needs the caller.
    ///
    /// # Errors
    /// A failure of KVM or of the VMM; the VM cannot go on.
    fn run(&mut self) -> anyhow::Result<Exit>;
    /// Makes the wire's interrupt pending; seen by the guest at the next [`Self::run`].
    fn raise_wire(&mut self);
    /// The guest's memory.
    fn memory(&self) -> &Arc<GuestMemory>;
    /// All state but memory, as a versioned blob for [`crate::snapshot`]. No vCPU runs from then to the next [`Self::run`].
    ///
    /// # Errors
    /// KVM refused to say, or the guest is at a point that cannot be saved (run it on and retry).
    fn save(&mut self) -> anyhow::Result<Vec<u8>>;
    /// Whether [`Self::save`] is sure to work where the guest stopped just now. (It is, too, after [`Exit::Idle`].)
    fn is_well_placed(&self) -> bool;
    /// Console bytes since the last call; the machine bounds what it keeps between calls.
    fn take_console(&mut self) -> Vec<u8>;
    /// What makes [`Self::run`] come back with [`Exit::Interrupted`], from a signal handler.
    fn interrupt_handle(&mut self) -> InterruptHandle;
    /// Counts of exits by reason since the start.
    fn exits(&self) -> std::collections::BTreeMap<String, u64>;
}
