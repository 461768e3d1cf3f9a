//! What `serve` orders, and how it is done.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::time::{ClockId, clock_gettime};

use super::vm::{Saving, Vm};
use super::{End, SPAWNED, Worker, log, signals};
use crate::jail;
use crate::machine::{self, BootConfig, Machine};
use crate::memory::keep_pagemap_open;
use crate::protocol::{Boot, Order, Report, Restore, Stats};
use crate::snapshot::{self, FrozenMemory, PageMap, State, working_set};
use crate::wire::Wire;

/// How long an order to save may wait for a guest that is at a bad point.
const SAVE_PATIENCE: Duration = Duration::from_secs(2);

/// When this process was started: what `serve` says, or now.
pub(super) fn process_start() -> Instant {
    let now = Instant::now();
    let since = || {
        let spawned: u128 = std::env::var(SPAWNED).ok()?.parse().ok()?;
        let clock = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).ok()?).as_nanos();
        u64::try_from(clock.checked_sub(spawned)?).ok()
    };
    since()
        .and_then(|ago| now.checked_sub(Duration::from_nanos(ago)))
        .unwrap_or(now)
}

/// Takes the time of one phase after the other.
struct Phases {
    started: Instant,
    last: Instant,
    us: BTreeMap<String, u64>,
}

impl Phases {
    fn new(started: Instant) -> Self {
        Self {
            started,
            last: Instant::now(),
            us: BTreeMap::new(),
        }
    }

    fn end(&mut self, name: &str) {
        let now = Instant::now();
        self.us.insert(
            name.to_owned(),
            now.duration_since(self.last).as_micros() as u64,
        );
        self.last = now;
    }

    fn total(mut self) -> BTreeMap<String, u64> {
        let total = self.started.elapsed().as_micros() as u64;
        self.us.insert("total".to_owned(), total);
        self.us
    }
}

impl Worker {
    pub(super) fn on_order(&mut self, order: Order) -> Result<(), End> {
        let result = match order {
            Order::Stop => return Err(End::Stopped),
            Order::Boot(boot) => self.boot(&boot),
            Order::Restore(restore) => self.restore(&restore),
            Order::Agent { message } => self.vm().and_then(|vm| Ok(vm.order(&message)?)),
            Order::Save => self.save(false),
            Order::Freeze => self.save(true),
            Order::Touched => self.touched(),
            Order::Stats => self.stats(),
        };
        self.socket.forget_fds();
        match result {
            Ok(()) => Ok(()),
            Err(error) => {
                let reason = format!("{error:#}");
                log::line(&format!("refused: {reason}"));
                self.say(&Report::Refused { reason })
            }
        }
    }

    fn vm(&mut self) -> anyhow::Result<&mut Vm> {
        self.vm.as_mut().context("there is no VM yet")
    }

    fn fd(&mut self, what: &str) -> anyhow::Result<OwnedFd> {
        self.socket
            .take_fd()
            .with_context(|| format!("the order came without the descriptor of the {what}"))
    }

    fn boot(&mut self, boot: &Boot) -> anyhow::Result<()> {
        anyhow::ensure!(self.vm.is_none(), "this worker has a VM already");
        let mut phases = Phases::new(self.started);
        let kernel = File::from(self.fd("kernel")?);
        let initramfs = File::from(self.fd("initramfs")?);
        let probe = machine::probe();
        phases.end("probe");
        let Some(kind) = boot.machine.or(probe.kind) else {
            anyhow::bail!("this host cannot run VMs: {}", probe.facts.join("; "));
        };
        let config = BootConfig {
            memory_mib: boot.memory_mib,
            vcpus: boot.vcpus,
            cmdline: &boot.cmdline,
            kernel: &kernel,
            initramfs: &initramfs,
            tuning: boot.tuning,
            probe: &probe,
        };
        let machine = machine::boot(kind, &config)?;
        phases.end("boot");
        let wire = Wire::new(machine.memory().clone());
        self.start(machine, wire, phases)
    }

    fn restore(&mut self, restore: &Restore) -> anyhow::Result<()> {
        anyhow::ensure!(self.vm.is_none(), "this worker has a VM already");
        let mut phases = Phases::new(self.started);
        let state = State::read(&File::from(self.fd("state")?))?;
        let memory = self.frozen_memory(restore)?;
        let pages = if restore.working_set {
            working_set::read(&File::from(self.fd("working set")?))?
        } else {
            Vec::new()
        };
        phases.end("read");
        let machine = machine::restore(state.machine, &state.blob, &memory, restore.tuning)?;
        anyhow::ensure!(
            machine.memory().size() == state.memory_bytes,
            "the state is of a VM with {} bytes of memory, not {}",
            state.memory_bytes,
            machine.memory().size()
        );
        phases.end("restore");
        machine.memory().prefault(&pages)?;
        phases.end("prefault");
        let wire = Wire::restored(
            machine.memory().clone(),
            restore.generation,
            state.wire_header,
        )?;
        self.start(machine, wire, phases)?;
        // The agent looks at the generation when it is rung for.
        self.vm()?.interrupt();
        Ok(())
    }

