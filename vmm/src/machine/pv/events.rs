//! Event channels: how a Xen guest is interrupted (the two-level ABI of xen.h and event_channel.h).

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::layout::*;
use super::start::CONSOLE_PORT;
use crate::memory::{GuestMemory, MemoryError};

/// Ports that a guest may have: a 1-vCPU Linux uses about ten.
const MAX_PORTS: usize = 64;

/// In `struct shared_info`, after 32 `vcpu_info`s of 64 bytes: pending bits, then mask bits, then the wall clock.
const PENDING: u64 = 2048;
const MASKED: u64 = PENDING + 512;
pub(super) const WALL_CLOCK: u64 = MASKED + 512;

/// In `struct vcpu_info`.
pub(super) const UPCALL_PENDING: u64 = 0;
pub(super) const UPCALL_MASK: u64 = 1;
const SELECTOR: u64 = 8;
pub(super) const TIME: u64 = 32;
/// Bytes of `struct vcpu_info`.
pub(super) const VCPU_INFO: u64 = 64;

/// Virtual interrupt of the timer.
pub(super) const VIRQ_TIMER: u32 = 0;

/// What a port is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Port {
    Free,
    Console,
    Virq(u32),
    Ipi,
}

/// The guest's ports and where its bits are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Events {
    ports: Vec<Port>,
    /// Guest-physical address of the `vcpu_info`; checked when the guest sets it.
    pub vcpu_info: u64,
    shared_info: u64,
}

impl Events {
    pub(super) fn new(layout: &Layout) -> Self {
        let shared_info = layout.area + AREA_SHARED_INFO;
        let mut ports = vec![Port::Free; MAX_PORTS];
        ports[CONSOLE_PORT as usize] = Port::Console;
        Self {
            ports,
            vcpu_info: shared_info,
            shared_info,
        }
    }

    /// Whether a decoded state is one that `new` and the hypercalls could have made.
    pub(super) fn plausible(&self, layout: &Layout) -> bool {
        self.ports.len() == MAX_PORTS
            && self.shared_info == layout.area + AREA_SHARED_INFO
            && self.vcpu_info.is_multiple_of(8)
            && self.vcpu_info <= layout.size - VCPU_INFO
    }

    /// Binds the first free port; port 0 is never one.
    pub(super) fn bind(&mut self, what: Port) -> Option<u32> {
        if let Port::Virq(number) = what
            && let Some(port) = self.port_of(number)
        {
            return Some(port);
        }
        let (port, slot) = self
            .ports
            .iter_mut()
            .enumerate()
            .skip(1)
            .find(|(_, slot)| **slot == Port::Free)?;
        *slot = what;
        u32::try_from(port).ok()
    }

    pub(super) fn close(&mut self, port: u32) {
        if let Some(slot) = self.ports.get_mut(port as usize) {
            *slot = Port::Free;
        }
    }

    pub(super) fn bound(&self, port: u32) -> Port {
        self.ports.get(port as usize).copied().unwrap_or(Port::Free)
    }

    pub(super) fn port_of(&self, virq: u32) -> Option<u32> {
        self.ports
            .iter()
            .position(|&port| port == Port::Virq(virq))
            .and_then(|port| u32::try_from(port).ok())
    }

    /// Makes a virtual interrupt pending; nothing if the guest has not bound it.
    pub(super) fn raise_virq(&self, memory: &GuestMemory, virq: u32) -> Result<(), MemoryError> {
        self.port_of(virq)
            .map_or(Ok(()), |port| self.raise(memory, port))
    }

    /// Makes a port pending.
    pub(super) fn raise(&self, memory: &GuestMemory, port: u32) -> Result<(), MemoryError> {
        let (word, bit) = (u64::from(port) / 64 * 8, 1_u64 << (port % 64));
        if memory
            .atomic_u64(self.shared_info + PENDING + word)?
            .fetch_or(bit, Ordering::SeqCst)
            & bit
            != 0
        {
            return Ok(());
        }
        if memory
            .atomic_u64(self.shared_info + MASKED + word)?
            .load(Ordering::SeqCst)
            & bit
            != 0
        {
            return Ok(());
        }
        self.select(memory, port)
    }

