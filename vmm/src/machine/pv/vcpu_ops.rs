//! Hypercalls about vCPUs, what they wait for, and their events.
//!
//! Numbers and structures after Xen's public headers (vcpu.h, sched.h, event_channel.h; arch-x86/xen.h for `struct
//! vcpu_guest_context`).

use std::sync::atomic::Ordering;

use kvm_bindings::kvm_regs;

use super::cpu::{Cpu, Wait};
use super::events::{Port, VcpuInfo};
use super::hypercalls::Outcome;
use super::hypercalls::error::{EEXIST, EFAULT, EINVAL, ENOENT, ENOSPC, ENOSYS, ETIME};
use super::layout::*;
use super::shared::{First, Seat};
use super::{Exit, emulate::canonical, guest, time};
use crate::machine::crew::lock;
use crate::memory::PAGE;

/// Bytes of `struct vcpu_guest_context`, and where in it (of `user_regs`: the first word) what a vCPU starts with is.
const CONTEXT: usize = 5168;
const CONTEXT_REGS: usize = 520;
const CONTEXT_TRAPS: usize = 720;
const CONTEXT_KERNEL_SP: usize = 4976;
const CONTEXT_CR3: usize = 5008;
const CONTEXT_ON_EVENT: usize = 5112;
const CONTEXT_KERNEL_GS: usize = 5152;
const CONTEXT_USER_GS: usize = 5160;

impl Cpu {
    pub(super) fn vcpu_op(
        &mut self,
        command: u64,
        vcpu: u64,
        argument: u64,
    ) -> anyhow::Result<i64> {
        let shared = self.shared.clone();
        let Some((index, seat)) = shared.seat(vcpu) else {
            return Ok(ENOENT);
        };
        Ok(match command {
            0 => self.initialise(index, seat, argument)?,
            // VCPUOP_up: what it starts with is there before it is seen to be up.
            1 if !seat.initialised.load(Ordering::SeqCst) => EINVAL,
            1 => {
                seat.set_up(true);
                seat.kick();
                0
            }
            // VCPUOP_down, which a vCPU does to itself; it goes on behind this call when another switches it on.
            2 if index == self.index && !shared.is_alone() => {
                seat.set_up(false);
                self.own.wait = Wait::Up;
                0
            }
            3 => i64::from(seat.is_up()),
            // Runstate area, periodic timer set and stopped.
            5..=7 => 0,
            8 | 9 if index != self.index => EINVAL,
            8 => self.set_timer(argument),
            9 => {
                self.own.deadline = None;
                0
            }
            10 => self.register_info(index, seat, argument)?,
            13 if index == self.index => self.register_time(argument),
            _ => ENOSYS,
        })
    }

