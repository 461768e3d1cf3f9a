//! Hypercalls that the shim leaves to the VMM: the rare ones. Those about vCPUs and their events are in [`super::vcpu_ops`].
//!
//! Numbers and structures after Xen's public headers (xen.h, memory.h,
//! physdev.h, version.h, callback.h). A call that is not listed answers ENOSYS, which Linux takes.

use super::cpu::Cpu;
use super::layout::*;
use super::{Exit, emulate::canonical, guest};
use crate::machine::crew::lock;
use crate::memory::PAGE;

/// What a call answers that fails, as in Xen's errno.h.
pub(super) mod error {
    pub const EPERM: i64 = -1;
    pub const ENOENT: i64 = -2;
    pub const EFAULT: i64 = -14;
    pub const EEXIST: i64 = -17;
    pub const EINVAL: i64 = -22;
    pub const ENOSPC: i64 = -28;
    pub const ENOSYS: i64 = -38;
    pub const ETIME: i64 = -62;
}
use error::{EFAULT, EINVAL, ENOSYS, EPERM};

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

impl Cpu {
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
                self.own.deadline = (deadline != 0).then_some(deadline);
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
            (FLUSH_VCPUS, vcpus) => {
                self.shared.flush(self.index, vcpus);
                0
            }
            (SCHED_OP, _) => return self.sched_op(a1, a2),
            (CALLBACK_OP, 0) => self.register_callback(a2)?,
            (EVENT_CHANNEL_OP, _) => self.event_channel_op(a1, a2)?,
            // Set IO privilege level: ports stay closed, programs get the fault they would without the privilege.
            (PHYSDEV_OP, 6) => 0,
            _ => ENOSYS,
        };
        Ok(Ok(value))
    }

    pub(super) fn cr3(&self) -> u64 {
        self.comm(COMM_CR3)
    }

    pub(super) fn get<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        guest::read(self.memory(), self.cr3(), address, &mut bytes)?;
        Some(bytes)
    }

    pub(super) fn get_words<const N: usize>(&self, address: u64) -> Option<[u32; N]> {
        let mut words = [0; N];
        for (index, word) in words.iter_mut().enumerate() {
            *word = u32::from_le_bytes(self.get(address.wrapping_add(index as u64 * 4))?);
        }
        Some(words)
    }

    pub(super) fn put(&self, address: u64, bytes: &[u8]) -> i64 {
        guest::write(self.memory(), self.cr3(), address, bytes).map_or(EFAULT, |()| 0)
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
            2..=4 => (self.shared.layout.ram / PAGE).cast_signed(),
            // XENMEM_memory_map: one range of RAM.
            9 => {
                let Some(request) = self.get::<16>(argument) else {
                    return EFAULT;
                };
                let [.., a, b, c, d, e, f, g, h] = request;
                let buffer = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                let mut entry = [0; 20];
                entry[8..16].copy_from_slice(&self.shared.layout.ram.to_le_bytes());
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
                    table + self.shared.layout.ram / 512,
                    self.shared.layout.ram / PAGE - 1,
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
        if guest::read(self.memory(), self.cr3(), address, &mut bytes).is_none() {
            return EFAULT;
        }
        lock(&self.shared.hub).console.print(&bytes);
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

    /// Loads the kernel's GS base where SWAPGS semantics would.
    pub(super) fn set_kernel_gs(&mut self, base: u64) -> anyhow::Result<()> {
        debug_assert!(canonical(base));
        self.set_comm(COMM_KERNEL_GS, base)
    }
}
