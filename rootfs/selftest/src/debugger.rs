//! What a debugger does: breakpoints, single steps, peeking and poking, stops at system calls.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::check::{Check, Ended, Outcome, errno, fork, handle, sys, wait, wait_any};
use crate::ensure;

/// This room's checks.
pub const CHECKS: &[Check] = &[
    Check {
        name: "debugger-breakpoint",
        limit: 20,
        run: breakpoint,
    },
    Check {
        name: "debugger-single-step",
        limit: 60,
        run: single_step,
    },
    Check {
        name: "debugger-step-syscall",
        limit: 20,
        run: step_over_system_call,
    },
    Check {
        name: "debugger-peek-poke",
        limit: 10,
        run: peek_poke,
    },
    Check {
        name: "debugger-syscall-stops",
        limit: 20,
        run: syscall_stops,
    },
    Check {
        name: "trap-flag",
        limit: 10,
        run: trap_flag,
    },
];

/// Turns of the stepped loop: two instructions each.
const TURNS: u64 = 1000;

std::arch::global_asm!(
    // A function whose instructions are known exactly.
    ".globl thaw_selftest_steps",
    ".globl thaw_selftest_steps_end",
    "thaw_selftest_steps:",
    "mov ecx, 1000",
    "2: dec ecx",
    "jnz 2b",
    "push rbx",
    "pop rbx",
    "thaw_selftest_steps_end:",
    "ret",
    // Three system calls in a row.
    ".globl thaw_selftest_calls",
    ".globl thaw_selftest_calls_end",
    "thaw_selftest_calls:",
    "mov eax, 110",
    "syscall",
    "mov eax, 110",
    "syscall",
    "mov eax, 110",
    "syscall",
    "thaw_selftest_calls_end:",
    "ret",
);

unsafe extern "C" {
    fn thaw_selftest_steps();
    fn thaw_selftest_steps_end();
    fn thaw_selftest_calls();
    fn thaw_selftest_calls_end();
}

/// One ptrace request with plain numbers.
fn ptrace(what: &str, request: u32, pid: i32, address: u64, data: u64) -> Result<i64, String> {
    // SAFETY: `pid` is our stopped child, or 0 for PTRACE_TRACEME; no request used with this
    // function writes to our memory.
    sys(what, unsafe { libc::ptrace(request, pid, address, data) })
}

/// A child that asks to be traced, stops, and then runs `body`.
fn traced(body: impl FnOnce() -> i32) -> Result<i32, String> {
    let pid = fork(|| {
        if ptrace("traceme", libc::PTRACE_TRACEME, 0, 0, 0).is_err() {
            return 99;
        }
        // SAFETY: stops this child until its tracer goes on.
        unsafe { libc::raise(libc::SIGSTOP) };
        body()
    })?;
    expect_stop(pid, libc::SIGSTOP)?;
    ptrace(
        "setoptions",
        libc::PTRACE_SETOPTIONS,
        pid,
        0,
        libc::PTRACE_O_TRACESYSGOOD as u64,
    )?;
    Ok(pid)
}

/// Waits for the child to stop with exactly this signal.
fn expect_stop(pid: i32, signal: i32) -> Outcome {
    let status = wait_any(pid, 0)?;
    let right = libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == signal;
    ensure!(
        right,
        "wanted a stop by signal {signal}, got status {status:#x}"
    );
    Ok(())
}

/// The stopped child's registers.
fn registers(pid: i32) -> Result<libc::user_regs_struct, String> {
    let mut found = MaybeUninit::<libc::user_regs_struct>::zeroed();
    // SAFETY: PTRACE_GETREGS fills the structure; all-zero is a valid one.
    unsafe {
        sys(
            "getregs",
            libc::ptrace(libc::PTRACE_GETREGS, pid, 0, found.as_mut_ptr()),
        )?;
        Ok(found.assume_init())
    }
}

/// Sets the stopped child's registers.
fn set_registers(pid: i32, wanted: &libc::user_regs_struct) -> Outcome {
    // SAFETY: PTRACE_SETREGS only reads the structure.
    sys("setregs", unsafe {
        libc::ptrace(libc::PTRACE_SETREGS, pid, 0, &raw const *wanted)
    })?;
    Ok(())
}

/// Reads a word of the child's memory; -1 can be data, so errno decides.
fn peek(pid: i32, address: u64) -> Result<u64, String> {
    // SAFETY: errno is this thread's own; PEEKDATA through the C library returns the word.
    unsafe {
        *libc::__errno_location() = 0;
        let word = libc::ptrace(libc::PTRACE_PEEKDATA, pid, address, 0);
        ensure!(
            word != -1 || errno() == 0,
            "peek {address:#x}: errno {}",
            errno()
        );
        Ok(word as u64)
    }
}

fn poke(pid: i32, address: u64, word: u64) -> Outcome {
    ptrace("poke", libc::PTRACE_POKEDATA, pid, address, word)?;
    Ok(())
}

fn proceed(pid: i32, request: u32) -> Outcome {
    ptrace("continue", request, pid, 0, 0)?;
    Ok(())
}

/// Puts an `int3` at `address`, runs to it, and takes it away with RIP back on the instruction.
fn run_to(pid: i32, address: u64) -> Outcome {
    let word = peek(pid, address)?;
    poke(pid, address, word & !0xff | 0xcc)?;
    proceed(pid, libc::PTRACE_CONT)?;
    expect_stop(pid, libc::SIGTRAP)?;
    let mut now = registers(pid)?;
    ensure!(
        now.rip == address + 1,
        "stopped at {:#x}, wanted {:#x}",
        now.rip,
        address + 1
    );
    poke(pid, address, word)?;
    now.rip = address;
    set_registers(pid, &now)
}