    /// `VCPUOP_initialise`: registers, traps and callbacks of a vCPU that has never been up.
    fn initialise(&self, index: u32, seat: &Seat, argument: u64) -> anyhow::Result<i64> {
        let Some(context) = self.get::<CONTEXT>(argument) else {
            return Ok(EFAULT);
        };
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&context[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let [cr3, gs, user_gs] = [CONTEXT_CR3, CONTEXT_KERNEL_GS, CONTEXT_USER_GS].map(word);
        if !canonical(gs) || !canonical(user_gs) || cr3 & !0xfff > self.shared.layout.ram - PAGE {
            return Ok(EINVAL);
        }
        // Of two that say so at the same time one wins, and only that one writes.
        if seat.initialised.swap(true, Ordering::SeqCst) {
            return Ok(EEXIST);
        }
        let memory = self.memory();
        let area = self.shared.layout.copy(index);
        for (field, value) in [
            (COMM_KERNEL_MODE, IN_KERNEL),
            (COMM_KERNEL_SP, word(CONTEXT_KERNEL_SP)),
            (COMM_KERNEL_GS, gs),
            (COMM_USER_GS, user_gs),
            (COMM_ON_EVENT, word(CONTEXT_ON_EVENT)),
            (COMM_CR3, cr3),
        ] {
            memory.write_u64(area.comm(field), value)?;
        }
        for at in (CONTEXT_TRAPS..CONTEXT_TRAPS + 256 * 16).step_by(16) {
            let (vector, flags, address) = (context[at], context[at + 1], word(at + 8));
            if vector < 32 && address != 0 {
                let slot = area.comm(COMM_TRAPS) + u64::from(vector) * 16;
                memory.write_u64(slot, address)?;
                memory.write_u64(slot + 8, u64::from(flags & 4 != 0))?;
            }
        }
        let reg = |number: usize| word(CONTEXT_REGS + number * 8);
        let regs = kvm_regs {
            r15: reg(0),
            r14: reg(1),
            r13: reg(2),
            r12: reg(3),
            rbp: reg(4),
            rbx: reg(5),
            r11: reg(6),
            r10: reg(7),
            r9: reg(8),
            r8: reg(9),
            rax: reg(10),
            rcx: reg(11),
            rdx: reg(12),
            rsi: reg(13),
            rdi: reg(14),
            rip: reg(16),
            rsp: reg(19),
            rflags: 0x202,
        };
        *lock(&seat.first) = Some(First { regs, cr3, gs });
        Ok(0)
    }

    /// `VCPUOP_set_singleshot_timer`: u64 deadline, u32 flags (1: only if it is in the future).
    fn set_timer(&mut self, argument: u64) -> i64 {
        let (Some(deadline), Some([flags])) =
            (self.get(argument), self.get_words(argument.wrapping_add(8)))
        else {
            return EFAULT;
        };
        let deadline = u64::from_le_bytes(deadline);
        if flags & 1 != 0 && deadline < self.shared.clock.now() {
            return ETIME;
        }
        self.own.deadline = Some(deadline.max(1));
        0
    }

    /// `VCPUOP_register_vcpu_info`: u64 frame, u32 offset. For another vCPU only before that one has started.
    fn register_info(&self, index: u32, seat: &Seat, argument: u64) -> anyhow::Result<i64> {
        let (Some(frame), Some([offset])) =
            (self.get(argument), self.get_words(argument.wrapping_add(8)))
        else {
            return Ok(EFAULT);
        };
        if index != self.index && seat.is_up() {
            return Ok(EINVAL);
        }
        let place = u64::from_le_bytes(frame)
            .checked_mul(PAGE)
            .and_then(|page| page.checked_add(u64::from(offset)));
        let (memory, ram) = (self.memory(), self.shared.layout.ram);
        let moved: Option<VcpuInfo> = match place {
            Some(place) => seat.info().moved(memory, place, ram)?,
            None => None,
        };
        let Some(info) = moved else {
            return Ok(EINVAL);
        };
        seat.set_info(info);
        let field = self.shared.layout.copy(index).comm(COMM_VCPU_INFO);
        memory.write_u64(field, DIRECT_BASE + info.0)?;
        Ok(0)
    }

    /// `VCPUOP_register_vcpu_time_memory_area`: u64 virtual address.
    fn register_time(&mut self, argument: u64) -> i64 {
        let Some(address) = self.get(argument).map(u64::from_le_bytes) else {
            return EFAULT;
        };
        if address == 0 {
            self.own.time_area = None;
            return 0;
        }
        let place = guest::translate(self.memory(), self.cr3(), address)
            .filter(|place| place % PAGE <= PAGE - time::TIME_INFO);
        let Some(place) = place else {
            return EFAULT;
        };
        if self.shared.clock.publish(self.memory(), place).is_err() {
            return EFAULT;
        }
        self.own.time_area = Some(place);
        0
    }

    pub(super) fn sched_op(&mut self, command: u64, argument: u64) -> anyhow::Result<Outcome> {
        Ok(match command {
            0 => Ok(0),
            1 => {
                self.seat().info().set_masked(self.memory(), false)?;
                self.own.wait = Wait::Event;
                Ok(0)
            }
            2 => {
                let reason = self
                    .get_words::<1>(argument)
                    .map_or(u32::MAX, |[reason]| reason);
                let mut hub = lock(&self.shared.hub);
                hub.drain_console(self.memory())?;
                Err(match reason {
                    0 | 1 => Exit::Shutdown,
                    _ => Exit::Crashed(format!(
                        "the guest kernel gave up (reason {reason}): {}",
                        hub.console.last_words()
                    )),
                })
            }
            3 => Ok(self.poll(argument)),
            _ => Ok(ENOSYS),
        })
    }

    /// `SCHEDOP_poll`: pointer to ports, u32 number of them, u64 timeout. A spinlock waits so for the vCPU that holds it.
    /// Who polls looks again when this comes back, so it may do so too soon: at once unless it is for one port and without an end.
    fn poll(&mut self, argument: u64) -> i64 {
        let (Some(ports), Some([number]), Some(timeout)) = (
            self.get(argument).map(u64::from_le_bytes),
            self.get_words(argument.wrapping_add(8)),
            self.get(argument.wrapping_add(16)).map(u64::from_le_bytes),
        ) else {
            return EFAULT;
        };
        let Some([port]) = self.get_words(ports) else {
            return EFAULT;
        };
        if number == 1 && timeout == 0 && !self.shared.is_alone() {
            self.own.wait = Wait::Port(port);
        }
        0
    }

    pub(super) fn event_channel_op(&mut self, command: u64, argument: u64) -> anyhow::Result<i64> {
        let Some([first]) = self.get_words(argument) else {
            return Ok(EFAULT);
        };
        let second = || self.get_words(argument.wrapping_add(4)).map(|[word]| word);
        Ok(match command {
            // bind_virq: u32 virq, u32 vcpu, out u32 port.
            1 => match second() {
                Some(vcpu) => self.bind(Port::Virq(first), vcpu, argument.wrapping_add(8)),
                None => EFAULT,
            },
            3 => {
                lock(&self.shared.hub).events.close(self.memory(), first)?;
                0
            }
            4 => {
                match self.shared.port(first).0 {
                    Port::Console => lock(&self.shared.hub).drain_console(self.memory())?,
                    Port::Ipi => self.shared.raise(self.index, first)?,
                    Port::Free | Port::Virq(_) => {}
                }
                0
            }
            // status: u16 domain, u32 port, out u32 status, u32 vcpu, union.
            5 => {
                let Some(port) = second() else {
                    return Ok(EFAULT);
                };
                let (bound, vcpu) = self.shared.port(port);
                let (status, detail) = match bound {
                    Port::Free => (0, 0),
                    Port::Console => (2, 0),
                    Port::Virq(number) => (4, number),
                    Port::Ipi => (5, 0),
                };
                let words: [u32; 3] = [status, vcpu, detail];
                self.put(
                    argument.wrapping_add(8),
                    words.map(u32::to_le_bytes).as_flattened(),
                )
            }
            // alloc_unbound: u16 domain, u16 remote, out u32 port.
            6 => self.bind(Port::Ipi, self.index, argument.wrapping_add(4)),
            // bind_ipi: u32 vcpu, out u32 port.
            7 => self.bind(Port::Ipi, first, argument.wrapping_add(4)),
            // bind_vcpu: u32 port, u32 vcpu.
            8 => match second() {
                Some(vcpu) if self.shared.seat(vcpu.into()).is_none() => ENOENT,
                Some(vcpu) if lock(&self.shared.hub).events.move_to(first, vcpu) => 0,
                Some(_) => EINVAL,
                None => EFAULT,
            },
            9 => {
                self.shared.unmask(self.index, first)?;
                0
            }
            _ => ENOSYS,
        })
    }

    fn bind(&self, port: Port, vcpu: u32, answer: u64) -> i64 {
        if self.shared.seat(vcpu.into()).is_none() {
            return ENOENT;
        }
        let bound = lock(&self.shared.hub).events.bind(port, vcpu);
        match bound {
            Some(port) => self.put(answer, &port.to_le_bytes()),
            None => ENOSPC,
        }
    }
}
