//! What the vCPUs of a VM share, and what one may do to another: interrupt it, and make it forget its translations.
//!
//! A vCPU's thread owns its [`super::cpu::Cpu`]; everything here may be used from any of them.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use kvm_bindings::kvm_regs;
use nix::sys::pthread::Pthread;

use super::events::{Events, Port, Raised, VcpuInfo};
use super::layout::Layout;
use super::state::Facts;
use super::time::Clock;
use super::{console, events};
use crate::kvm::Vm;
use crate::machine::console::Console;
use crate::machine::crew::{lock, signal};
use crate::machine::probe::SyscallPath;
use crate::memory::{GuestMemory, MemoryError};

/// What the vCPUs of a VM share.
#[derive(Debug)]
pub(super) struct Shared {
    pub vm: Vm,
    pub layout: Layout,
    pub facts: Facts,
    pub syscall: SyscallPath,
    pub clock: Clock,
    pub hub: Mutex<Hub>,
    pub seats: Vec<Seat>,
}

/// What is changed under a lock, which nobody holds for longer than it takes to look something up.
#[derive(Debug)]
pub(super) struct Hub {
    pub events: Events,
    pub console: Console,
    /// Guest-physical address of the console's ring page.
    pub console_ring: u64,
}

impl Hub {
    /// Takes what the guest has put into the console's ring.
    pub(super) fn drain_console(&mut self, memory: &GuestMemory) -> Result<(), MemoryError> {
        console::drain(&mut self.console, memory, self.console_ring)
    }
}

/// What others may know of a vCPU and do to it.
#[derive(Debug, Default)]
pub(super) struct Seat {
    /// Guest-physical address of its `vcpu_info`.
    info: AtomicU64,
    /// The guest has switched it on.
    up: AtomicBool,
    /// The guest has said how it is to start. Only the first time counts.
    pub initialised: AtomicBool,
    /// Where it starts; taken when it does.
    pub first: Mutex<Option<First>>,
    /// Whether it runs, and if not, what it takes to wake it: a [`Place`].
    place: AtomicU8,
    /// It is in the guest, or about to be.
    in_guest: AtomicBool,
    /// It must not run on with what it has cached of page tables.
    stale: AtomicBool,
    thread: OnceLock<Pthread>,
}

/// Where a vCPU is. The order in which it goes from one to the next and looks for events, and in which others raise events
/// and look where it is, makes that none is missed: it looks after it has said that it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Place {
    /// In the guest or on its way: an event that it takes is worth a kick.
    Runs,
    /// It waits for an event, and looks for one all the time: none needs to tell it.
    Watches,
    /// It waits for an event asleep, or is switched off.
    Sleeps,
}

/// What a vCPU starts with.
#[derive(Clone, Copy, Debug)]
pub(super) struct First {
    pub regs: kvm_regs,
    pub cr3: u64,
    pub gs: u64,
}

impl Seat {
    pub(super) fn new(info: VcpuInfo, up: bool, initialised: bool) -> Self {
        Self {
            info: AtomicU64::new(info.0),
            up: AtomicBool::new(up),
            initialised: AtomicBool::new(initialised),
            place: AtomicU8::new(if up { Place::Runs } else { Place::Sleeps } as u8),
            ..Self::default()
        }
    }

    pub(super) fn info(&self) -> VcpuInfo {
        VcpuInfo(self.info.load(Ordering::Acquire))
    }

    pub(super) fn set_info(&self, info: VcpuInfo) {
        self.info.store(info.0, Ordering::Release);
    }

    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Switches it on or off. It notices when it is kicked.
    pub(super) fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::Release);
    }

    pub(super) fn place(&self) -> Place {
        match self.place.load(Ordering::SeqCst) {
            0 => Place::Runs,
            1 => Place::Watches,
            _ => Place::Sleeps,
        }
    }

    pub(super) fn set_place(&self, place: Place) {
        self.place.store(place as u8, Ordering::SeqCst);
    }

    /// From now on it belongs to this thread.
    pub(super) fn take(&self, thread: Pthread) {
        // A seat is taken once: whoever comes second is the same thread again.
        self.thread.get_or_init(|| thread);
    }

    /// Brings it back from the guest, or from waiting. What it is to see must be there already.
    pub(super) fn kick(&self) {
        if let Some(thread) = self.thread.get() {
            signal(*thread);
        }
    }

    /// Says that it goes into the guest. `true`: first it must drop what it has cached of page tables.
    ///
    /// The order matters, as in [`Shared::flush`]: whoever asks for that either sees it in the guest and kicks it, or has
    /// asked before this looks.
    pub(super) fn enter(&self) -> bool {
        self.announce();
        self.look()
    }

    fn announce(&self) {
        self.in_guest.store(true, Ordering::SeqCst);
    }

    fn look(&self) -> bool {
        self.stale.swap(false, Ordering::SeqCst)
    }

    fn mark_stale(&self) {
        self.stale.store(true, Ordering::SeqCst);
    }

    fn is_in_guest(&self) -> bool {
        self.in_guest.load(Ordering::SeqCst)
    }

    /// Says that it is back.
    pub(super) fn leave(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }

    fn runs_stale(&self) -> bool {
        self.stale.load(Ordering::SeqCst) && self.is_in_guest()
    }
}

