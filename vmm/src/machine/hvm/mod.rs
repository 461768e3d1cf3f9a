//! The `hvm` machine: hardware virtualization runs the kernel's ring 0, as on most KVM hosts.
//!
//! The same kernel, initramfs and agent as on the `pv` machine, started at the kernel's ordinary 64-bit entry. There
//! is as little hardware as that kernel can do with: local APICs and a clock in KVM; a UART for the console, an I/O APIC that
//! is a table, a parallel port whose interrupt is the agent's bell, a doorbell port and a reset line
//! here. No PIC, PIT, PCI, ACPI, RTC or keyboard.
//!
//! The first vCPU runs on the machine's thread, each other one on its own ([`vcpus`]). When the guest is idle it
//! is halted inside `KVM_RUN`: KVM has its timers, and a signal or the bell's eventfd wakes it.

mod bell;
mod cpuid;
mod devices;
mod ioapic;
mod layout;
mod start;
mod state;
mod vcpus;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::crew::{Crew, Others, lock};
use super::{BootConfig, Exit, Machine, MachineKind};
use crate::kvm::apic::ApicVm;
use crate::kvm::kick::{self, KickTimer};
use crate::kvm::vcpu_state::{MSR_TSC, VcpuState};
use crate::kvm::{Host, InterruptHandle, Stop, Vcpu};
use crate::memory::GuestMemory;
use crate::snapshot::FrozenMemory;
use devices::{Asked, Devices, SavedDevices};
use layout::Layout;
use state::Saved;
use vcpus::OtherVcpu;

/// Most vCPUs of a VM: what the API's largest `vcpu_count` is.
pub const MAX_VCPUS: u32 = 8;

/// Kernel command line that this machine wants; more may be appended.
///
/// `reboot=k` pulls the reset line, which is how a guest ends; `panic=-1` makes it do so at a panic instead of hanging.
/// `mitigations=off` because what they protect, kernel from process, is no boundary here. The rest tells the kernel not
/// to look for what is not there: PCI, a keyboard, a second serial port, and an RTC, for which it would wait.
pub const CMDLINE: &str = "console=ttyS0 mitigations=off quiet reboot=k panic=-1 oops=panic pci=off acpi=off \
     i8042.noaux i8042.nokbd 8250.nr_uarts=1 no_timer_check tsc=reliable initcall_blacklist=cmos_init";

/// How long after its last word the guest is first looked at, whether it has halted for good; then after twice the
/// time, and so on until it has been silent for [`STILL_ALIVE`], in which any kernel has done what it does before it halts.
const LAST_WORD: Duration = Duration::from_millis(20);
const STILL_ALIVE: Duration = Duration::from_secs(10);

/// PG, AM off, WP, NE, ET, PE: long mode with paging.
const CR0: u64 = 0x8001_0031;
/// PAE.
const CR4: u64 = 0x20;
/// Long mode, enabled and active.
const EFER: u64 = 0x500;
/// `IA32_MISC_ENABLE`: fast string instructions. `IA32_MTRR_DEF_TYPE`: enabled, write-back.
const FIRST_MSRS: [(u32, u64); 2] = [(0x1a0, 1), (0x2ff, 0x806)];

/// One VM. Fields are dropped in this order: threads before the VM that they run.
#[derive(Debug)]
pub struct HvmMachine {
    timer: KickTimer,
    others: Others<OtherVcpu>,
    vcpu: Vcpu,
    crew: Arc<Crew>,
    shared: Arc<Shared>,
    /// Kept open for what saving asks of it.
    host: Host,
    memory_mib: u32,
    counts: Counts,
    /// When the guest last printed something, unless that is too long ago to matter.
    printed: Option<Instant>,
    ended: bool,
}

/// What the threads of a VM share.
#[derive(Debug)]
struct Shared {
    vm: ApicVm,
    devices: Mutex<Devices>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    doorbells: u64,
    devices: u64,
    interrupts: u64,
}

/// Boots a VM: see [`super::boot`].
///
/// # Errors
/// As there.
pub fn boot(config: &BootConfig<'_>) -> anyhow::Result<HvmMachine> {
    let layout = Layout::new(config.memory_mib)?;
    let memory = Arc::new(GuestMemory::anonymous(layout.size)?);
    memory.prefer_huge_pages();
    let entry = start::load(
        &memory,
        &layout,
        config.vcpus,
        config.kernel,
        config.initramfs,
        config.cmdline,
    )?;
    let host = Host::open()?;
    let (vm, mut vcpus) = host.create_apic_vm(memory, config.vcpus)?;
    let supported = host.supported_cpuid()?;
    for (index, vcpu) in (0..).zip(&vcpus) {
        let leaves = cpuid::of_vcpu(&supported, index, config.vcpus);
        let leaves = kvm_bindings::CpuId::from_entries(&leaves)
            .ok()
            .context("KVM supports more CPUID leaves than it takes")?;
        vcpu.set_cpuid(&leaves)?;
        vcpu.set_msrs(&FIRST_MSRS)?;
    }
    set_first_registers(&mut vcpus[0], entry)?;
    HvmMachine::new(host, vm, vcpus, config.memory_mib, SavedDevices::default())
}

