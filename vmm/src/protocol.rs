//! What `thaw serve` and a worker say to each other.
//!
//! A worker inherits one end of a unix stream socket. Both directions carry the wire's own
//! frames ([`thaw_wire::frame`]). Frames on streams other than
//! [`thaw_wire::frame::CONTROL`] are relayed to and from the guest's agent, checked but not
//! translated. Frames on the control stream hold the JSON of [`Order`] (to the worker, kind
//! `Order`) and [`Report`] (from it, kind `Report`). File descriptors that an order needs
//! travel with the first byte of its frame (`SCM_RIGHTS`), in the sequence its doc names.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thaw_wire::message;

use crate::machine::MachineKind;

/// What `serve` orders.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "worker_order", rename_all = "snake_case")]
pub enum Order {
    /// Boot a VM. Descriptors: kernel (ELF `vmlinux`), initramfs. Answered by
    /// [`Report::Running`], then, once the agent is up, [`Report::Agent`] with `Ready`.
    Boot(Boot),
    /// Restore a VM. Descriptors: state, memory (sealed memfd or file), the page map and its files when `overlays`
    /// says so, and, when `working_set` says so, the working set. Answered as `Boot`.
    Restore(Restore),
    /// Relay to the agent; its answer comes back as [`Report::Agent`].
    Agent {
        /// What to tell the agent.
        message: message::Order,
    },
    /// Freeze the VM into files; it goes on running afterwards. Descriptors: state, memory
    /// (both empty, writable). Answered by [`Report::Saved`].
    Save,
    /// As `Save`, but only what the VM alone has: pages that it wrote since it was restored. Descriptors: state,
    /// pages (one after the other), list of their numbers (little-endian `u64`), all empty and writable. Answered by
    /// [`Report::Saved`].
    Freeze,
    /// Name the pages that the VM wrote since it was restored. Descriptor: an empty writable file
    /// for the list (little-endian `u64` page numbers). Answered by [`Report::Touched`].
    Touched,
    /// Answered by [`Report::Stats`].
    Stats,
    /// End the VM and the process. No answer: the socket closes.
    Stop,
}

/// How to boot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Boot {
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u32,
    /// Kernel command line.
    pub cmdline: String,
    /// Which machine; the probe chooses when absent.
    pub machine: Option<MachineKind>,
    /// Options of the machine.
    #[serde(default)]
    pub tuning: Tuning,
}

/// Choices that a machine leaves open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tuning {
    /// `pv`: take system calls through the CPL0 bounce stub even where the native path works.
    #[serde(default)]
    pub force_bounce: bool,
}

/// How to restore.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Restore {
    /// The generation this VM gets; larger than any used before on this host.
    pub generation: u64,
    /// The last descriptor holds a working set to prefault.
    pub working_set: bool,
    /// After the memory comes the map of pages that lie in other files ([`crate::snapshot::PageMap`]), then so many
    /// files; none: the memory is all there is.
    #[serde(default)]
    pub overlays: Option<u32>,
    /// Options of the machine; must equal those of the boot.
    #[serde(default)]
    pub tuning: Tuning,
}

/// What a worker reports.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "worker_report", rename_all = "snake_case")]
pub enum Report {
    /// The guest executes its first instruction now.
    Running {
        /// Microseconds that each phase of the start took, by name, in order of their names;
        /// `total` counts from the process's start.
        phases_us: BTreeMap<String, u64>,
    },
    /// The agent says something.
    Agent {
        /// What it says.
        message: message::Report,
    },
    /// The VM is frozen in the files given.
    Saved {
        /// Bytes of state written.
        state_bytes: u64,
        /// Apparent size of the memory file, bytes.
        memory_bytes: u64,
        /// Pages that hold anything but zeroes.
        pages: u64,
        /// How long the guest stood still, microseconds.
        pause_us: u64,
    },
    /// The list is written.
    Touched {
        /// Pages in it.
        pages: u64,
    },
    /// Figures about the VM.
    Stats(Stats),
    /// An order could not be carried out; the VM is as it was.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// The VM is no more, and the process ends.
    Died(Death),
}

/// Figures about a running VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Pages of guest memory that belong to this VM alone.
    pub private_pages: u64,
    /// Processor time of the vCPU thread, microseconds.
    pub cpu_us: u64,
    /// Times the guest left for the worker, by reason.
    pub exits: BTreeMap<String, u64>,
}

/// Why a VM ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Death {
    /// What happened.
    pub cause: Cause,
    /// One line for the log.
    pub detail: String,
    /// The last lines of the guest's console, at most 4 KiB.
    pub console: String,
}

/// The kinds of death.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The guest powered off.
    Shutdown,
    /// The guest kernel panicked or crashed.
    Panic,
    /// The guest did something that no correct guest does (triple fault, impossible ring, forged frame).
    GuestFault,
    /// The guest does not answer.
    Unresponsive,
    /// The worker itself failed.
    Worker,
}
