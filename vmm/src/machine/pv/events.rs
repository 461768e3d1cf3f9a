//! Event channels: how a Xen guest is interrupted (the two-level ABI of xen.h and event_channel.h).

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::layout::*;
use super::start::CONSOLE_PORT;
use crate::memory::{GuestMemory, MemoryError};

/// Ports that a guest may have: Linux uses about three, and eight more for each vCPU.
const MAX_PORTS: usize = 128;

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

/// A port, and the vCPU that its events are for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Channel {
    port: Port,
    vcpu: u32,
}

/// What became of a port that was made pending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Raised {
    /// The vCPU that it is for.
    pub vcpu: u32,
    /// That vCPU is to be interrupted: the port was not pending before, and is not masked.
    pub interrupts: bool,
}

/// The guest's ports and where their bits are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Events {
    channels: Vec<Channel>,
    shared_info: u64,
}

impl Events {
    pub(super) fn new(layout: &Layout) -> Self {
        let free = Channel {
            port: Port::Free,
            vcpu: 0,
        };
        let mut channels = vec![free; MAX_PORTS];
        channels[CONSOLE_PORT as usize].port = Port::Console;
        Self {
            channels,
            shared_info: layout.area + AREA_SHARED_INFO,
        }
    }

    /// Whether a decoded state is one that `new` and the hypercalls could have made.
    pub(super) fn plausible(&self, layout: &Layout, vcpus: u32) -> bool {
        self.channels.len() == MAX_PORTS
            && self.channels.iter().all(|channel| channel.vcpu < vcpus)
            && self.shared_info == layout.area + AREA_SHARED_INFO
    }

    /// Binds the first free port; port 0 is never one. The vCPU is one that there is.
    pub(super) fn bind(&mut self, port: Port, vcpu: u32) -> Option<u32> {
        if let Port::Virq(number) = port
            && let Some(bound) = self.port_of(number, Some(vcpu))
        {
            return Some(bound);
        }
        let (number, channel) = self
            .channels
            .iter_mut()
            .enumerate()
            .skip(1)
            .find(|(_, channel)| channel.port == Port::Free)?;
        *channel = Channel { port, vcpu };
        u32::try_from(number).ok()
    }

    /// Frees a port. What is pending there goes with it: the next one that gets the number must not find it.
    pub(super) fn close(&mut self, memory: &GuestMemory, port: u32) -> Result<(), MemoryError> {
        let Some(channel) = self.channels.get_mut(port as usize) else {
            return Ok(());
        };
        channel.port = Port::Free;
        let (word, bit) = place(port);
        memory
            .atomic_u64(self.shared_info + PENDING + word)?
            .fetch_and(!bit, Ordering::SeqCst);
        Ok(())
    }

    /// What a port is bound to, and the vCPU that its events are for.
    pub(super) fn bound(&self, port: u32) -> (Port, u32) {
        self.channels
            .get(port as usize)
            .map_or((Port::Free, 0), |channel| (channel.port, channel.vcpu))
    }

    /// From now on the port's events are for another vCPU, which there is. `false`: the port is bound to its vCPU for good.
    pub(super) fn move_to(&mut self, port: u32, vcpu: u32) -> bool {
        let channel = self.channels.get_mut(port as usize).filter(|channel| {
            !matches!(
                channel.port,
                Port::Free | Port::Ipi | Port::Virq(VIRQ_TIMER)
            )
        });
        channel.map(|channel| channel.vcpu = vcpu).is_some()
    }

    /// The port of a virtual interrupt: this vCPU's, or anyone's.
    pub(super) fn port_of(&self, virq: u32, vcpu: Option<u32>) -> Option<u32> {
        self.channels
            .iter()
            .position(|channel| {
                channel.port == Port::Virq(virq) && vcpu.is_none_or(|vcpu| channel.vcpu == vcpu)
            })
            .and_then(|port| u32::try_from(port).ok())
    }

    /// Makes a port pending. What is to be done about it is the caller's.
    pub(super) fn mark(&self, memory: &GuestMemory, port: u32) -> Result<Raised, MemoryError> {
        let (_, vcpu) = self.bound(port);
        let (word, bit) = place(port);
        let before = memory
            .atomic_u64(self.shared_info + PENDING + word)?
            .fetch_or(bit, Ordering::SeqCst);
        let masked = memory
            .atomic_u64(self.shared_info + MASKED + word)?
            .load(Ordering::SeqCst);
        Ok(Raised {
            vcpu,
            interrupts: (before | masked) & bit == 0,
        })
    }

    /// Whether a port is pending, masked or not.
    pub(super) fn is_pending(&self, memory: &GuestMemory, port: u32) -> Result<bool, MemoryError> {
        let (word, bit) = place(port);
        let pending = memory
            .atomic_u64(self.shared_info + PENDING + word)?
            .load(Ordering::SeqCst);
        Ok(pending & bit != 0)
    }

    /// Clears a port's mask. What came meanwhile interrupts now.
    pub(super) fn unmask(&self, memory: &GuestMemory, port: u32) -> Result<Raised, MemoryError> {
        let (_, vcpu) = self.bound(port);
        let (word, bit) = place(port);
        memory
            .atomic_u64(self.shared_info + MASKED + word)?
            .fetch_and(!bit, Ordering::SeqCst);
        Ok(Raised {
            vcpu,
            interrupts: self.is_pending(memory, port)?,
        })
    }

    /// All ports masked, as a guest expects at its start.
    pub(super) fn mask_all(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        memory.write(self.shared_info + MASKED, &[0xff; 512])
    }
}