impl Shared {
    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        self.vm.memory()
    }

    /// Whether there is but one vCPU.
    pub(super) fn is_alone(&self) -> bool {
        self.seats.len() == 1
    }

    /// A vCPU by its number, if there is one.
    pub(super) fn seat(&self, vcpu: u64) -> Option<(u32, &Seat)> {
        let index = usize::try_from(vcpu).ok()?;
        Some((u32::try_from(vcpu).ok()?, self.seats.get(index)?))
    }

    /// Whether a vCPU beside this one runs.
    pub(super) fn another_runs(&self, vcpu: u32) -> bool {
        let mut seats = (0..).zip(&self.seats);
        seats.any(|(index, seat)| index != vcpu && seat.place() == Place::Runs)
    }

    /// Makes a port pending on behalf of vCPU `by`, which looks for its own events itself.
    pub(super) fn raise(&self, by: u32, port: u32) -> Result<(), MemoryError> {
        let raised = lock(&self.hub).events.mark(self.memory(), port)?;
        self.tell(by, port, raised)
    }

    /// Makes a virtual interrupt pending, this vCPU's or anyone's; nothing if the guest has not bound it.
    pub(super) fn raise_virq(
        &self,
        by: u32,
        virq: u32,
        vcpu: Option<u32>,
    ) -> Result<(), MemoryError> {
        let port = lock(&self.hub).events.port_of(virq, vcpu);
        port.map_or(Ok(()), |port| self.raise(by, port))
    }

    /// Clears a port's mask.
    pub(super) fn unmask(&self, by: u32, port: u32) -> Result<(), MemoryError> {
        let raised = lock(&self.hub).events.unmask(self.memory(), port)?;
        self.tell(by, port, raised)
    }

    fn tell(&self, by: u32, port: u32, raised: Raised) -> Result<(), MemoryError> {
        let Some((vcpu, seat)) = self.seat(raised.vcpu.into()) else {
            return Ok(());
        };
        if raised.interrupts {
            seat.info().select(self.memory(), port)?;
        }
        let kicked = match seat.place() {
            Place::Runs => raised.interrupts,
            Place::Watches => false,
            // Even if the port is masked: the vCPU may be waiting for just this one (`SCHEDOP_poll`).
            Place::Sleeps => true,
        };
        if vcpu != by && kicked {
            seat.kick();
        }
        Ok(())
    }

    pub(super) fn port(&self, port: u32) -> (Port, u32) {
        lock(&self.hub).events.bound(port)
    }

    /// Comes back when none of these vCPUs (a set of bits) runs on with what it has cached of page tables.
    pub(super) fn flush(&self, by: u32, vcpus: u64) {
        let others = || {
            (0_u32..)
                .zip(&self.seats)
                .filter(move |(vcpu, _)| *vcpu != by && vcpus >> vcpu & 1 == 1)
                .map(|(_, seat)| seat)
        };
        for seat in others() {
            seat.mark_stale();
            if seat.is_in_guest() {
                seat.kick();
            }
        }
        for seat in others() {
            while seat.runs_stale() {
                std::thread::yield_now();
            }
        }
    }

    /// Writes the clock's formula where a vCPU reads it.
    pub(super) fn publish_clock(&self, vcpu: u32) -> Result<(), MemoryError> {
        match self.seat(vcpu.into()) {
            Some((_, seat)) => self
                .clock
                .publish(self.memory(), seat.info().0 + events::TIME),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_that_comes_back_after_it_was_told_has_dropped_its_translations() {
        let seat = Seat::default();
        assert!(!seat.enter());
        seat.mark_stale();
        assert!(seat.runs_stale());
        seat.leave();
        assert!(!seat.runs_stale());
        assert!(seat.enter());
        assert!(!seat.runs_stale());
    }

    /// Every way in which two steps of a vCPU that goes into the guest and two of one that asks it to forget can mix: the
    /// first must look, or the second must see that it has to kick. How many times neither happened.
    fn lost(enter: [fn(&Seat) -> bool; 2], ask: [fn(&Seat) -> bool; 2]) -> usize {
        // Which of the four moments are the first vCPU's.
        let orders = [
            [true, true, false, false],
            [true, false, true, false],
            [true, false, false, true],
            [false, true, true, false],
            [false, true, false, true],
            [false, false, true, true],
        ];
        let unseen = orders.into_iter().filter(|order| {
            let seat = Seat::default();
            let (mut enter, mut ask) = (enter.iter(), ask.iter());
            let noticed = order.map(|first| {
                let step = if first { enter.next() } else { ask.next() };
                step.is_some_and(|step| step(&seat))
            });
            !noticed.contains(&true)
        });
        unseen.count()
    }

    #[test]
    fn one_that_is_to_forget_looks_or_is_kicked_and_either_order_swapped_loses_it() {
        let announce = |seat: &Seat| {
            seat.announce();
            false
        };
        let look = |seat: &Seat| seat.look();
        let mark = |seat: &Seat| {
            seat.mark_stale();
            false
        };
        let check = |seat: &Seat| seat.is_in_guest();
        assert_eq!(lost([announce, look], [mark, check]), 0);
        assert!(lost([look, announce], [mark, check]) > 0);
        assert!(lost([announce, look], [check, mark]) > 0);
    }
}
