//! Instructions that the guest kernel may only execute at CPL0, executed for it.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};

use super::cpuid;
use crate::kvm::{Vcpu, cpu};

/// What a Xen guest executes where it wants CPUID answered by the hypervisor: ud2, "xen", cpuid.
const FORCED_CPUID: &[u8] = b"\x0f\x0bxen\x0f\xa2";

const MSR_TSC: u32 = 0x10;
const MSR_APIC_BASE: u32 = 0x1b;
const MSR_PAT: u32 = 0x277;
const MSR_EFER: u32 = 0xc000_0080;
const MSR_FS_BASE: u32 = 0xc000_0100;
const MSR_GS_BASE: u32 = 0xc000_0101;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

const APIC_BASE: u64 = 0xfee0_0900;
const PAT: u64 = 0x0007_0406_0007_0406;
const EFER: u64 = 0xd01;
const CR0: u64 = 0x8005_0033;

/// What the emulation needs of the machine besides the vCPU.
#[derive(Debug)]
pub(super) struct Context<'a> {
    pub vcpu: &'a mut Vcpu,
    /// Extended state that the host permits.
    pub xcr0: u64,
    /// The vCPU's number.
    pub index: u32,
    /// CR4 as the kernel last wrote it.
    pub cr4: &'a mut u64,
    /// CR2 and CR3 as the guest sees them.
    pub cr2: u64,
    pub cr3: u64,
    /// The process's GS base, which SWAPGS would exchange.
    pub user_gs: u64,
}

/// What the instruction did beyond registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// Events are masked, or not.
    Mask(bool),
    /// A new GS base for the kernel (already loaded).
    KernelGs(u64),
    /// A new GS base for the process.
    UserGs(u64),
}

/// Executes the instruction at `rip`, whose first bytes are given, and moves `rip` behind it; `None` if it is none of ours.
pub(super) fn execute(context: &mut Context<'_>, bytes: &[u8], rip: u64) -> Option<Effect> {
    if bytes.starts_with(FORCED_CPUID) {
        cpuid_instruction(context);
        context.vcpu.regs_mut().rip = rip.wrapping_add(FORCED_CPUID.len() as u64);
        return Some(Effect::None);
    }
    let instruction = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE).decode();
    let effect = one(context, &instruction)?;
    context.vcpu.regs_mut().rip = instruction.next_ip();
    Some(effect)
}

fn one(context: &mut Context<'_>, instruction: &Instruction) -> Option<Effect> {
    let regs = context.vcpu.regs();
    let wide = regs.rdx << 32 | regs.rax & 0xffff_ffff;
    let index = regs.rcx as u32;
    match instruction.code() {
        Code::Cpuid => cpuid_instruction(context),
        Code::Cli => return Some(Effect::Mask(true)),
        Code::Sti => return Some(Effect::Mask(false)),
        Code::Hlt | Code::Clts | Code::Wbinvd | Code::Invd | Code::Clac | Code::Stac => {}
        Code::Rdmsr => {
            let value = read_msr(context, index);
            let regs = context.vcpu.regs_mut();
            regs.rax = value & 0xffff_ffff;
            regs.rdx = value >> 32;
        }
        Code::Wrmsr => return write_msr(context, index, wide),
        Code::Xsetbv => {
            if index != 0 || wide & !context.xcr0 != 0 || context.vcpu.set_xcr0(wide).is_err() {
                return None;
            }
        }
        Code::Mov_r64_cr => {
            let value = match instruction.op1_register() {
                Register::CR0 => CR0,
                Register::CR2 => context.cr2,
                Register::CR3 => context.cr3,
                Register::CR4 => *context.cr4,
                _ => 0,
            };
            *gpr(context.vcpu, instruction.op0_register())? = value;
        }
        Code::Mov_cr_r64 => {
            let value = *gpr(context.vcpu, instruction.op1_register())?;
            if instruction.op0_register() == Register::CR4 {
                *context.cr4 = value;
            }
        }
        Code::Mov_r64_dr => *gpr(context.vcpu, instruction.op0_register())? = 0,
        Code::Mov_dr_r64 => {}
        Code::In_AL_DX | Code::In_AL_imm8 => port_read(context, instruction, 0xff),
        Code::In_AX_DX | Code::In_AX_imm8 => port_read(context, instruction, 0xffff),
        Code::In_EAX_DX | Code::In_EAX_imm8 => port_read(context, instruction, 0xffff_ffff),
        Code::Out_DX_AL
        | Code::Out_DX_AX
        | Code::Out_DX_EAX
        | Code::Out_imm8_AL
        | Code::Out_imm8_AX
        | Code::Out_imm8_EAX => {}
        _ => return None,
    }
    Some(Effect::None)
}

fn cpuid_instruction(context: &mut Context<'_>) {
    let regs = context.vcpu.regs();
    let [eax, ebx, ecx, edx] = cpuid::for_kernel(
        regs.rax as u32,
        regs.rcx as u32,
        context.xcr0,
        context.index,
    )
    .map(u64::from);
    let regs = context.vcpu.regs_mut();
    (regs.rax, regs.rbx, regs.rcx, regs.rdx) = (eax, ebx, ecx, edx);
}

/// Ports that are not there read as ones, the timer chip's as zeroes: that ends the kernel's attempts to calibrate with it.
fn port_read(context: &mut Context<'_>, instruction: &Instruction, ones: u64) {
    let port = if instruction.op1_kind() == OpKind::Immediate8 {
        u64::from(instruction.immediate8())
    } else {
        context.vcpu.regs().rdx & 0xffff
    };
    let value = if matches!(port, 0x40..=0x43 | 0x61) {
        0
    } else {
        ones
    };
    let regs = context.vcpu.regs_mut();
    regs.rax = if ones == 0xffff_ffff {
        value
    } else {
        regs.rax & !ones | value
    };
}

fn read_msr(context: &Context<'_>, index: u32) -> u64 {
    match index {
        MSR_TSC => cpu::tsc(),
        MSR_APIC_BASE => APIC_BASE,
        MSR_PAT => PAT,
        MSR_EFER => EFER,
        MSR_FS_BASE => context.vcpu.sregs().fs.base,
        MSR_GS_BASE => context.vcpu.sregs().gs.base,
        MSR_KERNEL_GS_BASE => context.user_gs,
        _ => 0,
    }
}

/// Writes that mean nothing here are ignored; a base that no processor would take is refused.
fn write_msr(context: &mut Context<'_>, index: u32, value: u64) -> Option<Effect> {
    if !matches!(index, MSR_FS_BASE | MSR_GS_BASE | MSR_KERNEL_GS_BASE) {
        return Some(Effect::None);
    }
    if !canonical(value) {
        return None;
    }
    match index {
        MSR_FS_BASE => context.vcpu.sregs_mut().fs.base = value,
        MSR_GS_BASE => {
            context.vcpu.sregs_mut().gs.base = value;
            return Some(Effect::KernelGs(value));
        }
        _ => return Some(Effect::UserGs(value)),
    }
    Some(Effect::None)
}

/// Whether bits 47 to 63 are all the same.
pub(super) fn canonical(address: u64) -> bool {
    matches!(address >> 47, 0 | 0x1_ffff)
}

fn gpr(vcpu: &mut Vcpu, register: Register) -> Option<&mut u64> {
    let regs = vcpu.regs_mut();
    Some(match register {
        Register::RAX => &mut regs.rax,
        Register::RBX => &mut regs.rbx,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::RSP => &mut regs.rsp,
        Register::RBP => &mut regs.rbp,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return None,
    })
}
