//! Making a machine: from a kernel, or from a saved state.

use std::sync::{Arc, Mutex};

use anyhow::Context;
use kvm_bindings::{CpuId, kvm_segment};

use super::cpu::{Cpu, Own, Wait};
use super::events::{self, Events, VcpuInfo};
use super::layout::*;
use super::shared::{Hub, Seat, Shared};
use super::state::{self, Facts, SavedCpu};
use super::time::Clock;
use super::{PvMachine, area, start};
use crate::kvm::{Host, Vcpu};
use crate::machine::BootConfig;
use crate::machine::console::Console;
use crate::machine::probe::SyscallPath;
use crate::memory::GuestMemory;
use crate::protocol::Tuning;
use crate::snapshot::FrozenMemory;

/// Kernel command line that this machine wants; more may be appended.
///
/// `noreplace-smp` saves the kernel 0.2 s of patching at boot; `mitigations=off` because what they
/// protect, kernel from process, is no boundary here; `panic=-1` ends the VM at a panic instead of hanging.
pub const CMDLINE: &str = "console=hvc0 mitigations=off noreplace-smp quiet panic=-1 oops=panic";

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_SFMASK: u32 = 0xc000_0084;
/// SYSCALL takes CS and SS of CPL0 from bits 32.., SYSRET those of CPL3 from bits 48...
const STAR: u64 = 0x23 << 48 | CODE_CPL0 << 32;
/// Cleared at SYSCALL: trap, direction, nested task, alignment check.
const SFMASK: u64 = 0x4_4500;

/// PG, WP, NE, ET, MP, PE. AM stays off: alignment is checked by nobody but hosts whose processor does it anyway.
const CR0: u64 = 0x8001_0033;
/// PAE, OSFXSR, OSXMMEXCPT, OSXSAVE, and FSGSBASE (shim and processes use it).
const CR4: u64 = 0x5_0620 | FSGSBASE;
const FSGSBASE: u64 = 1 << 16;
/// CR4 as the guest's kernel first sees it.
const GUEST_CR4: u64 = 0x620 | 1 << 18;
/// Long mode, NX, SYSCALL.
const EFER: u64 = 0xd01;

/// Boots a VM. Nothing runs until [`crate::machine::Machine::run`], which must be called on the thread that called this.
///
/// # Errors
/// A kernel that cannot be booted this way, sizes out of range, or a refusal of KVM.
pub fn boot(config: &BootConfig<'_>) -> anyhow::Result<PvMachine> {
    let layout = Layout::new(config.memory_mib)?;
    let memory = Arc::new(GuestMemory::anonymous(layout.size)?);
    memory.prefer_huge_pages();
    let start = start::load(
        &memory,
        &layout,
        config.vcpus,
        config.kernel,
        config.initramfs,
        config.cmdline,
    )?;
    let syscall = if config.tuning.force_bounce {
        SyscallPath::Bounce
    } else {
        config.probe.syscall
    };
    area::build(&memory, &layout, syscall, config.vcpus)?;
    let events = Events::new(&layout);
    events.mask_all(&memory)?;
    set_wall_clock(&memory, &layout)?;

    let host = Host::open()?;
    let (vm, mut vcpus) = host.create_vm(memory, config.vcpus)?;
    let cpuid = host.supported_cpuid()?;
    let tsc_khz = first(&vcpus)?.tsc_khz()?;
    let shared = Arc::new(Shared {
        vm,
        layout,
        facts: Facts::here(tsc_khz),
        syscall,
        clock: Clock::starting_at(0, tsc_khz),
        hub: Mutex::new(Hub {
            events,
            console: Console::default(),
            console_ring: start.console,
        }),
        seats: (0..config.vcpus)
            .map(|index| Seat::new(VcpuInfo::first(&layout, index), index == 0, index == 0))
            .collect(),
    });
    for (index, vcpu) in (0..).zip(&mut vcpus) {
        vcpu.set_cpuid(&cpuid)?;
        load_msrs(vcpu, layout.copy(index), syscall)?;
        vcpu.fetch()?;
        set_system_registers(vcpu, layout.copy(index), start.page_table);
        fill_shared_page(&shared, index, start.page_table)?;
    }
    if let Some(vcpu) = vcpus.first_mut() {
        let regs = vcpu.regs_mut();
        regs.rip = start.entry;
        regs.rsi = start.start_info;
        regs.rsp = start.stack;
        regs.rflags = 0x202;
    }
    let own = |index| Own {
        deadline: None,
        time_area: None,
        cr4: GUEST_CR4,
        wait: if index == 0 { Wait::No } else { Wait::Up },
    };
    let cpus = (0..).zip(vcpus);
    let cpus = cpus.map(|(index, vcpu)| Cpu::new(vcpu, index, &shared, own(index), None));
    let cpus = cpus.collect();
    PvMachine::new(shared, cpus, cpuid.as_slice().to_vec())
}

