//! Processor exceptions at user level: each must become the right signal, with the right
//! address, and the program must be able to go on.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};

use crate::check::{Check, Ended, Outcome, handle, in_child, sys};
use crate::ensure;

/// This room's checks.
pub const CHECKS: &[Check] = &[
    Check {
        name: "segv-unmapped",
        limit: 10,
        run: segv_unmapped,
    },
    Check {
        name: "segv-read-only",
        limit: 10,
        run: segv_read_only,
    },
    Check {
        name: "segv-no-exec",
        limit: 10,
        run: segv_no_exec,
    },
    Check {
        name: "segv-mprotect",
        limit: 10,
        run: segv_mprotect,
    },
    Check {
        name: "segv-guard-page",
        limit: 10,
        run: segv_guard_page,
    },
    Check {
        name: "segv-stack-overflow",
        limit: 20,
        run: segv_stack_overflow,
    },
    Check {
        name: "segv-non-canonical",
        limit: 10,
        run: segv_non_canonical,
    },
    Check {
        name: "sigbus-past-end",
        limit: 10,
        run: sigbus_past_end,
    },
    Check {
        name: "sigill",
        limit: 10,
        run: sigill,
    },
    Check {
        name: "sigfpe",
        limit: 10,
        run: sigfpe,
    },
    Check {
        name: "int3",
        limit: 10,
        run: int3,
    },
    Check {
        name: "privileged",
        limit: 10,
        run: privileged,
    },
    Check {
        name: "faults-repeated",
        limit: 20,
        run: faults_repeated,
    },
    Check {
        name: "fault-unhandled",
        limit: 10,
        run: fault_unhandled,
    },
];
// A user's `icebp` (0xf1) is left out on purpose: on the KVM without hardware virtualization
// that this is made for it hangs the vCPU, whatever runs inside.

/// The last caught fault, written by [`on_fault`].
static SIGNAL: AtomicI32 = AtomicI32::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static RIP: AtomicU64 = AtomicU64::new(0);
/// Faults caught since [`catch`].
static COUNT: AtomicU64 = AtomicU64::new(0);
/// Where the handler continues the program.
static RESUME: AtomicU64 = AtomicU64::new(0);

/// `si_code` of a signal for a general protection fault.
const SI_KERNEL: i32 = 0x80;
const SEGV_MAPERR: i32 = 1;
const SEGV_ACCERR: i32 = 2;
/// Bytes of the alternate stack: room for an AVX-512 signal frame several times over.
const ALT_STACK: usize = 64 << 10;
const PAGE: usize = 4096;

/// A caught fault. `at` is the faulting instruction's own address.
#[derive(Debug, Clone, Copy)]
struct Fault {
    signal: i32,
    code: i32,
    address: u64,
    rip: u64,
    at: u64,
}

/// Notes what happened and continues at [`RESUME`].
extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo and ucontext to an SA_SIGINFO handler.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        SIGNAL.store(signal, SeqCst);
        CODE.store((*info).si_code, SeqCst);
        ADDRESS.store((*info).si_addr() as u64, SeqCst);
        RIP.store(registers[libc::REG_RIP as usize] as u64, SeqCst);
        COUNT.fetch_add(1, SeqCst);
        registers[libc::REG_RIP as usize] = RESUME.load(SeqCst) as i64;
    }
}

/// Installs the handler for every fault signal, on an alternate stack.
fn catch() -> Outcome {
    let stack = map(ALT_STACK, libc::PROT_READ | libc::PROT_WRITE)?;
    let alternate = libc::stack_t {
        ss_sp: stack as *mut libc::c_void,
        ss_flags: 0,
        ss_size: ALT_STACK,
    };
    // SAFETY: the stack was just mapped and is never unmapped.
    sys("sigaltstack", unsafe {
        libc::sigaltstack(&raw const alternate, std::ptr::null_mut())
    })?;
    for signal in [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
    ] {
        handle(
            signal,
            libc::SA_SIGINFO | libc::SA_ONSTACK,
            on_fault as *const () as usize,
        )?;
    }
    Ok(())
}