    fn frozen_memory(&mut self, restore: &Restore) -> anyhow::Result<FrozenMemory> {
        let base = File::from(self.fd("memory")?);
        let Some(count) = restore.overlays else {
            return Ok(FrozenMemory::whole(base));
        };
        let map = PageMap::read(&File::from(self.fd("page map")?))?;
        let files = (0..count)
            .map(|_| Ok(File::from(self.fd("pages")?)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(FrozenMemory::layered(base, map, files))
    }

    fn start(
        &mut self,
        mut machine: Box<dyn Machine>,
        wire: Wire,
        mut phases: Phases,
    ) -> anyhow::Result<()> {
        keep_pagemap_open().context("opening /proc/self/pagemap")?;
        // Everything is open by now, and nothing of the guest has run.
        jail::enter()?;
        phases.end("jail");
        self.alarm.watch(machine.interrupt_handle());
        self.vm = Some(Vm::new(machine, wire, Instant::now()));
        let report = Report::Running {
            phases_us: phases.total(),
        };
        self.say(&report)
            .map_err(|_| anyhow::anyhow!("the report is too long"))
    }

    fn save(&mut self, only_private: bool) -> anyhow::Result<()> {
        let state = File::from(self.fd("state")?);
        let memory = File::from(self.fd("memory")?);
        let list = match only_private {
            true => Some(File::from(self.fd("list")?)),
            false => None,
        };
        let vm = self.vm()?;
        anyhow::ensure!(vm.saving.is_none(), "the VM is being saved already");
        anyhow::ensure!(
            vm.wire.header().is_some(),
            "the agent has not said where its wire is, so the VM could not be talked to after a restore"
        );
        vm.saving = Some(Saving {
            state,
            memory,
            list,
            until: Instant::now() + SAVE_PATIENCE,
        });
        Ok(())
    }

    /// Carries out an order to save, if there is one and the moment is good.
    pub(super) fn save_if_asked(&mut self) -> Result<(), End> {
        let Some(vm) = &mut self.vm else {
            return Ok(());
        };
        let Some(saving) = vm.saving.take() else {
            return Ok(());
        };
        let now = Instant::now();
        let late = now >= saving.until;
        // A halted guest is always at a good point. Another may be: try that only when time runs short.
        let hurry = saving.until.saturating_duration_since(now) < SAVE_PATIENCE / 2;
        if !vm.is_halted() && !vm.machine.is_well_placed() && !hurry {
            vm.saving = Some(saving);
            return Ok(());
        }
        let saved = save(vm, &saving);
        // Saving may have used up a signal.
        signals::pretend_news();
        match saved {
            Ok(report) => self.say(&report),
            Err(error) if !late && !vm.is_halted() => {
                log::line(&format!("not saved yet: {error:#}"));
                vm.saving = Some(saving);
                Ok(())
            }
            Err(error) => self.say(&Report::Refused {
                reason: format!("{error:#}"),
            }),
        }
    }

    fn touched(&mut self) -> anyhow::Result<()> {
        let file = File::from(self.fd("list")?);
        let pages = self.vm()?.machine.memory().private_pages()?;
        working_set::write(&file, &pages)?;
        self.tell(&Report::Touched {
            pages: pages.len() as u64,
        })
    }

    fn stats(&mut self) -> anyhow::Result<()> {
        let vm = self.vm()?;
        let stats = Stats {
            private_pages: vm.machine.memory().private_pages()?.len() as u64,
            cpu_us: Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?).as_micros()
                as u64,
            exits: vm.machine.exits(),
        };
        self.tell(&Report::Stats(stats))
    }

    fn tell(&mut self, report: &Report) -> anyhow::Result<()> {
        self.say(report)
            .map_err(|_| anyhow::anyhow!("the answer is longer than a frame"))
    }
}

fn save(vm: &mut Vm, saving: &Saving) -> anyhow::Result<Report> {
    let began = Instant::now();
    let state = State {
        machine: vm.machine.kind(),
        memory_bytes: vm.machine.memory().size(),
        wire_header: vm.wire.header().context("the wire is not up")?,
        blob: vm.machine.save()?,
    };
    let state_bytes = state.write(&saving.state)?;
    let memory = vm.machine.memory();
    let memory = match &saving.list {
        Some(list) => snapshot::save_private(memory, &saving.memory, list)?,
        None => snapshot::save_memory(memory, &saving.memory)?,
    };
    Ok(Report::Saved {
        state_bytes,
        memory_bytes: memory.bytes,
        pages: memory.pages,
        pause_us: began.elapsed().as_micros() as u64,
    })
}