/// What a vCPU's copy of the shim starts with, and its events masked.
fn fill_shared_page(shared: &Shared, index: u32, page_table: u64) -> anyhow::Result<()> {
    let (memory, area) = (shared.memory(), shared.layout.copy(index));
    let info = VcpuInfo::first(&shared.layout, index);
    for (field, value) in [
        (COMM_KERNEL_MODE, IN_KERNEL),
        (COMM_VCPU_INFO, DIRECT_BASE + info.0),
        (COMM_CR3, page_table),
        (COMM_AREA, area.physical),
        (COMM_FIRST_AREA, shared.layout.area),
        (COMM_VCPUS, shared.seats.len() as u64),
        (COMM_VCPU, index.into()),
        // The first vCPU makes the boot page table reachable for all.
        (COMM_BOOTED, u64::from(index > 0)),
    ] {
        memory.write_u64(area.comm(field), value)?;
    }
    info.set_masked(memory, true)?;
    Ok(shared.publish_clock(index)?)
}

fn first(vcpus: &[Vcpu]) -> anyhow::Result<&Vcpu> {
    vcpus.first().context("a VM without vCPUs")
}

/// Restores a VM from [`crate::machine::Machine::save`]'s blob and its memory, of which it gets a private view.
/// Nothing runs until [`crate::machine::Machine::run`], which must be called on the thread that called this.
/// The working set is best prefaulted (`machine.memory().prefault(..)`) before the first run.
///
/// The system call path is the saved one, which `tuning` cannot change; a host that lacks it is refused by the probe's caller.
///
/// # Errors
/// A blob that is damaged or of another version, a host that lacks what the VM was saved with (the message says what), or a refusal of KVM.
pub fn restore(state: &[u8], memory: &FrozenMemory, tuning: Tuning) -> anyhow::Result<PvMachine> {
    let host = Host::open()?;
    // The frequency is only known with a vCPU: it is checked below, everything else before memory is touched.
    let (saved, layout) = state::decode(state, || Facts::here(0))?;
    let memory = Arc::new(memory.view(layout.size)?);
    let (vm, vcpus) = host.create_vm(memory, u32::try_from(saved.cpus.len())?)?;
    let tsc_khz = first(&vcpus)?.tsc_khz()?;
    saved.facts.check_tsc(tsc_khz)?;
    anyhow::ensure!(
        !tuning.force_bounce || saved.syscall == SyscallPath::Bounce,
        "the VM was saved with the native system call path and cannot take the other one now"
    );
    let cpuid = CpuId::from_entries(&saved.cpuid)
        .ok()
        .context("the VM's state is damaged: it lists too many CPUID leaves")?;
    let shared = Arc::new(Shared {
        vm,
        layout,
        facts: saved.facts,
        syscall: saved.syscall,
        clock: Clock::starting_at(saved.now, tsc_khz),
        hub: Mutex::new(Hub {
            events: saved.events,
            console: Console::default(),
            console_ring: saved.console_ring,
        }),
        seats: saved
            .cpus
            .iter()
            .map(|cpu| Seat::new(VcpuInfo(cpu.info), cpu.up, cpu.initialised))
            .collect(),
    });
    let mut cpus = Vec::new();
    for ((index, vcpu), cpu) in (0..).zip(vcpus).zip(saved.cpus) {
        vcpu.set_cpuid(&cpuid)?;
        load_msrs(&vcpu, layout.copy(index), shared.syscall)?;
        shared.publish_clock(index)?;
        if let Some(area) = cpu.own.time_area {
            shared.clock.publish(shared.memory(), area)?;
        }
        let own = cpu.own;
        cpus.push(Cpu::new(vcpu, index, &shared, own, Some(cpu)));
    }
    PvMachine::new(shared, cpus, saved.cpuid)
}

