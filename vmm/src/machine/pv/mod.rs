//! The `pv` machine: an unmodified Linux kernel, started through its Xen PV entry.
//!
//! Such a kernel knows that it does not own the machine: it runs in user mode and asks for
//! everything privileged by hypercalls. So it needs no hardware virtualization, which
//! makes the difference on a host whose KVM interprets CPL0 code (`kvm_pvm`): kernel and processes
//! both run natively at CPL3, and a **shim** in the guest (`shim/`) plays the hypervisor: it
//! passes system calls, faults and events to the kernel and changes page tables, all
//! without leaving the guest. What the shim cannot do reaches this module through a port.
//!
//! Guest processes share the page tables of the guest kernel and can reach its memory: the
//! boundary is the VM, not the kernel within. Nothing that the guest may have written, the shim's
//! own memory included, is trusted here.

mod area;
mod console;
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
mod start;
mod state;
mod time;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_cpuid_entry2;

use super::console::Console;
use super::{Exit, Machine, MachineKind};
use crate::kvm::kick::{self, KickTimer};
use crate::kvm::{InterruptHandle, Stop, Vm};
use crate::memory::GuestMemory;
use layout::*;
use state::{Facts, PvState, Saved};
use thaw_wire::layout::WIRE_VIRQ;
use time::Clock;

pub use layout::MEMORY_MIB;
pub use setup::{CMDLINE, boot, restore};

/// One VM. Fields are dropped in this order: the timer first, so that it fires at nothing.
#[derive(Debug)]
pub struct PvMachine {
    timer: KickTimer,
    vm: Vm,
    layout: Layout,
    state: PvState,
    facts: Facts,
    cpuid: Vec<kvm_cpuid_entry2>,
    clock: Clock,
    console: Console,
    counts: Counts,
    /// Deadline (guest time) that the timer is armed for.
    armed: Option<u64>,
    /// The vCPU stopped at a port and may be in the middle of the instruction.
    at_port: bool,
    /// An event waits for the guest to be where it can be delivered.
    retry: bool,
    /// Times in a row that it was not there.
    tries: u32,
    /// Times in a row that an event was held back for what looks like a breakpoint.
    postponed: u32,
    ended: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    hypercalls: u64,
    emulated: u64,
    doorbells: u64,
    interrupts: u64,
    retries: u64,
    idles: u64,
    refused_ports: u64,
}

impl PvMachine {
    fn comm(&self, field: u64) -> u64 {
        self.vm
            .memory()
            .read_u64(self.layout.comm(field))
            .unwrap_or(0)
    }

    fn set_comm(&self, field: u64, value: u64) -> anyhow::Result<()> {
        Ok(self.vm.memory().write_u64(self.layout.comm(field), value)?)
    }

    /// Ends the guest for good if `exit` is an end.
    fn leave(&mut self, exit: Exit) -> anyhow::Result<Exit> {
        console::drain(&mut self.console, self.vm.memory(), self.state.console_ring)?;
        if matches!(exit, Exit::Shutdown | Exit::Crashed(_)) {
            self.ended = true;
            self.timer.disarm();
        }
        Ok(exit)
    }

    /// Whether the halted guest has something to do; if not, until when.
    fn still_idle(&mut self) -> anyhow::Result<Option<Exit>> {
        self.check_deadline()?;
        if self.state.events.pending(self.vm.memory())? {
            self.state.halted = false;
            return Ok(None);
        }
        self.counts.idles += 1;
        if self.armed.take().is_some() {
            self.timer.disarm();
        }
        let left = self
            .state
            .deadline
            .map(|deadline| Duration::from_nanos(deadline.saturating_sub(self.clock.now())));
        Ok(Some(Exit::Idle {
            deadline: left.and_then(|left| Instant::now().checked_add(left)),
        }))
    }

    fn run_guest(&mut self) -> anyhow::Result<Exit> {
        kick::attach(self.vm.vcpu.interrupt_handle());
        self.check_deadline()?;
        if !self.state.halted {
            self.deliver_event()?;
        }
        loop {
            if self.state.halted
                && let Some(exit) = self.still_idle()?
            {
                return Ok(exit);
            }
            self.arm_timer();
            match self.vm.vcpu.run()? {
                Stop::Out { port, value } => {
                    if let Some(exit) = self.port_written(port, value)? {
                        return Ok(exit);
                    }
                }
                Stop::In { .. } => {
                    self.vm.vcpu.answer_in(0xff);
                    if !in_shim(self.vm.vcpu.regs().rip) {
                        self.refuse_port()?;
                    }
                }
                Stop::Interrupted => {
                    self.counts.interrupts += 1;
                    self.at_port = false;
                    self.armed = None;
                    // Whose signal it was cannot be told: the caller looks at its sockets every time. What is
                    // due is delivered when it comes back, and the timer armed then: not for the time in between.
                    return Ok(Exit::Interrupted);
                }
                Stop::MmioRead { address, .. } | Stop::MmioWrite { address, .. } => {
                    return Ok(Exit::Crashed(format!(
                        "the guest reached for {address:#x}, where it has no memory"
                    )));
                }
                Stop::Halted => return Ok(Exit::Crashed("the guest halted at CPL0".to_owned())),
                Stop::TripleFault => {
                    return Ok(Exit::Crashed(format!(
                        "triple fault: {}",
                        self.console.last_words()
                    )));
                }
                Stop::Failed(why) => {
                    let rip = self.vm.vcpu.regs().rip;
                    return Ok(Exit::Crashed(format!(
                        "KVM cannot run the guest on at {rip:#x}: {why}"
                    )));
                }
            }
        }
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
        if let Err(error) = self.state.events.raise_virq(self.vm.memory(), WIRE_VIRQ) {
            tracing::error!(%error, "the wire's interrupt is lost");
        }
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        self.vm.memory()
    }

    fn save(&mut self) -> anyhow::Result<Vec<u8>> {
        self.vm.vcpu.settle()?;
        self.at_port = false;
        self.postponed = 0;
        anyhow::ensure!(
            !self.breakpoint_may_be_in_flight(),
            "the guest may be in the middle of a breakpoint: run it on and retry"
        );
        let vcpu = &self.vm.vcpu;
        state::encode(&Saved {
            facts: self.facts.clone(),
            memory_mib: u32::try_from(self.layout.ram >> 20)?,
            pv: self.state.clone(),
            now: self.clock.now(),
            cpuid: self.cpuid.clone(),
            regs: *vcpu.regs(),
            sregs: *vcpu.sregs(),
            events: *vcpu.events(),
            xsave: vcpu.xsave()?,
            xcr0: vcpu.xcrs()?.xcrs[0].value,
        })
    }

    fn saves_anywhere(&self) -> bool {
        false
    }

    fn take_console(&mut self) -> Vec<u8> {
        self.console.take()
    }

    fn interrupt_handle(&mut self) -> InterruptHandle {
        self.vm.vcpu.interrupt_handle()
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
        } = self.counts;
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
            exits.insert(format!("shim_{name}"), self.comm(COMM_COUNTERS + index * 8));
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

impl Drop for PvMachine {
    fn drop(&mut self) {
        kick::detach(self.vm.vcpu.interrupt_handle());
    }
}