/// Fresh anonymous memory; returns its address.
fn map(bytes: usize, protection: i32) -> Result<usize, String> {
    // SAFETY: a new anonymous mapping touches nothing that exists.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        Err("mmap failed".to_owned())
    } else {
        Ok(at as usize)
    }
}

/// Changes a mapping's protection.
fn protect(at: usize, bytes: usize, protection: i32) -> Outcome {
    // SAFETY: `at` is a mapping of this check's own, at least `bytes` long.
    sys("mprotect", unsafe {
        libc::mprotect(at as *mut libc::c_void, bytes, protection)
    })?;
    Ok(())
}

/// Runs one instruction with `rax` (and `rdi`) set to `$argument`, and returns its fault.
/// The label after it is where the handler continues, or where it ends if nothing happens.
macro_rules! fault_of {
    ($instruction:literal, $argument:expr) => {{
        SIGNAL.store(0, SeqCst);
        CODE.store(0, SeqCst);
        ADDRESS.store(0, SeqCst);
        RIP.store(0, SeqCst);
        let at: u64;
        // SAFETY: the instruction either faults, and the handler continues behind it with all
        // registers as they were, or it changes only the registers declared here.
        unsafe {
            std::arch::asm!(
                "lea {resume}, [rip + 3f]",
                "mov [{slot}], {resume}",
                "lea {resume}, [rip + 2f]",
                "2:",
                $instruction,
                "3:",
                resume = out(reg) at,
                slot = in(reg) RESUME.as_ptr(),
                inout("rax") $argument as u64 => _,
                inout("rdi") $argument as u64 => _,
                out("rdx") _,
                out("rcx") _,
            );
        }
        last_fault(at)
    }};
}

/// A memory fault with this code at `address`, by the instruction at `fault.at`.
fn expect_segv(fault: Fault, code: i32, address: usize) -> Outcome {
    ensure!(
        fault.signal == libc::SIGSEGV && fault.code == code && fault.address == address as u64,
        "wanted SIGSEGV code {code} at {address:#x}, got {fault:x?}"
    );
    ensure!(
        fault.rip == fault.at,
        "RIP is not the instruction's: {fault:x?}"
    );
    Ok(())
}

fn segv_unmapped() -> Outcome {
    catch()?;
    let hole = map(PAGE, libc::PROT_READ)?;
    // SAFETY: unmaps the page that was just mapped.
    sys("munmap", unsafe {
        libc::munmap(hole as *mut libc::c_void, PAGE)
    })?;
    expect_segv(fault_of!("mov rax, [rdi]", hole), SEGV_MAPERR, hole)?;
    expect_segv(fault_of!("mov [rdi], rax", hole + 8), SEGV_MAPERR, hole + 8)?;
    expect_segv(fault_of!("mov al, [rdi]", 0), SEGV_MAPERR, 0)?;
    expect_segv(
        fault_of!("mov byte ptr [rdi], 1", 0x123),
        SEGV_MAPERR,
        0x123,
    )
}

fn segv_read_only() -> Outcome {
    catch()?;
    // Once before the page exists, once after a read brought in the zero page.
    let page = map(PAGE, libc::PROT_READ)?;
    expect_segv(
        fault_of!("mov [rdi], rax", page + 16),
        SEGV_ACCERR,
        page + 16,
    )?;
    ensure!(
        fault_of!("mov rax, [rdi]", page).signal == 0,
        "reading a read-only page faulted"
    );
    expect_segv(
        fault_of!("mov [rdi], rax", page + 16),
        SEGV_ACCERR,
        page + 16,
    )?;
    let text = segv_read_only as *const () as usize;
    expect_segv(
        fault_of!("mov byte ptr [rdi], 0x90", text),
        SEGV_ACCERR,
        text,
    )
}

