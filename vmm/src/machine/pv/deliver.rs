//! When the guest is interrupted: by its timer, and by events once it is where it can take them.

use super::cpu::Cpu;
use super::layout::*;
use super::{events, guest};

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

impl Cpu {
    /// Makes the timer's event pending if its time has come.
    pub(super) fn check_deadline(&mut self) -> anyhow::Result<()> {
        let Some(deadline) = self.own.deadline else {
            return Ok(());
        };
        let mut now = self.shared.clock.now();
        while now < deadline && deadline - now <= NEAR {
            std::hint::spin_loop();
            now = self.shared.clock.now();
        }
        if now >= deadline {
            self.own.deadline = None;
            self.shared
                .raise_virq(self.index, events::VIRQ_TIMER, Some(self.index))?;
        }
        Ok(())
    }

    /// Arms the timer for whatever comes first: the guest's deadline, or another try to deliver an event.
    pub(super) fn arm_timer(&mut self) -> anyhow::Result<()> {
        if self.retry {
            self.timer()?
                .arm(RETRY << (self.tries.max(1) - 1).min(MOST_DOUBLED));
            self.armed = None;
        } else if self.armed != self.own.deadline {
            match self.own.deadline {
                Some(deadline) => self
                    .timer()?
                    .arm(deadline.saturating_sub(self.shared.clock.now())),
                None => self.timer()?.disarm(),
            }
            self.armed = self.own.deadline;
        }
        Ok(())
    }

    /// Delivers a pending event if the guest can take it now: at CPL3, outside the shim (which
    /// looks for events itself on its way out), with no exception in flight.
    pub(super) fn deliver_event(&mut self) -> anyhow::Result<()> {
        self.retry = false;
        let (memory, info) = (self.memory(), self.seat().info());
        if !info.pending(memory)? || info.masked(memory)? {
            self.tries = 0;
            return Ok(());
        }
        if self.at_port {
            self.vcpu.settle()?;
            self.at_port = false;
        }
        let exception = &self.vcpu.events().exception;
        let in_flight = exception.injected != 0 || exception.pending != 0;
        let selector = self.vcpu.sregs().cs.selector;
        let regs = *self.vcpu.regs();
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
        self.memory().write(
            self.area.physical + AREA_EXCEPTION_STACK - 40,
            frame.map(u64::to_le_bytes).as_flattened(),
        )?;
        let at = self.area.address;
        let regs = self.vcpu.regs_mut();
        regs.rip = at + SHIM_UPCALL;
        regs.rsp = at + AREA_EXCEPTION_STACK - 40;
        regs.rflags = 0x202;
        Ok(())
    }

    /// Whether a breakpoint (`int3`) of the guest may be half delivered. KVM does not tell: it hides
    /// exceptions raised by instructions from `KVM_SYNC_X86_EVENTS`. The instruction itself gives it
    /// away, before RIP or at it. That can be a coincidence, so it delays an event a bounded number of times.
    pub(super) fn breakpoint_may_be_in_flight(&mut self) -> bool {
        let rip = self.vcpu.regs().rip;
        let cr3 = self.vcpu.sregs().cr3;
        let is_int3 = |at: u64| {
            let mut byte = [0];
            guest::read(self.memory(), cr3, at, &mut byte).is_some() && byte == [INT3]
        };
        if self.postponed >= MOST_POSTPONED || !(is_int3(rip) || is_int3(rip.wrapping_sub(1))) {
            return false;
        }
        self.postponed += 1;
        true
    }
}