fn set_first_registers(vcpu: &mut Vcpu, entry: u64) -> anyhow::Result<()> {
    vcpu.fetch()?;
    let flat = kvm_bindings::kvm_segment {
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_bindings::kvm_segment {
        selector: 0x18,
        type_: 3,
        db: 1,
        ..flat
    };
    let sregs = vcpu.sregs_mut();
    sregs.cs = kvm_bindings::kvm_segment {
        selector: 0x10,
        type_: 11,
        l: 1,
        ..flat
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (layout::GDT, 0x1f);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, layout::PML4, CR4, EFER);
    let regs = vcpu.regs_mut();
    (regs.rip, regs.rsi, regs.rflags) = (entry, layout::BOOT_PARAMS, 2);
    Ok(())
}

/// Restores a VM: see [`super::restore`].
///
/// # Errors
/// As there.
pub fn restore(state: &[u8], memory: &FrozenMemory) -> anyhow::Result<HvmMachine> {
    // The order: what can be refused is, before memory is touched; then memory, interrupts, vCPUs; the rate of the time
    // stamp counter before the counter; the clock before any vCPU runs, and word of the pause last, when it counts.
    let (saved, layout) = state::decode(state)?;
    let host = Host::open()?;
    let here = cpuid::of_vcpu(&host.supported_cpuid()?, 0, 1);
    for vcpu in &saved.vcpus {
        cpuid::check(&vcpu.cpuid, &here)?;
    }
    let memory = Arc::new(memory.view(layout.size)?);
    let (vm, mut vcpus) = host.create_apic_vm(memory, u32::try_from(saved.vcpus.len())?)?;
    for (vcpu, saved_vcpu) in vcpus.iter_mut().zip(&saved.vcpus) {
        set_rate(&host, vcpu, saved.tsc_khz)?;
        saved_vcpu
            .give(vcpu, host.xsave_bytes())
            .context("restoring a vCPU")?;
    }
    vm.set_clock(saved.clock)?;
    for vcpu in &vcpus {
        vcpu.announce_pause()?;
    }
    HvmMachine::new(host, vm, vcpus, saved.memory_mib, saved.devices)
}

fn set_rate(host: &Host, vcpu: &Vcpu, saved_khz: u32) -> anyhow::Result<()> {
    let here = vcpu.tsc_khz()?;
    if !state::must_scale(saved_khz, here) {
        return Ok(());
    }
    anyhow::ensure!(
        host.scales_tsc(),
        "the VM was saved where time stamps count at {saved_khz} kHz, here they count at {here} kHz, and this host's processor cannot scale them: build the template on this host"
    );
    Ok(vcpu.set_tsc_khz(saved_khz)?)
}

impl HvmMachine {
    fn new(
        host: Host,
        vm: ApicVm,
        mut vcpus: Vec<Vcpu>,
        memory_mib: u32,
        devices: SavedDevices,
    ) -> anyhow::Result<Self> {
        let devices = Devices::new(devices)?;
        devices.connect(&vm)?;
        let shared = Arc::new(Shared {
            vm,
            devices: Mutex::new(devices),
        });
        let crew = Arc::new(Crew::new());
        let others = vcpus.split_off(1).into_iter().map(|vcpu| OtherVcpu {
            vcpu,
            shared: shared.clone(),
        });
        Ok(Self {
            timer: KickTimer::new()?,
            others: Others::new(&crew, others.collect())?,
            vcpu: vcpus.pop().context("a VM without vCPUs")?,
            crew,
            shared,
            host,
            memory_mib,
            counts: Counts::default(),
            printed: None,
            ended: false,
        })
    }

    fn run_guest(&mut self) -> anyhow::Result<Exit> {
        kick::attach(self.vcpu.interrupt_handle());
        self.others.resume();
        loop {
            if let Some(exit) = self.crew.next_mail() {
                return Ok(exit);
            }
            let stop = self.vcpu.run()?;
            if stop == Stop::Interrupted {
                self.counts.interrupts += 1;
                if self.has_halted_for_good()? {
                    return Ok(self.shared.ended());
                }
                return Ok(Exit::Interrupted);
            }
            self.counts.devices += 1;
            match self.shared.serve(&mut self.vcpu, stop) {
                Ok(Asked::Doorbell(word)) => {
                    self.counts.doorbells += 1;
                    return Ok(Exit::Doorbell(word));
                }
                Ok(Asked::Reset) => return Ok(self.shared.ended()),
                Ok(Asked::Printed) => {
                    self.printed = Some(Instant::now());
                    self.look_after(LAST_WORD);
                }
                Ok(Asked::Nothing | Asked::Route) => {}
                Err(error) => return Ok(Exit::Crashed(format!("{error:#}"))),
            }
        }
    }

    /// Whether the guest switched itself off. Without ACPI a kernel has no other way to do that than to say so on the
    /// console and to halt its first processor with interrupts off.
    fn has_halted_for_good(&mut self) -> anyhow::Result<bool> {
        let Some(printed) = self.printed else {
            return Ok(false);
        };
        if self.vcpu.is_dead()? {
            return Ok(true);
        }
        match printed.elapsed() {
            silent if silent < STILL_ALIVE => self.look_after(silent.max(LAST_WORD)),
            _ => self.printed = None,
        }
        Ok(false)
    }

    fn look_after(&self, pause: Duration) {
        self.timer
            .arm(u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX));
    }
}