    /// Clears a port's mask, and delivers what came meanwhile.
    pub(super) fn unmask(&self, memory: &GuestMemory, port: u32) -> Result<(), MemoryError> {
        if port as usize >= MAX_PORTS {
            return Ok(());
        }
        let (word, bit) = (u64::from(port) / 64 * 8, 1_u64 << (port % 64));
        memory
            .atomic_u64(self.shared_info + MASKED + word)?
            .fetch_and(!bit, Ordering::SeqCst);
        if memory
            .atomic_u64(self.shared_info + PENDING + word)?
            .load(Ordering::SeqCst)
            & bit
            != 0
        {
            self.select(memory, port)?;
        }
        Ok(())
    }

    fn select(&self, memory: &GuestMemory, port: u32) -> Result<(), MemoryError> {
        memory
            .atomic_u64(self.vcpu_info + SELECTOR)?
            .fetch_or(1 << (port / 64), Ordering::SeqCst);
        memory
            .atomic_u8(self.vcpu_info + UPCALL_PENDING)?
            .store(1, Ordering::SeqCst);
        Ok(())
    }

    /// All ports masked, as a guest expects at its start.
    pub(super) fn mask_all(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        memory.write(self.shared_info + MASKED, &[0xff; 512])?;
        self.set_masked(memory, true)
    }

    pub(super) fn set_masked(&self, memory: &GuestMemory, masked: bool) -> Result<(), MemoryError> {
        memory.write(self.vcpu_info + UPCALL_MASK, &[u8::from(masked)])
    }

    /// Whether an event waits (whatever the mask).
    pub(super) fn pending(&self, memory: &GuestMemory) -> Result<bool, MemoryError> {
        Ok(memory.read_array::<1>(self.vcpu_info + UPCALL_PENDING)? != [0])
    }

    /// Whether the guest wants no events now.
    pub(super) fn masked(&self, memory: &GuestMemory) -> Result<bool, MemoryError> {
        Ok(memory.read_array::<1>(self.vcpu_info + UPCALL_MASK)? != [0])
    }

    /// Moves the `vcpu_info` to where the guest wants it. False if that is no place for it.
    pub(super) fn move_vcpu_info(
        &mut self,
        memory: &GuestMemory,
        to: u64,
        ram: u64,
    ) -> Result<bool, MemoryError> {
        if !to.is_multiple_of(8) || to.checked_add(VCPU_INFO).is_none_or(|end| end > ram) {
            return Ok(false);
        }
        let old: [u8; VCPU_INFO as usize] = memory.read_array(self.vcpu_info)?;
        memory.write(to, &old)?;
        self.vcpu_info = to;
        // Whatever raced with the move is found by looking at everything once.
        memory.write_u64(to + SELECTOR, u64::MAX)?;
        memory.write(to + UPCALL_PENDING, &[1])?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_bounded_and_a_virq_is_bound_once() {
        let layout = Layout::new(128).unwrap();
        let mut events = Events::new(&layout);
        let timer = events.bind(Port::Virq(0)).unwrap();
        assert_eq!(events.bind(Port::Virq(0)), Some(timer));
        while events.bind(Port::Ipi).is_some() {}
        assert_eq!(events.bound(u32::MAX), Port::Free);
        events.close(timer);
        assert_eq!(events.port_of(0), None);
        assert_eq!(events.bind(Port::Ipi), Some(timer));
    }

    #[test]
    fn a_masked_port_interrupts_only_when_unmasked() {
        let layout = Layout::new(128).unwrap();
        let memory = GuestMemory::anonymous(layout.size).unwrap();
        let mut events = Events::new(&layout);
        events.mask_all(&memory).unwrap();
        let port = events.bind(Port::Virq(20)).unwrap();
        events.raise_virq(&memory, 20).unwrap();
        assert!(!events.pending(&memory).unwrap());
        events.unmask(&memory, port).unwrap();
        assert!(events.pending(&memory).unwrap());
        assert!(
            !events
                .move_vcpu_info(&memory, layout.ram - 32, layout.ram)
                .unwrap()
        );
        assert!(
            !events
                .move_vcpu_info(&memory, u64::MAX - 7, layout.ram)
                .unwrap()
        );
        assert!(events.move_vcpu_info(&memory, 4096, layout.ram).unwrap());
    }
}
