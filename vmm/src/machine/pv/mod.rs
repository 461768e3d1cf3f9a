//! The `pv` machine: an unmodified Linux kernel, started through its Xen PV entry.
//!
//! Such a kernel knows that it does not own the machine: it runs in user mode and asks for
//! everything privileged by hypercalls. So it needs no hardware virtualization, which
//! makes the difference on a host whose KVM interprets CPL0 code (`kvm_pvm`): kernel and processes
//! both run natively at CPL3, and a **shim** in the guest (`shim/`) plays the hypervisor: it
//! passes system calls, faults and events to the kernel and changes page tables, all
//! without leaving the guest. What the shim cannot do reaches this module through a port.
//!
//! A VM with several vCPUs has a copy of the shim for each, and a thread. What one asks of another goes through
//! [`shared`]: events, and the invalidation of what it has cached of page tables.
//!
//! Guest processes share the page tables of the guest kernel and can reach its memory: the
//! boundary is the VM, not the kernel within. Nothing that the guest may have written, the shim's
//! own memory included, is trusted here.

mod area;
mod console;
mod cpu;
mod cpuid;
mod deliver;
mod emulate;
mod events;
mod guest;
mod hypercalls;
mod layout;
mod patches;
mod ports;
mod setup;
mod shared;
mod start;
mod state;
mod time;
mod vcpu_ops;

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_bindings::kvm_cpuid_entry2;

use super::crew::{Crew, Member, Others, lock};
use super::{Exit, Machine, MachineKind};
use crate::kvm::InterruptHandle;
use crate::memory::GuestMemory;
use cpu::{Counts, Cpu};
use layout::*;
use shared::{Place, Shared};
use state::Saved;
use thaw_wire::layout::WIRE_VIRQ;

pub use layout::{MAX_VCPUS, MEMORY_MIB};
pub use setup::{CMDLINE, boot, restore};

/// One VM. Fields are dropped in this order: threads before what they use.
#[derive(Debug)]
pub struct PvMachine {
    others: Others<Cpu>,
    first: Cpu,
    crew: Arc<Crew>,
    shared: Arc<Shared>,
    cpuid: Vec<kvm_cpuid_entry2>,
    ended: bool,
}

impl PvMachine {
    /// Of vCPUs that have not run: the calling thread is the machine's from now on.
    fn new(
        shared: Arc<Shared>,
        cpus: Vec<Cpu>,
        cpuid: Vec<kvm_cpuid_entry2>,
    ) -> anyhow::Result<Self> {
        let mut cpus = cpus.into_iter();
        let mut first = cpus
            .next()
            .ok_or_else(|| anyhow::anyhow!("a VM without vCPUs"))?;
        first.arrive()?;
        let crew = Arc::new(Crew::new());
        Ok(Self {
            others: Others::new(&crew, cpus.collect())?,
            first,
            crew,
            shared,
            cpuid,
            ended: false,
        })
    }

    fn run_guest(&mut self) -> anyhow::Result<Exit> {
        self.others.resume();
        if let Some(exit) = self.crew.next_mail() {
            return Ok(exit);
        }
        match self.first.run()? {
            // The caller would wait for its sockets alone, but another vCPU may have an event for this one.
            Exit::Idle { deadline } if !self.others.is_empty() => {
                self.first.sleep(deadline)?;
                Ok(Exit::Interrupted)
            }
            exit => Ok(exit),
        }
    }

    /// Ends the guest for good if `exit` is an end.
    fn leave(&mut self, exit: Exit) -> anyhow::Result<Exit> {
        lock(&self.shared.hub).drain_console(self.shared.memory())?;
        if matches!(exit, Exit::Shutdown | Exit::Crashed(_)) {
            self.ended = true;
            self.others.pause();
            self.first.disarm();
        }
        Ok(exit)
    }
}

impl Machine for PvMachine {
    fn kind(&self) -> MachineKind {
        MachineKind::Pv
    }

    fn run(&mut self) -> anyhow::Result<Exit> {
        anyhow::ensure!(!self.ended, "the guest has ended");
        let exit = self.run_guest()?;
        self.leave(exit)
    }

    fn raise_wire(&mut self) {
        if let Err(error) = self.shared.raise_virq(0, WIRE_VIRQ, None) {
            tracing::error!(%error, "the wire's interrupt is lost");
        }
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        self.shared.memory()
    }

    fn save(&mut self) -> anyhow::Result<Vec<u8>> {
        self.others.pause();
        self.first.settle()?;
        anyhow::ensure!(
            !self.crew.has_mail(),
            "the guest wants something just now: run it on and retry"
        );
        let mut cpus = vec![self.first.save()?];
        for mut cpu in self.others.members() {
            cpus.push(cpu.save()?);
        }
        let hub = lock(&self.shared.hub);
        state::encode(&Saved {
            facts: self.shared.facts.clone(),
            memory_mib: u32::try_from(self.shared.layout.ram >> 20)?,
            syscall: self.shared.syscall,
            events: hub.events.clone(),
            console_ring: hub.console_ring,
            now: self.shared.clock.now(),
            cpuid: self.cpuid.clone(),
            cpus,
        })
    }

    fn is_well_placed(&self) -> bool {
        let mut seats = self.shared.seats.iter();
        !self.others.is_empty() && seats.all(|seat| seat.place() != Place::Runs)
    }

    fn take_console(&mut self) -> Vec<u8> {
        lock(&self.shared.hub).console.take()
    }

    fn interrupt_handle(&mut self) -> InterruptHandle {
        self.first.handle()
    }

    fn exits(&self) -> BTreeMap<String, u64> {
        let Counts {
            hypercalls,
            emulated,
            doorbells,
            interrupts,
            retries,
            idles,
            refused_ports,
        } = self.first.counts;
        let mut exits: BTreeMap<String, u64> = [
            ("hypercall", hypercalls),
            ("emulated", emulated),
            ("doorbell", doorbells),
            ("interrupt", interrupts),
            ("retry", retries),
            ("idle", idles),
            ("refused_port", refused_ports),
        ]
        .map(|(name, count)| (name.to_owned(), count))
        .into();
        for (index, name) in (0..).zip(SHIM_COUNTERS) {
            let count = self.first.comm(COMM_COUNTERS + index * 8);
            exits.insert(format!("shim_{name}"), count);
        }
        exits
    }
}

/// Names of the shim's counters, in their order in `shim.h`.
const SHIM_COUNTERS: [&str; 15] = [
    "faults",
    "kernel_faults",
    "decoded",
    "cr2_reads",
    "exceptions",
    "upcalls",
    "pte_writes",
    "va_writes",
    "cr3_loads",
    "flushes",
    "invlpgs",
    "multicalls",
    "forwarded",
    "pins",
    "touches",
];
