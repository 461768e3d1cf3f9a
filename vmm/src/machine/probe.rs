//! What this host's KVM can run: decided by trying, not by the names of modules.
//!
//! A tiny VM runs two pieces of code. A loop at CPL0 shows whether the hardware runs it or KVM
//! interprets it. A SYSCALL at CPL3 shows where the guest lands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kvm_bindings::kvm_segment;
use serde::{Deserialize, Serialize};

use super::MachineKind;
use crate::kvm::{Host, Stop, Vcpu, Vm};
use crate::memory::GuestMemory;

/// Where the guest lands when it executes SYSCALL at CPL3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SyscallPath {
    /// It stays at CPL3 (a software KVM): system calls need no help.
    Native,
    /// It enters CPL0, as the architecture says: a stub bounces it to CPL3.
    Bounce,
}

/// What the probe found. Costs some milliseconds: ask once per host, keep it, pass it on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Probe {
    /// The machine to use; `None` when this host can run neither.
    pub kind: Option<MachineKind>,
    /// How the `pv` machine takes system calls.
    pub syscall: SyscallPath,
    /// Nanoseconds per instruction at CPL0: about one where the hardware runs it, hundreds where KVM interprets it.
    pub cpl0_ns: f64,
    /// Frequency of the time stamp counter, kHz.
    pub tsc_khz: u32,
    /// For a person: what was found, one fact a line, and what to do if it is not enough.
    pub facts: Vec<String>,
}

/// Slower than this per instruction is an interpreter, not hardware.
const INTERPRETED_NS: f64 = 50.0;
/// Rounds of the timed loop: two instructions each, over a millisecond if interpreted.
const ROUNDS: u32 = 1024;
/// Tries before a loop that was slow each time counts as interpreted.
const TRIES: u32 = 5;

/// Tries out this host's KVM.
#[must_use]
pub fn probe() -> Probe {
    attempt().unwrap_or_else(|error| Probe {
        kind: None,
        syscall: SyscallPath::Bounce,
        cpl0_ns: 0.0,
        tsc_khz: 0,
        facts: vec![format!("{error:#}")],
    })
}

fn attempt() -> anyhow::Result<Probe> {
    let host = Host::open()?;
    let mut facts = vec!["/dev/kvm opens".to_owned()];
    let (mut vm, tsc_khz) = tiny_vm(&host)?;
    let cpl0_ns = time_cpl0(&mut vm)?;
    let how = if cpl0_ns > INTERPRETED_NS {
        "KVM interprets it (no hardware virtualization)"
    } else {
        "the hardware runs it"
    };
    facts.push(format!(
        "CPL0 code takes {cpl0_ns:.0} ns per instruction: {how}"
    ));
    let syscall = match syscall_lands_at(&mut vm)? {
        3 => {
            facts.push(
                "SYSCALL at CPL3 stays at CPL3: the native system call path is used".to_owned(),
            );
            SyscallPath::Native
        }
        level => {
            facts.push(format!(
                "SYSCALL at CPL3 enters CPL{level}: on the pv machine system calls are bounced back"
            ));
            SyscallPath::Bounce
        }
    };
    let kind = if cpl0_ns > INTERPRETED_NS {
        MachineKind::Pv
    } else if let Some(lacking) = host.lacks_for_apic_vms() {
        facts.push(format!(
            "this KVM lacks {lacking}, which the hvm machine needs: the pv machine is used, which is slower; a newer kernel has it"
        ));
        MachineKind::Pv
    } else {
        MachineKind::Hvm
    };
    Ok(Probe {
        kind: Some(kind),
        syscall,
        cpl0_ns,
        tsc_khz,
        facts,
    })
}

/// Where things are in the tiny VM; all of it is mapped 1:1, the code of CPL3 for everybody.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
const CODE: u64 = 0x9000;
const SYSCALL_TARGET: u64 = 0x9800;
const STACK: u64 = 0xb000;
const SIZE: u64 = 2 << 20;
const PORT: u16 = 0xf1;

struct TinyVm {
    vcpu: Vcpu,
    vm: Vm,
}

fn tiny_vm(host: &Host) -> anyhow::Result<(TinyVm, u32)> {
    let memory = Arc::new(GuestMemory::anonymous(SIZE)?);
    memory.write_u64(PML4, PDPT | 7)?;
    memory.write_u64(PDPT, DIRECTORY | 7)?;
    memory.write_u64(DIRECTORY, 0x87)?;
    for (selector, descriptor) in [
        (0x10, 0x00af_9b00_0000_ffff),
        (0x18, 0x00cf_9300_0000_ffff),
        (0x28, 0x00cf_f300_0000_ffff),
        (0x30, 0x00af_fb00_0000_ffff_u64),
    ] {
        memory.write_u64(GDT + selector, descriptor)?;
    }
    // The I/O bitmap follows the TSS: zeroes, everything is permitted.
    memory.write(TSS + 0x66, &0x68_u16.to_le_bytes())?;
    let (vm, mut vcpus) = host.create_vm(memory, 1)?;
    let vcpu = vcpus.pop().context("a VM without a vCPU")?;
    let mut vm = TinyVm { vcpu, vm };
    let tsc_khz = vm.vcpu.tsc_khz()?;
    vm.vcpu.fetch()?;
    let sregs = vm.vcpu.sregs_mut();
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, PML4, 0x620, 0xd01);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x3f);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.tr = kvm_segment {
        base: TSS,
        limit: 0xfff,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    Ok((vm, tsc_khz))
}

