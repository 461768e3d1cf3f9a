//! When the guest is interrupted: by its timer, and by events once it is where it can take them.

use super::layout::*;
use super::{PvMachine, events, guest};

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

impl PvMachine {
    /// Makes the timer's event pending if its time has come.
    pub(super) fn check_deadline(&mut self) -> anyhow::Result<()> {
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
    pub(super) fn arm_timer(&mut self) {
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
    pub(super) fn deliver_event(&mut self) -> anyhow::Result<()> {
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
    pub(super) fn breakpoint_may_be_in_flight(&mut self) -> bool {
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
}
