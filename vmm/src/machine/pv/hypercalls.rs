//! Hypercalls that the shim leaves to the VMM: the rare ones, and those that wait.
//!
//! Numbers and structures after Xen's public headers (xen.h, vcpu.h, sched.h, event_channel.h, memory.h,
//! physdev.h, version.h, callback.h). A call that is not listed answers ENOSYS, which Linux takes.

use super::events::Port;
use super::layout::*;
use super::{Exit, PvMachine, console, emulate::canonical, guest};
use crate::memory::PAGE;

const EPERM: i64 = -1;
const ENOENT: i64 = -2;
const EFAULT: i64 = -14;
const EINVAL: i64 = -22;
const ENOSPC: i64 = -28;
const ENOSYS: i64 = -38;
const ETIME: i64 = -62;

const SET_TRAP_TABLE: u64 = 0;
const SET_GDT: u64 = 2;
const SET_CALLBACKS: u64 = 4;
const PLATFORM_OP: u64 = 7;
const SET_DEBUGREG: u64 = 8;
const GET_DEBUGREG: u64 = 9;
const MEMORY_OP: u64 = 12;
const SET_TIMER_OP: u64 = 15;
const XEN_VERSION_OP: u64 = 17;
const CONSOLE_IO: u64 = 18;
const VM_ASSIST: u64 = 21;
const VCPU_OP: u64 = 24;
const SCHED_OP: u64 = 29;
const CALLBACK_OP: u64 = 30;
const EVENT_CHANNEL_OP: u64 = 32;
const PHYSDEV_OP: u64 = 33;

/// DR6 as after a single step: the one reason for a debug trap here.
const DR6_SINGLE_STEP: i64 = 0xffff_4ff0;

/// Features (`XENFEAT_*`): writable page tables, page tables above 4 GiB, A/D bits preserved on request, high-memory
/// assistance, grant mappings with available bits.
const FEATURES: u32 = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7;

/// Entries that a trap table has at most: one per vector and the terminator.
const MAX_TRAPS: u64 = 257;
/// Bytes of one `console_io` write that are looked at.
const MAX_CONSOLE_WRITE: u64 = 64 << 10;

/// A hypercall's outcome: a value, or the guest stops.
pub(super) type Outcome = Result<i64, Exit>;

impl PvMachine {
    /// Serves one hypercall.
    pub(super) fn hypercall(
        &mut self,
        number: u64,
        a1: u64,
        a2: u64,
        a3: u64,
    ) -> anyhow::Result<Outcome> {
        let value = match (number, a1) {
            (SET_TRAP_TABLE, 0) => 0,
            (SET_TRAP_TABLE, table) => self.set_trap_table(table)?,
            (SET_GDT | SET_CALLBACKS | SET_DEBUGREG, _) => 0,
            (PLATFORM_OP, _) => EPERM,
            (GET_DEBUGREG, 6) => DR6_SINGLE_STEP,
            (GET_DEBUGREG, _) => 0,
            (MEMORY_OP, _) => self.memory_op(a1, a2),
            (SET_TIMER_OP, deadline) => {
                self.state.deadline = (deadline != 0).then_some(deadline);
                0
            }
            (XEN_VERSION_OP, _) => self.xen_version(a1, a2),
            (CONSOLE_IO, 0) => self.console_write(a2, a3),
            (VM_ASSIST, _) => {
                if a2 == 5 {
                    EINVAL
                } else {
                    0
                }
            }
            (VCPU_OP, _) => self.vcpu_op(a1, a2, a3)?,
            (SCHED_OP, _) => return self.sched_op(a1, a2),
            (CALLBACK_OP, 0) => self.register_callback(a2)?,
            (EVENT_CHANNEL_OP, _) => self.event_channel_op(a1, a2)?,
            // Set IO privilege level: ports stay closed, programs get the fault they would without the privilege.
            (PHYSDEV_OP, 6) => 0,
            _ => ENOSYS,
        };
        Ok(Ok(value))
    }

    fn cr3(&self) -> u64 {
        self.comm(COMM_CR3)
    }

