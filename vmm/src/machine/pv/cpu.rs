//! One vCPU of a `pv` VM, and running it. The first one's thread is the machine's, each other one has its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::pthread::pthread_self;
use serde::{Deserialize, Serialize};

use super::layout::*;
use super::setup;
use super::shared::{Place, Seat, Shared};
use super::state::SavedCpu;
use crate::kvm::kick::{self, KickTimer};
use crate::kvm::{InterruptHandle, KvmError, Stop, Vcpu};
use crate::machine::Exit;
use crate::machine::crew::{Crew, Member, lock};
use crate::memory::GuestMemory;

/// A bit of CR3 that means nothing here (the page table's cache policy). KVM drops all that it knows of a vCPU's page
/// tables when it is told of another CR3, which no other request from outside the guest makes it do.
const CR3_TOGGLED: u64 = 8;

/// How long a vCPU that has nothing to do looks for events before it sleeps, while another runs: about what it takes the
/// host to wake a thread. A yield between two looks leaves the processor to whoever else wants it.
const WATCH: Duration = Duration::from_micros(100);

/// What a vCPU that does not run waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Wait {
    /// Nothing: it runs.
    No,
    /// The guest's word that it is switched on.
    Up,
    /// Any event.
    Event,
    /// This port (`SCHEDOP_poll`), or an event that it would take.
    Port(u32),
}

/// What the guest has set up for a vCPU, besides registers.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Own {
    /// When its timer fires, in the guest's time.
    pub deadline: Option<u64>,
    /// Guest-physical address of the copy of the clock's formula that user space reads.
    pub time_area: Option<u64>,
    /// CR4 as the guest wrote it.
    pub cr4: u64,
    pub wait: Wait,
}

/// One vCPU. Fields are dropped in this order: the timer first, so that it fires at nothing.
#[derive(Debug)]
pub(super) struct Cpu {
    timer: Option<KickTimer>,
    pub vcpu: Vcpu,
    pub index: u32,
    pub area: AreaCopy,
    pub shared: Arc<Shared>,
    pub own: Own,
    pub counts: Counts,
    /// Registers to load before the first run.
    saved: Option<Box<SavedCpu>>,
    /// Deadline (guest time) that the timer is armed for.
    pub armed: Option<u64>,
    /// It stopped at a port and may be in the middle of the instruction.
    pub at_port: bool,
    /// An event waits for the guest to be where it can be delivered.
    pub retry: bool,
    /// Times in a row that it was not there.
    pub tries: u32,
    /// Times in a row that an event was held back for what looks like a breakpoint.
    pub postponed: u32,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub hypercalls: u64,
    pub emulated: u64,
    pub doorbells: u64,
    pub interrupts: u64,
    pub retries: u64,
    pub idles: u64,
    pub refused_ports: u64,
}

impl Cpu {
    /// One that waits to [`arrive`](Member::arrive) on its thread.
    pub(super) fn new(
        vcpu: Vcpu,
        index: u32,
        shared: &Arc<Shared>,
        own: Own,
        saved: Option<SavedCpu>,
    ) -> Self {
        Self {
            timer: None,
            vcpu,
            index,
            area: shared.layout.copy(index),
            shared: shared.clone(),
            own,
            counts: Counts::default(),
            saved: saved.map(Box::new),
            armed: None,
            at_port: false,
            retry: false,
            tries: 0,
            postponed: 0,
        }
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        self.shared.memory()
    }

    pub(super) fn seat(&self) -> &Seat {
        &self.shared.seats[self.index as usize]
    }

    pub(super) fn comm(&self, field: u64) -> u64 {
        self.memory().read_u64(self.area.comm(field)).unwrap_or(0)
    }

    pub(super) fn set_comm(&self, field: u64, value: u64) -> anyhow::Result<()> {
        Ok(self.memory().write_u64(self.area.comm(field), value)?)
    }

    pub(super) fn timer(&self) -> anyhow::Result<&KickTimer> {
        let timer = self.timer.as_ref();
        timer.ok_or_else(|| anyhow::anyhow!("vCPU {} has no timer yet", self.index))
    }

    pub(super) fn disarm(&mut self) {
        if let Some(timer) = self.timer.as_ref().filter(|_| self.armed.is_some()) {
            timer.disarm();
        }
        self.armed = None;
    }

