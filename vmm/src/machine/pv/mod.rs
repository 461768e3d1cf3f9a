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
mod emulate;
mod events;
mod guest;
mod hypercalls;
mod layout;
mod patches;
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
use emulate::{Context, Effect};
use layout::*;
use state::{Facts, PvState, Saved};
use thaw_wire::layout::{DOORBELL_PORT, WIRE_VIRQ};
use time::Clock;

pub use layout::MEMORY_MIB;
pub use setup::{CMDLINE, boot, restore};
pub use state::MAX_STATE;

/// How soon (ns) to look again when an event cannot be delivered because the guest is inside the shim.
const RETRY: u64 = 30_000;
/// How often in a row that time is doubled. On a busy host it may pass before the guest has run at all, and a
/// guest that is interrupted ever again before it gets anywhere would never leave the shim.
const MOST_DOUBLED: u32 = 5;
/// A deadline this close (ns) is waited for on the processor rather than by sleeping.
const NEAR: u64 = 5_000;

/// The breakpoint instruction.
const INT3: u8 = 0xcc;
/// Retries spent on a breakpoint that may be in flight; eight milliseconds of them.
const MOST_POSTPONED: u32 = 12;

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

    /// Makes the timer's event pending if its time has come.
    fn check_deadline(&mut self) -> anyhow::Result<()> {
        let Some(deadline) = self.state.deadline else {
            return Ok(());
        };
        let mut now = self.clock.now();
        while now < deadline && deadline - now <= NEAR {
            std::hint::spin_loop();
            now = self.clock.now();
        }
        if now >= deadline {
            self.state.deadline = None;
            self.state
                .events
                .raise_virq(self.vm.memory(), events::VIRQ_TIMER)?;
        }
        Ok(())
    }

    /// Arms the timer for whatever comes first: the guest's deadline, or another try to deliver an event.
    fn arm_timer(&mut self) {
        if self.retry {
            self.timer
                .arm(RETRY << (self.tries.max(1) - 1).min(MOST_DOUBLED));
            self.armed = None;
        } else if self.armed != self.state.deadline {
            match self.state.deadline {
                Some(deadline) => self.timer.arm(deadline.saturating_sub(self.clock.now())),
                None => self.timer.disarm(),
            }
            self.armed = self.state.deadline;
        }
    }

    /// Delivers a pending event if the guest can take it now: at CPL3, outside the shim (which
    /// looks for events itself on its way out), with no exception in flight.
    fn deliver_event(&mut self) -> anyhow::Result<()> {
        self.retry = false;
        let memory = self.vm.memory();
        if !self.state.events.pending(memory)? || self.state.events.masked(memory)? {
            self.tries = 0;
            return Ok(());
        }
        if self.at_port {
            self.vm.vcpu.settle()?;
            self.at_port = false;
        }
        let exception = &self.vm.vcpu.events().exception;
        let in_flight = exception.injected != 0 || exception.pending != 0;
        let selector = self.vm.vcpu.sregs().cs.selector;
        let regs = *self.vm.vcpu.regs();
        let in_flight = in_flight || self.breakpoint_may_be_in_flight();
        if in_flight || u64::from(selector) != CODE_CPL3 || in_shim(regs.rip) {
            self.retry = true;
            self.tries = self.tries.saturating_add(1);
            self.counts.retries += 1;
            return Ok(());
        }
        self.postponed = 0;
        self.tries = 0;
        let frame = [regs.rip, CODE_CPL3, regs.rflags, regs.rsp, DATA_CPL3];
        self.vm.memory().write(
            self.layout.area + AREA_EXCEPTION_STACK - 40,
            frame.map(u64::to_le_bytes).as_flattened(),
        )?;
        let regs = self.vm.vcpu.regs_mut();
        regs.rip = AREA_BASE + SHIM_UPCALL;
        regs.rsp = AREA_BASE + AREA_EXCEPTION_STACK - 40;
        regs.rflags = 0x202;
        Ok(())
    }

    /// Whether a breakpoint (`int3`) of the guest may be half delivered. KVM does not tell: it hides
    /// exceptions raised by instructions from `KVM_SYNC_X86_EVENTS`. The instruction itself gives it
    /// away, before RIP or at it. That can be a coincidence, so it delays an event a bounded number of times.
    fn breakpoint_may_be_in_flight(&mut self) -> bool {
        let rip = self.vm.vcpu.regs().rip;
        let cr3 = self.vm.vcpu.sregs().cr3;
        let is_int3 = |at: u64| {
            let mut byte = [0];
            guest::read(self.vm.memory(), cr3, at, &mut byte).is_some() && byte == [INT3]
        };
        if self.postponed >= MOST_POSTPONED || !(is_int3(rip) || is_int3(rip.wrapping_sub(1))) {
            return false;
        }
        self.postponed += 1;
        true
    }

    /// A write to a port. `None`: go on.
    fn port_written(&mut self, port: u16, value: u32) -> anyhow::Result<Option<Exit>> {
        self.at_port = true;
        let rip = self.vm.vcpu.regs().rip;
        if port == DOORBELL_PORT && !in_shim(rip) {
            self.counts.doorbells += 1;
            return Ok(Some(Exit::Doorbell(value)));
        }
        if !in_shim(rip) {
            return self.refuse_port().map(|()| None);
        }
        match u64::from(port) {
            PORT_HYPERCALL => self.serve_hypercall(),
            PORT_INVALID_OPCODE => self.emulate(0).map(|()| None),
            PORT_PROTECTION => self.emulate(8).map(|()| None),
            PORT_PANIC => Ok(Some(self.shim_panicked())),
            PORT_VECTOR => {
                let vector = rip.wrapping_sub(AREA_BASE) / 8;
                Ok(Some(Exit::Crashed(format!(
                    "the guest took vector {vector}, which nothing in it should raise"
                ))))
            }
            _ => Ok(Some(Exit::Crashed(format!(
                "the shim wrote to port {port:#x}"
            )))),
        }
    }

    fn serve_hypercall(&mut self) -> anyhow::Result<Option<Exit>> {
        self.counts.hypercalls += 1;
        let regs = *self.vm.vcpu.regs();
        match self.hypercall(regs.rax, regs.rdi, regs.rsi, regs.rdx)? {
            Ok(value) => {
                self.vm.vcpu.regs_mut().rax = value.cast_unsigned();
                Ok(None)
            }
            Err(exit) => Ok(Some(exit)),
        }
    }

    /// A process used a port that is not its own: the #GP it would have got from the processor.
    fn refuse_port(&mut self) -> anyhow::Result<()> {
        self.counts.refused_ports += 1;
        self.vm.vcpu.settle()?;
        self.at_port = false;
        let regs = *self.vm.vcpu.regs();
        let rip = self.port_instruction(regs.rip);
        let frame = [0, rip, CODE_CPL3, regs.rflags, regs.rsp, DATA_CPL3];
        self.vm.memory().write(
            self.layout.area + AREA_EXCEPTION_STACK - 48,
            frame.map(u64::to_le_bytes).as_flattened(),
        )?;
        let regs = self.vm.vcpu.regs_mut();
        regs.rip = AREA_BASE + SHIM_VECTORS + 13 * SHIM_VECTOR_SIZE;
        regs.rsp = AREA_BASE + AREA_EXCEPTION_STACK - 48;
        regs.rflags = 0x202;
        Ok(())
    }

    /// Where the port instruction that ends at `after` begins, as far as its bytes tell: an immediate port
    /// (e4 to e7), the port in dx (ec to ef), or a string (6c to 6f).
    fn port_instruction(&self, after: u64) -> u64 {
        let mut bytes = [0; 2];
        let start = after.wrapping_sub(2);
        if guest::read(self.vm.memory(), self.comm(COMM_CR3), start, &mut bytes).is_none() {
            return after;
        }
        match bytes {
            [0x66, 0xec..=0xef | 0x6c..=0x6f] | [0xe4..=0xe7, _] => start,
            [_, 0xec..=0xef | 0x6c..=0x6f] => after.wrapping_sub(1),
            _ => after,
        }
    }

    /// #UD or #GP in the guest's kernel, stopped in the shim with the exception's frame on its stack, `skip` bytes
    /// up: executes the instruction if it is one that the kernel may expect to work. If not, the shim goes on with the exception.
    fn emulate(&mut self, skip: u64) -> anyhow::Result<()> {
        let memory = self.vm.memory().clone();
        let stack = self.vm.vcpu.regs().rsp.wrapping_sub(AREA_BASE);
        if stack >= AREA_CODE_END - 64 {
            return Ok(());
        }
        let word = |index: u64| {
            memory
                .read_array(self.layout.area + stack + skip + index * 8)
                .map(u64::from_le_bytes)
        };
        let (rip, rflags, rsp) = (word(0)?, word(2)?, word(3)?);
        let cr3 = self.comm(COMM_CR3);
        let mut bytes = [0; 15];
        if guest::read(&memory, cr3, rip, &mut bytes).is_none() {
            // Perhaps the next page is missing, not this one.
            let here = usize::try_from(4096 - rip % 4096).unwrap_or(0).min(15);
            if guest::read(&memory, cr3, rip, &mut bytes[..here]).is_none() {
                return Ok(());
            }
        }
        // CR2 is where the shim put it, after pending, mask and selector.
        let cr2 = memory
            .read_array(self.state.events.vcpu_info + 16)
            .map(u64::from_le_bytes)?;
        let user_gs = self.comm(COMM_USER_GS);
        let saved = *self.vm.vcpu.regs();
        let mut context = Context {
            vcpu: &mut self.vm.vcpu,
            xcr0: self.facts.xcr0,
            cr4: &mut self.state.cr4,
            cr2,
            cr3,
            user_gs,
        };
        context.vcpu.regs_mut().rsp = rsp;
        let Some(effect) = emulate::execute(&mut context, &bytes, rip) else {
            *self.vm.vcpu.regs_mut() = saved;
            return Ok(());
        };
        self.counts.emulated += 1;
        self.at_port = false;
        self.vm.vcpu.regs_mut().rflags = rflags | 2;
        match effect {
            Effect::None => {}
            Effect::Mask(masked) => self.state.events.set_masked(&memory, masked)?,
            Effect::KernelGs(base) => self.set_kernel_gs(base)?,
            Effect::UserGs(base) => self.set_comm(COMM_USER_GS, base)?,
        }
        self.deliver_event()
    }

    fn shim_panicked(&mut self) -> Exit {
        let [vector, rip, cr2, error, rsp] =
            [0, 1, 2, 3, 4].map(|index| self.comm(COMM_PANIC + index * 8));
        Exit::Crashed(format!(
            "the guest kernel took exception {vector} (error {error:#x}, address {cr2:#x}) at {rip:#x} with stack {rsp:#x}, where it cannot be handled"
        ))
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