    fn get<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        guest::read(self.vm.memory(), self.cr3(), address, &mut bytes)?;
        Some(bytes)
    }

    fn get_words<const N: usize>(&self, address: u64) -> Option<[u32; N]> {
        let mut words = [0; N];
        for (index, word) in words.iter_mut().enumerate() {
            *word = u32::from_le_bytes(self.get(address.wrapping_add(index as u64 * 4))?);
        }
        Some(words)
    }

    fn put(&self, address: u64, bytes: &[u8]) -> i64 {
        guest::write(self.vm.memory(), self.cr3(), address, bytes).map_or(EFAULT, |()| 0)
    }

    fn set_trap_table(&mut self, table: u64) -> anyhow::Result<i64> {
        for index in 0..MAX_TRAPS {
            // struct trap_info: u8 vector, u8 flags, u16 selector, u64 address.
            let Some(entry) = self.get::<16>(table.wrapping_add(index * 16)) else {
                return Ok(EFAULT);
            };
            let [vector, flags, ..] = entry;
            let [.., a, b, c, d, e, f, g, h] = entry;
            let address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            if address == 0 {
                break;
            }
            if vector < 32 {
                let slot = COMM_TRAPS + u64::from(vector) * 16;
                self.set_comm(slot, address)?;
                self.set_comm(slot + 8, u64::from(flags & 4 != 0))?;
            }
        }
        Ok(0)
    }

    fn memory_op(&self, command: u64, argument: u64) -> i64 {
        match command {
            // Pages: current and maximum reservation, highest frame.
            2..=4 => (self.layout.ram / PAGE).cast_signed(),
            // XENMEM_memory_map: one range of RAM.
            9 => {
                let Some(request) = self.get::<16>(argument) else {
                    return EFAULT;
                };
                let [.., a, b, c, d, e, f, g, h] = request;
                let buffer = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                let mut entry = [0; 20];
                entry[8..16].copy_from_slice(&self.layout.ram.to_le_bytes());
                entry[16] = 1;
                match self.put(buffer, &entry) {
                    0 => self.put(argument, &1_u32.to_le_bytes()),
                    error => error,
                }
            }
            // XENMEM_machphys_mapping: start, end, highest frame.
            12 => {
                let table = AREA_BASE + AREA_M2P;
                let words = [
                    table,
                    table + self.layout.ram / 512,
                    self.layout.ram / PAGE - 1,
                ];
                self.put(argument, words.map(u64::to_le_bytes).as_flattened())
            }
            _ => ENOSYS,
        }
    }

    fn xen_version(&self, command: u64, argument: u64) -> i64 {
        match command {
            0 => XEN_INTERFACE.cast_signed(),
            1 => self.put(argument, b".0-thaw\0\0\0\0\0\0\0\0\0"),
            5 => self.put(argument, &0xffff_8000_0000_0000_u64.to_le_bytes()),
            6 => {
                let Some([submap, _]) = self.get_words(argument) else {
                    return EFAULT;
                };
                let features = if submap == 0 { FEATURES } else { 0 };
                self.put(argument.wrapping_add(4), &features.to_le_bytes())
            }
            7 => PAGE.cast_signed(),
            _ => ENOSYS,
        }
    }

    fn console_write(&mut self, length: u64, address: u64) -> i64 {
        let mut bytes = vec![0; usize::try_from(length.min(MAX_CONSOLE_WRITE)).unwrap_or(0)];
        if guest::read(self.vm.memory(), self.cr3(), address, &mut bytes).is_none() {
            return EFAULT;
        }
        self.console.print(&bytes);
        bytes.len() as i64
    }

    fn register_callback(&mut self, argument: u64) -> anyhow::Result<i64> {
        // struct callback_register: u16 type, u16 flags, u64 address.
        let Some(request) = self.get::<16>(argument) else {
            return Ok(EFAULT);
        };
        let [.., a, b, c, d, e, f, g, h] = request;
        let address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        match u16::from_le_bytes([request[0], request[1]]) {
            0 => self.set_comm(COMM_ON_EVENT, address)?,
            // Failsafe: called when an iret frame is bad, which the shim turns into a #GP.
            1 => {}
            2 => self.set_comm(COMM_ON_SYSCALL, address)?,
            _ => return Ok(EINVAL),
        }
        Ok(0)
    }

    fn vcpu_op(&mut self, command: u64, vcpu: u64, argument: u64) -> anyhow::Result<i64> {
        if vcpu != 0 {
            return Ok(ENOENT);
        }
        Ok(match command {
            // Runstate area, periodic timer set and stopped.
            5..=7 => 0,
            // VCPUOP_set_singleshot_timer: u64 deadline, u32 flags (1: only if it is in the future).
            8 => {
                let (Some(deadline), Some([flags])) =
                    (self.get(argument), self.get_words(argument.wrapping_add(8)))
                else {
                    return Ok(EFAULT);
                };
                let deadline = u64::from_le_bytes(deadline);
                if flags & 1 != 0 && deadline < self.clock.now() {
                    ETIME
                } else {
                    self.state.deadline = Some(deadline.max(1));
                    0
                }
            }
            9 => {
                self.state.deadline = None;
                0
            }
            // VCPUOP_register_vcpu_info: u64 frame, u32 offset.
            10 => {
                let (Some(frame), Some([offset])) =
                    (self.get(argument), self.get_words(argument.wrapping_add(8)))
                else {
                    return Ok(EFAULT);
                };
                let place = u64::from_le_bytes(frame)
                    .checked_mul(PAGE)
                    .and_then(|page| page.checked_add(u64::from(offset)));
                let ram = self.layout.ram;
                let memory = self.vm.memory().clone();
                match place {
                    Some(place) if self.state.events.move_vcpu_info(&memory, place, ram)? => {
                        self.set_comm(COMM_VCPU_INFO, DIRECT_BASE + place)?;
                        0
                    }
                    _ => EINVAL,
                }
            }
            // VCPUOP_register_vcpu_time_memory_area: u64 virtual address.
            13 => {
                let Some(address) = self.get(argument) else {
                    return Ok(EFAULT);
                };
                let address = u64::from_le_bytes(address);
                if address == 0 {
                    self.state.time_area = None;
                    return Ok(0);
                }
                let memory = self.vm.memory();
                let Some(place) = guest::translate(memory, self.cr3(), address)
                    .filter(|place| place % PAGE <= PAGE - super::time::TIME_INFO)
                else {
                    return Ok(EFAULT);
                };
                if self.clock.publish(memory, place).is_err() {
                    return Ok(EFAULT);
                }
                self.state.time_area = Some(place);
                0
            }
            _ => ENOSYS,
        })
    }

    fn sched_op(&mut self, command: u64, argument: u64) -> anyhow::Result<Outcome> {
        Ok(match command {
            0 => Ok(0),
            1 => {
                self.state.events.set_masked(self.vm.memory(), false)?;
                self.state.halted = true;
                Ok(0)
            }
            2 => {
                let reason = self
                    .get_words::<1>(argument)
                    .map_or(u32::MAX, |[reason]| reason);
                console::drain(&mut self.console, self.vm.memory(), self.state.console_ring)?;
                Err(match reason {
                    0 | 1 => Exit::Shutdown,
                    _ => Exit::Crashed(format!(
                        "the guest kernel gave up (reason {reason}): {}",
                        self.console.last_words()
                    )),
                })
            }
            // Poll: a spinlock waits. With one vCPU nobody else holds it for long.
            3 => Ok(0),
            _ => Ok(ENOSYS),
        })
    }

    fn event_channel_op(&mut self, command: u64, argument: u64) -> anyhow::Result<i64> {
        let Some([first]) = self.get_words(argument) else {
            return Ok(EFAULT);
        };
        let memory = self.vm.memory().clone();
        let bind = |machine: &mut Self, what, at: u64| match machine.state.events.bind(what) {
            Some(port) => machine.put(argument.wrapping_add(at), &port.to_le_bytes()),
            None => ENOSPC,
        };
        Ok(match command {
            // bind_virq: u32 virq, u32 vcpu, out u32 port.
            1 => bind(self, Port::Virq(first), 8),
            3 => {
                self.state.events.close(first);
                0
            }
            4 => {
                match self.state.events.bound(first) {
                    Port::Console => {
                        console::drain(&mut self.console, &memory, self.state.console_ring)?
                    }
                    Port::Ipi => self.state.events.raise(&memory, first)?,
                    Port::Free | Port::Virq(_) => {}
                }
                0
            }
            // status: u16 domain, u32 port, out u32 status, u32 vcpu, union.
            5 => {
                let Some([port]) = self.get_words(argument.wrapping_add(4)) else {
                    return Ok(EFAULT);
                };
                let (status, detail) = match self.state.events.bound(port) {
                    Port::Free => (0, 0),
                    Port::Console => (2, 0),
                    Port::Virq(number) => (4, number),
                    Port::Ipi => (5, 0),
                };
                let words: [u32; 3] = [status, 0, detail];
                self.put(
                    argument.wrapping_add(8),
                    words.map(u32::to_le_bytes).as_flattened(),
                )
            }
            // alloc_unbound: u16 domain, u16 remote, out u32 port; bind_ipi: u32 vcpu, out u32 port.
            6 | 7 => bind(self, Port::Ipi, 4),
            8 => 0,
            9 => {
                self.state.events.unmask(&memory, first)?;
                0
            }
            _ => ENOSYS,
        })
    }

    /// Loads the kernel's GS base where SWAPGS semantics would.
    pub(super) fn set_kernel_gs(&mut self, base: u64) -> anyhow::Result<()> {
        debug_assert!(canonical(base));
        self.set_comm(COMM_KERNEL_GS, base)
    }
}