/// Lets the child run to its end, which must be a clean exit with this status.
fn expect_exit(pid: i32, status: i32) -> Outcome {
    proceed(pid, libc::PTRACE_CONT)?;
    let ended = wait(pid)?;
    ensure!(
        ended == Ended::Exited(status),
        "child ended {ended:?}, wanted exit {status}"
    );
    Ok(())
}

fn call_steps() {
    // SAFETY: the function changes only RCX and flags, as a C function may.
    unsafe { thaw_selftest_steps() }
}

fn breakpoint() -> Outcome {
    const HITS: usize = 200;
    let pid = traced(|| {
        (0..HITS).for_each(|_| call_steps());
        42
    })?;
    for hit in 0..HITS {
        run_to(pid, thaw_selftest_steps as *const () as u64)
            .map_err(|why| format!("hit {hit}: {why}"))?;
    }
    expect_exit(pid, 42)
}

/// Steps from `from` to `to` and counts the instructions.
fn count_steps(pid: i32, from: u64, to: u64) -> Result<u64, String> {
    run_to(pid, from)?;
    let mut steps = 0;
    loop {
        let now = registers(pid)?;
        if now.rip == to {
            return Ok(steps);
        }
        ensure!(
            (from..to).contains(&now.rip),
            "after {steps} steps at {:#x}, outside",
            now.rip
        );
        ensure!(steps < 10_000, "{steps} steps and not there yet");
        proceed(pid, libc::PTRACE_SINGLESTEP)?;
        expect_stop(pid, libc::SIGTRAP).map_err(|why| format!("step {steps}: {why}"))?;
        steps += 1;
    }
}

fn single_step() -> Outcome {
    let pid = traced(|| {
        call_steps();
        43
    })?;
    let (from, to) = (
        thaw_selftest_steps as *const () as u64,
        thaw_selftest_steps_end as *const () as u64,
    );
    let steps = count_steps(pid, from, to)?;
    ensure!(
        steps == 2 * TURNS + 3,
        "{steps} steps, wanted {}",
        2 * TURNS + 3
    );
    expect_exit(pid, 43)
}

fn step_over_system_call() -> Outcome {
    let pid = traced(|| {
        // SAFETY: three `getppid` calls, which touch no memory.
        unsafe { thaw_selftest_calls() };
        44
    })?;
    let (from, to) = (
        thaw_selftest_calls as *const () as u64,
        thaw_selftest_calls_end as *const () as u64,
    );
    let steps = count_steps(pid, from, to)?;
    ensure!(steps == 6, "{steps} steps, wanted 6");
    expect_exit(pid, 44)
}

/// What the tracer changes in the child.
static POKED: AtomicU64 = AtomicU64::new(1);

fn peek_poke() -> Outcome {
    let pid = traced(|| i32::from(POKED.load(SeqCst) != 0x1234_5678_9abc_def0))?;
    let at = POKED.as_ptr().addr() as u64;
    ensure!(
        peek(pid, at)? == 1,
        "peeked {:#x}, wanted 1",
        peek(pid, at)?
    );
    poke(pid, at, 0x1234_5678_9abc_def0)?;
    ensure!(
        POKED.load(SeqCst) == 1,
        "the poke reached the tracer's own memory"
    );
    expect_exit(pid, 0)
}

fn syscall_stops() -> Outcome {
    const CALLS: u64 = 300;
    let pid = traced(|| {
        // SAFETY: `getppid` touches no memory; the tracer replaces the last one's result.
        let results = (0..CALLS).map(|_| unsafe { libc::syscall(libc::SYS_getppid) });
        i32::from(results.fold(0, |_, last| last) != 777)
    })?;
    let (mut seen, mut exits) = (0, 0);
    while exits < CALLS {
        proceed(pid, libc::PTRACE_SYSCALL)?;
        expect_stop(pid, libc::SIGTRAP | 0x80)?;
        let mut now = registers(pid)?;
        if now.orig_rax != libc::SYS_getppid as u64 {
            continue;
        }
        seen += 1;
        if now.rax as i64 == -i64::from(libc::ENOSYS) {
            continue; // on its way in
        }
        exits += 1;
        // SAFETY: always succeeds.
        let own = unsafe { libc::getpid() } as u64;
        ensure!(now.rax == own, "getppid returned {}, wanted {own}", now.rax);
        if exits == CALLS {
            now.rax = 777;
            set_registers(pid, &now)?;
        }
    }
    ensure!(seen == 2 * CALLS, "{seen} stops, wanted {}", 2 * CALLS);
    expect_exit(pid, 0)
}

/// Single-step traps that [`on_trap`] has seen.
static TRAPS: AtomicU64 = AtomicU64::new(0);
const TRAP_FLAG: i64 = 0x100;

/// Counts a trap, and stops stepping after a hundred.
extern "C" fn on_trap(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if TRAPS.fetch_add(1, SeqCst) + 1 == 100 {
        // SAFETY: the kernel passes a valid ucontext to an SA_SIGINFO handler.
        unsafe {
            let flags = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs
                [libc::REG_EFL as usize];
            *flags &= !TRAP_FLAG;
        }
    }
}

fn trap_flag() -> Outcome {
    handle(
        libc::SIGTRAP,
        libc::SA_SIGINFO,
        on_trap as *const () as usize,
    )?;
    // SAFETY: sets the trap flag, which the handler clears, and counts RCX down.
    unsafe {
        std::arch::asm!(
            "pushfq",
            "or qword ptr [rsp], 0x100",
            "popfq",
            "2: dec rcx",
            "jnz 2b",
            inout("rcx") 1000u64 => _,
        );
    }
    ensure!(
        TRAPS.load(SeqCst) == 100,
        "{} traps, wanted 100",
        TRAPS.load(SeqCst)
    );
    Ok(())
}