fn set_level(vm: &mut TinyVm, level: u8) {
    let flat = kvm_segment {
        limit: 0xffff_ffff,
        present: 1,
        dpl: level,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let (code, data) = if level == 3 {
        (0x33, 0x2b)
    } else {
        (0x10, 0x18)
    };
    let sregs = vm.vcpu.sregs_mut();
    sregs.cs = kvm_segment {
        selector: code,
        type_: 11,
        l: 1,
        ..flat
    };
    sregs.ss = kvm_segment {
        selector: data,
        type_: 3,
        db: 1,
        ..flat
    };
    let regs = vm.vcpu.regs_mut();
    (regs.rip, regs.rsp, regs.rflags) = (CODE, STACK, 0x202);
}

/// Runs to the next write to [`PORT`].
fn run_to_port(vm: &mut TinyVm) -> anyhow::Result<()> {
    // Signals may interrupt the guest, a bounded number of them.
    for _ in 0..1000 {
        match vm.vcpu.run()? {
            Stop::Out { port: PORT, .. } => return Ok(()),
            Stop::Interrupted => {}
            other => bail!("KVM does not run 64-bit guest code as it should: {other:?}"),
        }
    }
    bail!("KVM does not run guest code: it is interrupted all the time")
}

fn time_cpl0(vm: &mut TinyVm) -> anyhow::Result<f64> {
    // A busy host may stop the guest at any moment. That makes a loop slower, never faster: the best of several tries
    // is the truest.
    let (mut empty, mut looped) = (Duration::MAX, Duration::MAX);
    for _ in 0..TRIES {
        let (way, rounds) = time_rounds(vm)?;
        (empty, looped) = (empty.min(way), looped.min(rounds));
        if per_instruction(empty, looped) <= INTERPRETED_NS {
            break;
        }
    }
    Ok(per_instruction(empty, looped))
}

/// Nanoseconds per instruction of a loop that took so long, the way to the VMM and back, `empty`, included. That may have
/// been mistimed, too, so it never counts for more than half: what is interpreted stays slow.
fn per_instruction(empty: Duration, looped: Duration) -> f64 {
    let own = looped.saturating_sub(empty.min(looped / 2));
    own.as_nanos() as f64 / f64::from(2 * ROUNDS)
}

/// How long the way to the VMM and back takes, and how long with the loop on it.
fn time_rounds(vm: &mut TinyVm) -> anyhow::Result<(Duration, Duration)> {
    vm.vcpu.settle()?;
    // out; out; mov ecx, rounds; 1: dec ecx; jnz 1b; out
    let mut code = vec![0xe6, PORT as u8, 0xe6, PORT as u8, 0xb9];
    code.extend(ROUNDS.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc, 0xe6, PORT as u8, 0xf4]);
    vm.vm.memory().write(CODE, &code)?;
    set_level(vm, 0);
    run_to_port(vm)?;
    let start = Instant::now();
    run_to_port(vm)?;
    let empty = start.elapsed();
    let start = Instant::now();
    run_to_port(vm)?;
    Ok((empty, start.elapsed()))
}

/// The privilege level at which SYSCALL's target runs.
fn syscall_lands_at(vm: &mut TinyVm) -> anyhow::Result<u16> {
    vm.vm.memory().write(CODE, &[0x0f, 0x05])?;
    vm.vm
        .memory()
        .write(SYSCALL_TARGET, &[0xe6, PORT as u8, 0xf4])?;
    vm.vcpu.settle()?;
    vm.vcpu.set_msrs(&[
        (0xc000_0081, 0x23 << 48 | 0x10 << 32),
        (0xc000_0082, SYSCALL_TARGET),
        (0xc000_0084, 0x4_4500),
    ])?;
    set_level(vm, 3);
    run_to_port(vm)?;
    Ok(vm.vcpu.sregs().cs.selector & 3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::InterruptHandle;
    use crate::kvm::kick::{self, KickTimer};

    #[test]
    fn this_host_is_usable_and_says_why() {
        let probe = probe();
        let interpreted = probe.cpl0_ns > INTERPRETED_NS;
        let expected = if interpreted {
            MachineKind::Pv
        } else {
            MachineKind::Hvm
        };
        assert_eq!(probe.kind, Some(expected), "{:?}", probe.facts);
        assert!(probe.cpl0_ns > 0.0 && probe.tsc_khz > 100_000);
        assert!(probe.facts.len() >= 3);
    }

    #[test]
    fn a_busy_host_does_not_make_an_interpreter_look_like_hardware() {
        let ms = Duration::from_millis;
        // The way was mistimed, to more than the loop took.
        assert!(per_instruction(ms(9), ms(2)) > INTERPRETED_NS);
        // An emulated processor, whose exits are slow.
        let slow_exit = Duration::from_micros(150);
        assert!(per_instruction(slow_exit, slow_exit) <= INTERPRETED_NS);
    }

    #[test]
    fn a_kick_ends_a_spinning_guest_and_is_never_lost() {
        let (mut vm, _) = tiny_vm(&Host::open().unwrap()).unwrap();
        vm.vm.memory().write(CODE, &[0xeb, 0xfe]).unwrap();
        set_level(&mut vm, 3);
        let handle = vm.vcpu.interrupt_handle();
        kick::attach(handle);
        let timer = KickTimer::new().unwrap();
        timer.arm(1_000_000);
        assert_eq!(vm.vcpu.run().unwrap(), Stop::Interrupted);
        // One that comes while the guest does not run ends the next run, whatever is settled in between.
        // SAFETY: the vCPU is alive.
        unsafe { InterruptHandle::raise(handle.into_raw()) };
        vm.vcpu.settle().unwrap();
        assert_eq!(vm.vcpu.run().unwrap(), Stop::Interrupted);
        kick::detach(handle);
    }
}