/// Where a port's bit is: byte offset of its word, and the bit. A port that no guest can have is looked up as one.
fn place(port: u32) -> (u64, u64) {
    let port = u64::from(port) % MAX_PORTS as u64;
    (port / 64 * 8, 1 << (port % 64))
}

/// A vCPU's `struct vcpu_info`, by its guest-physical address.
#[derive(Clone, Copy, Debug)]
pub(super) struct VcpuInfo(pub u64);

impl VcpuInfo {
    /// Where a vCPU's is at first: in the shared-info page.
    pub(super) fn first(layout: &Layout, vcpu: u32) -> Self {
        Self(layout.area + AREA_SHARED_INFO + u64::from(vcpu) * VCPU_INFO)
    }

    /// Whether a decoded address can be one.
    pub(super) fn plausible(self, layout: &Layout) -> bool {
        self.0.is_multiple_of(8) && self.0 <= layout.size - VCPU_INFO
    }

    /// Tells the vCPU that this port is pending.
    pub(super) fn select(self, memory: &GuestMemory, port: u32) -> Result<(), MemoryError> {
        let (word, _) = place(port);
        memory
            .atomic_u64(self.0 + SELECTOR)?
            .fetch_or(1 << (word / 8), Ordering::SeqCst);
        memory
            .atomic_u8(self.0 + UPCALL_PENDING)?
            .store(1, Ordering::SeqCst);
        Ok(())
    }

    pub(super) fn set_masked(self, memory: &GuestMemory, masked: bool) -> Result<(), MemoryError> {
        memory.write(self.0 + UPCALL_MASK, &[u8::from(masked)])
    }

    /// Whether an event waits (whatever the mask).
    pub(super) fn pending(self, memory: &GuestMemory) -> Result<bool, MemoryError> {
        Ok(memory
            .atomic_u8(self.0 + UPCALL_PENDING)?
            .load(Ordering::SeqCst)
            != 0)
    }

    /// Whether the guest wants no events now.
    pub(super) fn masked(self, memory: &GuestMemory) -> Result<bool, MemoryError> {
        Ok(memory.read_array::<1>(self.0 + UPCALL_MASK)? != [0])
    }

    /// Moves it to where the guest wants it. `None` if that is no place for it.
    pub(super) fn moved(
        self,
        memory: &GuestMemory,
        to: u64,
        ram: u64,
    ) -> Result<Option<Self>, MemoryError> {
        if !to.is_multiple_of(8) || to.checked_add(VCPU_INFO).is_none_or(|end| end > ram) {
            return Ok(None);
        }
        let old: [u8; VCPU_INFO as usize] = memory.read_array(self.0)?;
        memory.write(to, &old)?;
        // Whatever raced with the move is found by looking at everything once.
        memory.write_u64(to + SELECTOR, u64::MAX)?;
        memory.write(to + UPCALL_PENDING, &[1])?;
        Ok(Some(Self(to)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_bounded_and_a_virq_is_bound_once_per_vcpu() {
        let layout = Layout::new(128).unwrap();
        let memory = GuestMemory::anonymous(layout.size).unwrap();
        let mut events = Events::new(&layout);
        let timer = events.bind(Port::Virq(0), 0).unwrap();
        assert_eq!(events.bind(Port::Virq(0), 0), Some(timer));
        let other = events.bind(Port::Virq(0), 1).unwrap();
        assert_ne!(timer, other);
        assert_eq!(events.port_of(0, Some(1)), Some(other));
        assert!(!events.move_to(timer, 1));
        assert!(events.plausible(&layout, 2) && !events.plausible(&layout, 1));
        while events.bind(Port::Ipi, 0).is_some() {}
        assert_eq!(events.bound(u32::MAX), (Port::Free, 0));
        events.mark(&memory, timer).unwrap();
        events.close(&memory, timer).unwrap();
        assert!(!events.is_pending(&memory, timer).unwrap());
        events.close(&memory, u32::MAX).unwrap();
        assert_eq!(events.port_of(0, Some(0)), None);
        assert_eq!(events.bind(Port::Ipi, 1), Some(timer));
    }

    #[test]
    fn a_masked_port_interrupts_only_when_unmasked() {
        let layout = Layout::new(128).unwrap();
        let memory = GuestMemory::anonymous(layout.size).unwrap();
        let mut events = Events::new(&layout);
        events.mask_all(&memory).unwrap();
        let port = events.bind(Port::Virq(20), 0).unwrap();
        assert!(events.move_to(port, 3));
        let raised = |interrupts| Raised {
            vcpu: 3,
            interrupts,
        };
        assert_eq!(events.mark(&memory, port).unwrap(), raised(false));
        assert!(events.is_pending(&memory, port).unwrap());
        assert_eq!(events.unmask(&memory, port).unwrap(), raised(true));
        assert_eq!(events.mark(&memory, port).unwrap(), raised(false));
        events.mark(&memory, u32::MAX).unwrap();
    }

    #[test]
    fn a_vcpus_info_moves_to_where_memory_is() {
        let layout = Layout::new(128).unwrap();
        let memory = GuestMemory::anonymous(layout.size).unwrap();
        let info = VcpuInfo::first(&layout, 7);
        assert!(info.plausible(&layout));
        for to in [layout.ram - 32, u64::MAX - 7, 4097] {
            assert!(info.moved(&memory, to, layout.ram).unwrap().is_none());
        }
        let info = info.moved(&memory, 4096, layout.ram).unwrap().unwrap();
        assert!(info.pending(&memory).unwrap() && !info.masked(&memory).unwrap());
    }
}