/// Loads a vCPU's registers, on the thread that will run it: one that changes threads makes KVM wait for all processors.
pub(super) fn load_vcpu(vcpu: &mut Vcpu, saved: &SavedCpu) -> anyhow::Result<()> {
    vcpu.fetch()?;
    *vcpu.sregs_mut() = saved.sregs;
    *vcpu.regs_mut() = saved.regs;
    vcpu.set_events(saved.events);
    // XSAVE state is checked against XCR0, which needs CR4.OSXSAVE, so registers are loaded now and not at the first run.
    vcpu.settle().context("loading the VM's registers")?;
    vcpu.set_xcr0(saved.xcr0)?;
    Ok(vcpu.set_xsave(&saved.xsave)?)
}

fn load_msrs(vcpu: &Vcpu, area: AreaCopy, syscall: SyscallPath) -> anyhow::Result<()> {
    let entry = match syscall {
        SyscallPath::Native => SHIM_SYSCALL,
        SyscallPath::Bounce => CPL0_SYSCALL,
    };
    Ok(vcpu.set_msrs(&[
        (MSR_STAR, STAR),
        (MSR_LSTAR, area.address + entry),
        (MSR_SFMASK, SFMASK),
    ])?)
}

fn set_system_registers(vcpu: &mut Vcpu, area: AreaCopy, page_table: u64) {
    let flat = kvm_segment {
        limit: 0xffff_ffff,
        present: 1,
        dpl: 3,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let null = kvm_segment {
        type_: 3,
        db: 1,
        ..flat
    };
    let sregs = vcpu.sregs_mut();
    sregs.cs = kvm_segment {
        selector: CODE_CPL3 as u16,
        type_: 11,
        l: 1,
        ..flat
    };
    sregs.ss = kvm_segment {
        selector: DATA_CPL3 as u16,
        type_: 3,
        db: 1,
        ..flat
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (null, null, null, null);
    sregs.tr.base = area.direct(AREA_TSS);
    sregs.tr.limit = (TSS_SIZE - 1) as u32;
    sregs.tr.present = 1;
    sregs.tr.type_ = 11;
    sregs.tr.selector = 0x40;
    (sregs.idt.base, sregs.idt.limit) = (area.direct(AREA_IDT), 0xfff);
    (sregs.gdt.base, sregs.gdt.limit) = (area.direct(AREA_GDT), 0x7f);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, page_table, CR4, EFER);
}

/// The time of day at boot, in the shared-info page: version, seconds, nanoseconds.
fn set_wall_clock(memory: &GuestMemory, layout: &Layout) -> anyhow::Result<()> {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .context("the host's clock shows a time before 1970")?;
    let at = layout.area + AREA_SHARED_INFO + events::WALL_CLOCK;
    let seconds = (now.as_secs() & 0xffff_ffff) as u32;
    let words = [2, seconds, now.subsec_nanos(), (now.as_secs() >> 32) as u32];
    Ok(memory.write(at, words.map(u32::to_le_bytes).as_flattened())?)
}