fn segv_no_exec() -> Outcome {
    catch()?;
    let page = map(PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
    // SAFETY: the page is writable and ours.
    unsafe { (page as *mut u8).write(0xc3) };
    let fault = fault_of!("jmp rdi", page);
    ensure!(
        fault.signal == libc::SIGSEGV && fault.code == SEGV_ACCERR && fault.address == page as u64,
        "wanted SIGSEGV for running {page:#x}, got {fault:x?}"
    );
    ensure!(
        fault.rip == page as u64,
        "RIP is not the page's: {fault:x?}"
    );
    protect(page, PAGE, libc::PROT_READ | libc::PROT_EXEC)?;
    ensure!(
        fault_of!("call rdi", page).signal == 0,
        "code in an executable page faulted"
    );
    protect(page, PAGE, libc::PROT_READ)?;
    let fault = fault_of!("jmp rdi", page);
    ensure!(
        fault.signal == libc::SIGSEGV && fault.code == SEGV_ACCERR,
        "page still runs: {fault:x?}"
    );
    Ok(())
}

fn segv_mprotect() -> Outcome {
    catch()?;
    let page = map(PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
    for round in 0..200 {
        ensure!(
            fault_of!("mov [rdi], rax", page).signal == 0,
            "round {round}: writable page faulted"
        );
        protect(page, PAGE, libc::PROT_READ)?;
        expect_segv(fault_of!("mov [rdi], rax", page), SEGV_ACCERR, page)?;
        protect(page, PAGE, libc::PROT_NONE)?;
        expect_segv(fault_of!("mov rax, [rdi]", page + 8), SEGV_ACCERR, page + 8)?;
        protect(page, PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
    }
    Ok(())
}

/// Pushes words until the stack faults, on the stack that ends at `top`, or on the own one if 0.
fn push_until_fault(top: usize) -> Fault {
    COUNT.store(0, SeqCst);
    let at: u64;
    // SAFETY: overwrites only memory below the top of the stack it runs on, which holds nothing;
    // the handler runs on the alternate stack and continues where RSP is put back.
    unsafe {
        std::arch::asm!(
            "lea rcx, [rip + 3f]",
            "mov [rsi], rcx",
            "lea rcx, [rip + 2f]",
            "mov rdx, rsp",
            "test rdi, rdi",
            "cmovnz rsp, rdi",
            "2:",
            "push rax",
            "jmp 2b",
            "3:",
            "mov rsp, rdx",
            in("rdi") top,
            in("rsi") RESUME.as_ptr(),
            out("rcx") at,
            out("rdx") _,
            in("rax") 0,
        );
    }
    last_fault(at)
}

/// What the handler noted about the instruction at `at`.
fn last_fault(at: u64) -> Fault {
    Fault {
        signal: SIGNAL.load(SeqCst),
        code: CODE.load(SeqCst),
        address: ADDRESS.load(SeqCst),
        rip: RIP.load(SeqCst),
        at,
    }
}

fn segv_guard_page() -> Outcome {
    catch()?;
    let pages = map(4 * PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
    protect(pages, PAGE, libc::PROT_NONE)?;
    let fault = push_until_fault(pages + 4 * PAGE);
    ensure!(COUNT.load(SeqCst) == 1, "{} faults", COUNT.load(SeqCst));
    expect_segv(fault, SEGV_ACCERR, pages + PAGE - 8)
}

fn segv_stack_overflow() -> Outcome {
    catch()?;
    let limit = libc::rlimit {
        rlim_cur: 8 << 20,
        rlim_max: 8 << 20,
    };
    // SAFETY: `limit` is complete.
    sys("setrlimit", unsafe {
        libc::setrlimit(libc::RLIMIT_STACK, &raw const limit)
    })?;
    let here = (&raw const limit).addr() as u64;
    let fault = push_until_fault(0);
    ensure!(
        fault.signal == libc::SIGSEGV && fault.rip == fault.at,
        "{fault:x?}"
    );
    let depth = here.wrapping_sub(fault.address);
    ensure!(
        (1 << 20..=8 << 20).contains(&depth),
        "faulted {depth:#x} bytes down: {fault:x?}"
    );
    Ok(())
}

/// A general protection fault is SIGSEGV without an address.
fn expect_gp(what: &str, fault: Fault) -> Outcome {
    ensure!(
        fault.signal == libc::SIGSEGV && fault.code == SI_KERNEL && fault.address == 0,
        "{what}: wanted SIGSEGV from the kernel, got {fault:x?}"
    );
    ensure!(
        fault.rip == fault.at,
        "{what}: RIP is not the instruction's: {fault:x?}"
    );
    Ok(())
}

fn segv_non_canonical() -> Outcome {
    catch()?;
    for address in [
        0x0000_8000_0000_0000_u64,
        0x1234_5678_9abc_def0,
        0x8000_0000_0000_0000,
    ] {
        expect_gp("read", fault_of!("mov rax, [rdi]", address))?;
        expect_gp("write", fault_of!("mov [rdi], rax", address))?;
        let fault = fault_of!("jmp rdi", address);
        ensure!(
            fault.signal == libc::SIGSEGV,
            "jump to {address:#x}: {fault:x?}"
        );
    }
    Ok(())
}

fn sigbus_past_end() -> Outcome {
    catch()?;
    // SAFETY: a literal name; no other arguments.
    let file = sys("memfd_create", unsafe {
        libc::memfd_create(c"past-end".as_ptr(), libc::MFD_CLOEXEC)
    })?;
    sys("ftruncate", {
        // SAFETY: `file` is our descriptor.
        unsafe { libc::ftruncate(file, PAGE as i64) }
    })?;
    // SAFETY: a new mapping touches nothing that exists.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            2 * PAGE,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file,
            0,
        )
    };
    ensure!(at != libc::MAP_FAILED, "mmap failed");
    let beyond = at as usize + PAGE;
    let fault = fault_of!("mov rax, [rdi]", beyond);
    const BUS_ADRERR: i32 = 2;
    ensure!(
        fault.signal == libc::SIGBUS && fault.code == BUS_ADRERR && fault.address == beyond as u64,
        "wanted SIGBUS at {beyond:#x}, got {fault:x?}"
    );
    Ok(())
}

fn sigill() -> Outcome {
    catch()?;
    const ILL_ILLOPN: i32 = 2;
    for fault in [
        fault_of!("ud2", 0),
        fault_of!(".byte 0x0f, 0x04", 0),
        fault_of!(".byte 0x06", 0),
    ] {
        ensure!(
            fault.signal == libc::SIGILL && fault.code == ILL_ILLOPN,
            "{fault:x?}"
        );
        ensure!(
            fault.rip == fault.at && fault.address == fault.at,
            "RIP: {fault:x?}"
        );
    }
    Ok(())
}

fn sigfpe() -> Outcome {
    catch()?;
    const FPE_INTDIV: i32 = 1;
    let by_zero = fault_of!("xor edi, edi; 6: xor edx, edx; div rdi", 5);
    ensure!(
        by_zero.signal == libc::SIGFPE && by_zero.code == FPE_INTDIV,
        "{by_zero:x?}"
    );
    ensure!(
        by_zero.rip == by_zero.address && by_zero.rip > by_zero.at,
        "RIP: {by_zero:x?}"
    );
    // The most negative number by -1: the quotient does not fit.
    let overflow = fault_of!("mov rdi, -1; cqo; idiv rdi", i64::MIN);
    ensure!(
        overflow.signal == libc::SIGFPE && overflow.code == FPE_INTDIV,
        "{overflow:x?}"
    );
    Ok(())
}

fn int3() -> Outcome {
    catch()?;
    let short = fault_of!("int3", 0);
    ensure!(short.signal == libc::SIGTRAP, "{short:x?}");
    ensure!(
        short.rip == short.at + 1,
        "RIP is not behind the int3: {short:x?}"
    );
    for _ in 0..1000 {
        let again = fault_of!("int3", 0);
        ensure!(
            again.signal == libc::SIGTRAP && again.rip == again.at + 1,
            "{again:x?}"
        );
    }
    Ok(())
}

fn privileged() -> Outcome {
    catch()?;
    expect_gp("hlt", fault_of!("hlt", 0))?;
    expect_gp("cli", fault_of!("cli", 0))?;
    expect_gp("sti", fault_of!("sti", 0))?;
    expect_gp("out 0x80", fault_of!("out 0x80, al", 0))?;
    expect_gp("in 0x64", fault_of!("in al, 0x64", 0))?;
    expect_gp(
        "out dx",
        fault_of!("mov edx, 0x7a0; 6: out dx, eax", 0).moved(),
    )?;
    expect_gp("rdmsr", fault_of!("rdmsr", 0))?;
    expect_gp("wrmsr", fault_of!("wrmsr", 0))?;
    expect_gp("mov cr3", fault_of!("mov rax, cr3", 0))?;
    expect_gp("mov to cr0", fault_of!("mov cr0, rax", 0))?;
    expect_gp("mov to dr7", fault_of!("mov dr7, rax", 0))?;
    expect_gp("invlpg", fault_of!("invlpg [rdi]", 0x1000))?;
    expect_gp("wbinvd", fault_of!("wbinvd", 0))?;
    expect_gp("clts", fault_of!("clts", 0))?;
    let descriptor = [0u8; 16];
    expect_gp(
        "lgdt",
        fault_of!("lgdt [rdi]", (&raw const descriptor).addr()),
    )
}

impl Fault {
    /// For two instructions in one string of which the second faults: takes its word for where.
    fn moved(mut self) -> Self {
        self.at = self.rip;
        self
    }
}

fn faults_repeated() -> Outcome {
    catch()?;
    COUNT.store(0, SeqCst);
    let page = map(PAGE, libc::PROT_NONE)?;
    const ROUNDS: u64 = 3000;
    for _ in 0..ROUNDS {
        expect_segv(fault_of!("mov rax, [rdi]", page), SEGV_ACCERR, page)?;
        let illegal = fault_of!("ud2", 0);
        ensure!(illegal.signal == libc::SIGILL, "{illegal:x?}");
    }
    ensure!(
        COUNT.load(SeqCst) == 2 * ROUNDS,
        "{} faults of {}",
        COUNT.load(SeqCst),
        2 * ROUNDS
    );
    Ok(())
}

fn fault_unhandled() -> Outcome {
    // Without a handler each must kill its process by its signal, and only that process.
    let page = map(PAGE, libc::PROT_NONE)?;
    let cases: [(i32, fn(usize)); 4] = [
        (libc::SIGSEGV, |at| {
            // SAFETY: faults, which ends this child.
            unsafe { std::arch::asm!("mov rax, [{}]", in(reg) at, out("rax") _) }
        }),
        (libc::SIGILL, |_| {
            // SAFETY: faults, which ends this child.
            unsafe { std::arch::asm!("ud2") }
        }),
        (libc::SIGTRAP, |_| {
            // SAFETY: traps, which ends this child.
            unsafe { std::arch::asm!("int3") }
        }),
        (libc::SIGSEGV, |_| {
            // SAFETY: faults, which ends this child.
            unsafe { std::arch::asm!("hlt") }
        }),
    ];
    for (number, (signal, body)) in cases.into_iter().enumerate() {
        let ended = in_child(|| {
            body(page);
            0
        })?;
        ensure!(ended == Ended::Killed(signal), "case {number}: {ended:?}");
    }
    Ok(())
}
