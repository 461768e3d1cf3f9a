//! How a VM runs its kernel.
//!
//! A [`Machine`] is one VM on the calling thread. The same thread waits for the host's
//! sockets whenever the guest is idle, so a message for an idle guest costs no thread switch;
//! while the guest runs, a signal brings it back (see [`crate::worker`]).

pub mod probe;
pub mod pv;

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::kvm::InterruptHandle;
use crate::memory::GuestMemory;

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
    /// All state but memory, as a versioned blob for [`crate::snapshot`]. The guest must not be running.
    ///
    /// # Errors
    /// KVM refused to say, or the guest is at a point that cannot be saved (run it on and retry).
    fn save(&mut self) -> anyhow::Result<Vec<u8>>;
    /// Console bytes since the last call; the machine bounds what it keeps between calls.
    fn take_console(&mut self) -> Vec<u8>;
    /// What makes [`Self::run`] come back with [`Exit::Interrupted`], from a signal handler.
    fn interrupt_handle(&mut self) -> InterruptHandle;
    /// Counts of exits by reason since the start.
    fn exits(&self) -> std::collections::BTreeMap<String, u64>;
}