impl Shared {
    /// Answers whatever made a vCPU stop.
    ///
    /// # Errors
    /// The guest cannot go on.
    fn serve(&self, vcpu: &mut Vcpu, stop: Stop) -> anyhow::Result<Asked> {
        let asked = match stop {
            Stop::Out { port, value } => lock(&self.devices).port_written(port, value),
            Stop::In { port } => {
                let byte = lock(&self.devices).port_read(port);
                vcpu.answer_in(byte);
                Asked::Nothing
            }
            Stop::MmioRead { address } => {
                let value = lock(&self.devices).memory_read(address);
                vcpu.answer_mmio(value);
                Asked::Nothing
            }
            Stop::MmioWrite { address, value } => {
                let mut devices = lock(&self.devices);
                let asked = devices.memory_written(address, value);
                if asked == Asked::Route {
                    devices.route(&self.vm)?;
                }
                asked
            }
            Stop::Interrupted => Asked::Nothing,
            Stop::Halted => anyhow::bail!("the guest halted outside KVM's local APIC"),
            Stop::TripleFault => {
                let words = lock(&self.devices).console().last_words();
                anyhow::bail!("triple fault: {words}")
            }
            Stop::Failed(why) => {
                let rip = vcpu.regs().rip;
                anyhow::bail!("KVM cannot run the guest on at {rip:#x}: {why}")
            }
        };
        Ok(asked)
    }

    /// How a guest ended that reset or halted its machine.
    fn ended(&self) -> Exit {
        match lock(&self.devices).console().panic() {
            Some(words) => Exit::Crashed(format!("the guest kernel panicked: {words}")),
            None => Exit::Shutdown,
        }
    }
}

impl Machine for HvmMachine {
    fn kind(&self) -> MachineKind {
        MachineKind::Hvm
    }

    fn run(&mut self) -> anyhow::Result<Exit> {
        anyhow::ensure!(!self.ended, "the guest has ended");
        let exit = self.run_guest()?;
        if matches!(exit, Exit::Shutdown | Exit::Crashed(_)) {
            self.ended = true;
            self.others.pause();
            self.timer.disarm();
        }
        Ok(exit)
    }

    fn raise_wire(&mut self) {
        if let Err(error) = lock(&self.shared.devices).ring() {
            tracing::error!(%error, "the wire's interrupt is lost");
        }
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        self.shared.vm.memory()
    }

    fn save(&mut self) -> anyhow::Result<Vec<u8>> {
        self.others.pause();
        self.vcpu.settle()?;
        anyhow::ensure!(
            !self.crew.has_mail(),
            "the guest wants something just now: run it on and retry"
        );
        let (msrs, xsave_bytes) = (self.host.msr_list()?, self.host.xsave_bytes());
        let first = VcpuState::take(&self.vcpu, msrs.as_slice(), xsave_bytes)?;
        let tsc = first.msr(MSR_TSC);
        let mut states = vec![first];
        for member in self.others.members() {
            let mut state = VcpuState::take(&member.vcpu, msrs.as_slice(), xsave_bytes)?;
            // They counted as one. Read one after the other they differ, and would count apart after a restore.
            for (index, value) in &mut state.msrs {
                if let (MSR_TSC, Some(tsc)) = (*index, tsc) {
                    *value = tsc;
                }
            }
            states.push(state);
        }
        state::encode(&Saved {
            memory_mib: self.memory_mib,
            tsc_khz: self.vcpu.tsc_khz()?,
            clock: self.shared.vm.clock()?,
            vcpus: states,
            devices: lock(&self.shared.devices).save(),
        })
    }

    fn is_well_placed(&self) -> bool {
        true
    }

    fn take_console(&mut self) -> Vec<u8> {
        lock(&self.shared.devices).console().take()
    }

    fn interrupt_handle(&mut self) -> InterruptHandle {
        self.vcpu.interrupt_handle()
    }

    fn exits(&self) -> BTreeMap<String, u64> {
        let Counts {
            doorbells,
            devices,
            interrupts,
        } = self.counts;
        [
            ("doorbell", doorbells),
            ("device", devices),
            ("interrupt", interrupts),
        ]
        .map(|(name, count)| (name.to_owned(), count))
        .into()
    }
}

impl Drop for HvmMachine {
    fn drop(&mut self) {
        kick::detach(self.vcpu.interrupt_handle());
    }
}