    /// Runs until something needs the thread that called this: [`Exit::Idle`] is for [`Self::sleep`].
    pub(super) fn run(&mut self) -> anyhow::Result<Exit> {
        kick::attach(self.vcpu.interrupt_handle());
        self.seat().set_place(Place::Runs);
        self.check_deadline()?;
        if self.own.wait == Wait::No {
            self.deliver_event()?;
        }
        loop {
            if self.own.wait != Wait::No
                && let Some(exit) = self.still_idle()?
            {
                return Ok(exit);
            }
            self.arm_timer()?;
            match self.enter()? {
                Stop::Out { port, value } => {
                    if let Some(exit) = self.port_written(port, value)? {
                        return Ok(exit);
                    }
                }
                Stop::In { .. } => {
                    self.vcpu.answer_in(0xff);
                    if !in_shim(self.vcpu.regs().rip) {
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
                    let words = lock(&self.shared.hub).console.last_words();
                    return Ok(Exit::Crashed(format!("triple fault: {words}")));
                }
                Stop::Failed(why) => {
                    let rip = self.vcpu.regs().rip;
                    return Ok(Exit::Crashed(format!(
                        "KVM cannot run the guest on at {rip:#x}: {why}"
                    )));
                }
            }
        }
    }

    fn enter(&mut self) -> Result<Stop, KvmError> {
        if self.shared.is_alone() {
            return self.vcpu.run();
        }
        if self.seat().enter() {
            self.vcpu.sregs_mut().cr3 ^= CR3_TOGGLED;
        }
        let stop = self.vcpu.run();
        self.seat().leave();
        stop
    }

    /// Whether the halted guest has something to do; if not, until when.
    fn still_idle(&mut self) -> anyhow::Result<Option<Exit>> {
        self.check_deadline()?;
        if self.has_come()? {
            // It goes on in the shim, which looks for events itself, unless it has never run.
            if self.own.wait == Wait::Up {
                self.load_first();
            }
            self.own.wait = Wait::No;
            return Ok(None);
        }
        self.counts.idles += 1;
        self.disarm();
        let left = self
            .own
            .deadline
            .map(|deadline| Duration::from_nanos(deadline.saturating_sub(self.shared.clock.now())));
        Ok(Some(Exit::Idle {
            deadline: left.and_then(|left| Instant::now().checked_add(left)),
        }))
    }

    /// Loads what it starts with, if it has not started yet.
    fn load_first(&mut self) {
        let Some(first) = lock(&self.seat().first).take() else {
            return;
        };
        *self.vcpu.regs_mut() = first.regs;
        let sregs = self.vcpu.sregs_mut();
        (sregs.cr3, sregs.gs.base) = (first.cr3, first.gs);
    }

    /// Whether what it waits for is there.
    fn has_come(&self) -> anyhow::Result<bool> {
        let (memory, info) = (self.memory(), self.seat().info());
        Ok(match self.own.wait {
            Wait::No => true,
            Wait::Up => self.seat().is_up(),
            Wait::Event => info.pending(memory)?,
            Wait::Port(port) => {
                lock(&self.shared.hub).events.is_pending(memory, port)?
                    || info.pending(memory)? && !info.masked(memory)?
            }
        })
    }

    /// Waits for an event or a signal, or until then; a while of it awake if there is another vCPU that could send one.
    pub(super) fn sleep(&mut self, deadline: Option<Instant>) -> anyhow::Result<()> {
        let awake_until = Instant::now()
            + deadline.map_or(WATCH, |at| {
                WATCH.min(at.saturating_duration_since(Instant::now()))
            });
        self.seat().set_place(Place::Watches);
        while self.shared.another_runs(self.index) && Instant::now() < awake_until {
            if self.has_come()? || self.vcpu.is_interrupted() {
                return Ok(());
            }
            std::thread::yield_now();
        }
        // Before the last look: whoever raises an event after that look sees that it must kick.
        self.seat().set_place(Place::Sleeps);
        if self.has_come()? {
            return Ok(());
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        Ok(self.vcpu.wait(left)?)
    }

    /// Its state, to be restored from. It must be settled.
    pub(super) fn save(&mut self) -> anyhow::Result<SavedCpu> {
        self.postponed = 0;
        anyhow::ensure!(
            !self.breakpoint_may_be_in_flight(),
            "the guest may be in the middle of a breakpoint: run it on and retry"
        );
        anyhow::ensure!(
            lock(&self.seat().first).is_none(),
            "the guest has just switched a vCPU on: run it on and retry"
        );
        let vcpu = &self.vcpu;
        Ok(SavedCpu {
            info: self.seat().info().0,
            up: self.seat().is_up(),
            initialised: self.seat().initialised.load(Ordering::SeqCst),
            own: self.own,
            regs: *vcpu.regs(),
            sregs: *vcpu.sregs(),
            events: *vcpu.events(),
            xsave: vcpu.xsave()?,
            xcr0: vcpu.xcrs()?.xcrs[0].value,
        })
    }
}

impl Member for Cpu {
    fn arrive(&mut self) -> anyhow::Result<()> {
        self.seat().take(pthread_self());
        self.timer = Some(KickTimer::new()?);
        if let Some(saved) = self.saved.take() {
            setup::load_vcpu(&mut self.vcpu, &saved)?;
        }
        Ok(())
    }

    fn handle(&mut self) -> InterruptHandle {
        self.vcpu.interrupt_handle()
    }

    fn work(&mut self, crew: &Crew) -> Option<Exit> {
        while crew.goes() {
            let slept = match self.run() {
                Ok(Exit::Interrupted) => Ok(()),
                Ok(Exit::Idle { deadline }) => self.sleep(deadline),
                Ok(Exit::Doorbell(word)) => {
                    crew.post(Exit::Doorbell(word));
                    Ok(())
                }
                Ok(end) => return Some(end),
                Err(error) => Err(error),
            };
            if let Err(error) = slept {
                return Some(Exit::Crashed(format!("{error:#}")));
            }
        }
        None
    }

    fn settle(&mut self) -> anyhow::Result<()> {
        self.vcpu.settle()?;
        self.at_port = false;
        Ok(())
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        kick::detach(self.vcpu.interrupt_handle());
    }
}
