//! Signals and system calls: restarts, interruptions, masks, stacks, storms, and the registers
//! that all of them must leave alone.

use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::check::{
    Check, Ended, Outcome, errno, fork, handle, patience, pipe, status_of, sys, wait,
};
use crate::ensure;

/// This room's checks.
pub const CHECKS: &[Check] = &[
    Check {
        name: "syscall-bad-number",
        limit: 10,
        run: bad_number,
    },
    Check {
        name: "signal-interrupts",
        limit: 10,
        run: interrupts,
    },
    Check {
        name: "signal-restarts",
        limit: 10,
        run: restarts,
    },
    Check {
        name: "signal-registers",
        limit: 20,
        run: registers,
    },
    Check {
        name: "signal-nested",
        limit: 10,
        run: nested,
    },
    Check {
        name: "signal-altstack",
        limit: 10,
        run: altstack,
    },
    Check {
        name: "signal-mask",
        limit: 10,
        run: mask,
    },
    Check {
        name: "signal-ping-pong",
        limit: 60,
        run: ping_pong,
    },
    Check {
        name: "signal-storm",
        limit: 60,
        run: storm,
    },
];

/// Signals that [`count`] has seen, and the sum of the values sent with them.
static SEEN: AtomicU64 = AtomicU64::new(0);
static SUM: AtomicU64 = AtomicU64::new(0);

/// Counts a signal and adds up its value.
extern "C" fn count(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; the value is 0 if it was sent by `kill`.
    let value = unsafe { (*info).si_value().sival_ptr } as u64;
    SUM.fetch_add(value & 0xffff_ffff, SeqCst);
    SEEN.fetch_add(1, SeqCst);
}

/// Installs [`count`] for a signal.
fn count_signal(signal: i32, flags: i32) -> Outcome {
    handle(
        signal,
        flags | libc::SA_SIGINFO,
        count as *const () as usize,
    )
}

/// A signal set with these members.
fn set(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the whole set before anything is added to it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// Blocks or unblocks signals.
fn block(how: i32, signals: &[i32]) -> Outcome {
    // SAFETY: the set is complete and outlives the call.
    sys("sigprocmask", unsafe {
        libc::sigprocmask(how, &set(signals), std::ptr::null_mut())
    })?;
    Ok(())
}

/// Sends a signal.
fn kill(pid: i32, signal: i32) -> Outcome {
    // SAFETY: `pid` is this process, its parent that waits for it, or its unreaped child.
    sys("kill", unsafe { libc::kill(pid, signal) })?;
    Ok(())
}

fn own_pid() -> i32 {
    // SAFETY: always succeeds.
    unsafe { libc::getpid() }
}

/// Six patterned registers, a system call, and the same registers again.
fn call_with_patterns(number: u64) -> (i64, [u64; 6]) {
    let result: i64;
    let mut kept = [0u64; 6];
    // SAFETY: callers pass numbers whose calls touch no memory for these arguments.
    unsafe {
        std::arch::asm!(
            "syscall",
            inout("rax") number => result,
            inout("rdi") PATTERN => kept[0],
            inout("rsi") PATTERN + 1 => kept[1],
            inout("rdx") PATTERN + 2 => kept[2],
            inout("r10") PATTERN + 3 => kept[3],
            inout("r8") PATTERN + 4 => kept[4],
            inout("r9") PATTERN + 5 => kept[5],
            out("rcx") _,
            out("r11") _,
        );
    }
    (result, kept)
}

const PATTERN: u64 = 0x5a5a_0123_4567_89a0;

fn bad_number() -> Outcome {
    for number in [100_000, 0xffff_ffff, u64::MAX, 0x4000_0000 + 5000] {
        let (result, kept) = call_with_patterns(number);
        ensure!(
            result == -i64::from(libc::ENOSYS),
            "call {number:#x} answered {result}"
        );
        let wanted: Vec<u64> = (0..6).map(|index| PATTERN + index).collect();
        ensure!(
            kept[..] == wanted[..],
            "call {number:#x} changed registers: {kept:x?}"
        );
    }
    for _ in 0..10_000 {
        let (result, kept) = call_with_patterns(libc::SYS_getppid as u64);
        ensure!(
            result > 0 && kept[0] == PATTERN && kept[5] == PATTERN + 5,
            "getppid: {result} {kept:x?}"
        );
    }
    Ok(())
}

/// Blocks in `read` on a pipe while a child sends SIGUSR1 and, later, one byte.
fn read_while_signalled(flags: i32) -> Result<(isize, i32), String> {
    count_signal(libc::SIGUSR1, flags)?;
    let (reader, writer) = pipe()?;
    let parent = own_pid();
    let child = fork(|| {
        std::thread::sleep(Duration::from_millis(30));
        if kill(parent, libc::SIGUSR1).is_err() {
            return 1;
        }
        std::thread::sleep(Duration::from_millis(30));
        // SAFETY: writes one byte of a valid buffer.
        i32::from(unsafe { libc::write(writer.as_raw_fd(), b"x".as_ptr().cast(), 1) } != 1)
    })?;
    let mut byte = 0u8;
    // SAFETY: reads at most one byte into `byte`.
    let got = unsafe { libc::read(reader.as_raw_fd(), (&raw mut byte).cast(), 1) };
    let error = errno();
    ensure!(SEEN.load(SeqCst) == 1, "{} signals", SEEN.load(SeqCst));
    // The child's write must still find a reader.
    let ended = wait(child)?;
    drop(reader);
    ensure!(ended == Ended::Exited(0), "child: {ended:?}");
    Ok((got, error))
}

fn interrupts() -> Outcome {
    let (got, error) = read_while_signalled(0)?;
    ensure!(
        got == -1 && error == libc::EINTR,
        "read returned {got}, errno {error}; wanted EINTR"
    );
    // A sleep that is interrupted says how much is left.
    let (parent, wanted) = (
        own_pid(),
        libc::timespec {
            tv_sec: 5,
            tv_nsec: 0,
        },
    );
    let child = fork(|| {
        std::thread::sleep(Duration::from_millis(50));
        status_of(kill(parent, libc::SIGUSR1))
    })?;
    let mut left = wanted;
    // SAFETY: both timespecs are valid.
    let slept = unsafe { libc::nanosleep(&raw const wanted, &raw mut left) };
    ensure!(
        slept == -1 && errno() == libc::EINTR,
        "nanosleep returned {slept}"
    );
    ensure!((3..5).contains(&left.tv_sec), "{} s left of 5", left.tv_sec);
    ensure!(wait(child)? == Ended::Exited(0), "child failed");
    Ok(())
}

fn restarts() -> Outcome {
    let (got, error) = read_while_signalled(libc::SA_RESTART)?;
    ensure!(
        got == 1,
        "read returned {got}, errno {error}; wanted it restarted"
    );
    Ok(())
}

/// Keeps eleven patterned registers in a loop of this many turns; how many differ at the end.
fn hold_registers(turns: u64) -> u64 {
    let wrong: u64;
    // SAFETY: uses only registers declared here; RBX and RBP are put back.
    unsafe {
        std::arch::asm!(
            "push rbx",
            "push rbp",
            "mov rbx, 0x1b1b1b1b", "mov rbp, 0x2b2b2b2b",
            "mov rdx, 0x3b3b3b3b", "mov rsi, 0x4b4b4b4b",
            "mov r8, 0x5b5b5b5b", "mov r9, 0x6b6b6b6b",
            "mov r10, 0x1c1c1c1c", "mov r11, 0x2c2c2c2c",
            "mov r12, 0x3c3c3c3c", "mov r13, 0x4c4c4c4c",
            "mov r14, 0x5c5c5c5c", "mov r15, 0x6c6c6c6c",
            "2:", "dec rcx", "jnz 2b",
            "xor eax, eax",
            "cmp rbx, 0x1b1b1b1b", "setne cl", "movzx edi, cl", "add eax, edi",
            "cmp rbp, 0x2b2b2b2b", "setne cl", "movzx edi, cl", "add eax, edi",
            "cmp rdx, 0x3b3b3b3b", "setne cl", "movzx edi, cl", "add eax, edi",
            "cmp rsi, 0x4b4b4b4b", "setne cl", "movzx edi, cl", "add eax, edi",
            "cmp r8, 0x5b5b5b5b", "setne cl", "movzx edi, cl", "add eax, edi",
            "cmp r9, 0x6b6b6b6b", "setne cl", "movzx edi, cl", "add eax, edi",
            "cmp r10, 0x1c1c1c1c", "setne cl", "movzx edi, cl", "add eax, edi",
            "cmp r11, 0x2c2c2c2c", "setne cl", "movzx edi, cl", "add eax, edi",
            "cmp r12, 0x3c3c3c3c", "setne cl", "movzx edi, cl", "add eax, edi",
            "cmp r13, 0x4c4c4c4c", "setne cl", "movzx edi, cl", "add eax, edi",
            "cmp r14, 0x5c5c5c5c", "setne cl", "movzx edi, cl", "add eax, edi",
            "cmp r15, 0x6c6c6c6c", "setne cl", "movzx edi, cl", "add eax, edi",
            "pop rbp",
            "pop rbx",
            inout("rcx") turns => _, out("rax") wrong, out("rdi") _, out("rdx") _, out("rsi") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
    wrong
}

fn registers() -> Outcome {
    count_signal(libc::SIGALRM, 0)?;
    let often = libc::timeval {
        tv_sec: 0,
        tv_usec: 2000,
    };
    let timer = libc::itimerval {
        it_interval: often,
        it_value: often,
    };
    // SAFETY: the timer's value is complete.
    sys("setitimer", unsafe {
        libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut())
    })?;
    let start = Instant::now();
    while SEEN.load(SeqCst) < 300 {
        let wrong = hold_registers(2_000_000);
        ensure!(
            wrong == 0,
            "{wrong} registers changed after {} signals",
            SEEN.load(SeqCst)
        );
        ensure!(
            start.elapsed() < patience(Duration::from_secs(45)),
            "only {} signals",
            SEEN.load(SeqCst)
        );
    }
    Ok(())
}

/// How deep [`descend`] is, and the deepest it was.
static DEPTH: AtomicI32 = AtomicI32::new(0);
static DEEPEST: AtomicI32 = AtomicI32::new(0);
/// Signal frames on the stack at once: AVX-512 frames are 3 KiB each, the stack is 8 MiB.
const NESTED: i32 = 100;

/// Raises its own signal again until it is [`NESTED`] deep.
extern "C" fn descend(signal: i32) {
    let depth = DEPTH.fetch_add(1, SeqCst) + 1;
    DEEPEST.fetch_max(depth, SeqCst);
    if depth < NESTED {
        // SAFETY: raising a signal in its SA_NODEFER handler runs the handler again.
        unsafe {
            libc::raise(if signal == libc::SIGUSR1 {
                libc::SIGUSR2
            } else {
                libc::SIGUSR1
            })
        };
    }
    DEPTH.fetch_sub(1, SeqCst);
}

fn nested() -> Outcome {
    for signal in [libc::SIGUSR1, libc::SIGUSR2] {
        handle(signal, libc::SA_NODEFER, descend as *const () as usize)?;
    }
    for round in 0..20 {
        kill(own_pid(), libc::SIGUSR1)?;
        let (depth, deepest) = (DEPTH.load(SeqCst), DEEPEST.swap(0, SeqCst));
        ensure!(
            depth == 0 && deepest == NESTED,
            "round {round}: deepest {deepest}, left at {depth}"
        );
    }
    Ok(())
}

/// Where [`note_stack`] last ran.
static STACK: AtomicU64 = AtomicU64::new(0);

extern "C" fn note_stack(_signal: i32) {
    let here = 0u8;
    STACK.store((&raw const here).addr() as u64, SeqCst);
}

fn altstack() -> Outcome {
    let mut stack = vec![0u8; 64 << 10];
    let range = stack.as_ptr().addr() as u64..stack.as_ptr().addr() as u64 + stack.len() as u64;
    let alternate = libc::stack_t {
        ss_sp: stack.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: stack.len(),
    };
    // SAFETY: the stack outlives its use: the process ends with this check.
    sys("sigaltstack", unsafe {
        libc::sigaltstack(&raw const alternate, std::ptr::null_mut())
    })?;
    handle(
        libc::SIGUSR1,
        libc::SA_ONSTACK,
        note_stack as *const () as usize,
    )?;
    handle(libc::SIGUSR2, 0, note_stack as *const () as usize)?;
    for _ in 0..100 {
        kill(own_pid(), libc::SIGUSR1)?;
        ensure!(
            range.contains(&STACK.load(SeqCst)),
            "the handler did not run on its stack"
        );
        kill(own_pid(), libc::SIGUSR2)?;
        ensure!(
            !range.contains(&STACK.load(SeqCst)),
            "a plain handler ran on the alternate stack"
        );
    }
    std::mem::forget(stack);
    Ok(())
}

fn mask() -> Outcome {
    count_signal(libc::SIGUSR1, 0)?;
    for round in 1..=200 {
        block(libc::SIG_BLOCK, &[libc::SIGUSR1])?;
        kill(own_pid(), libc::SIGUSR1)?;
        kill(own_pid(), libc::SIGUSR1)?;
        ensure!(
            SEEN.load(SeqCst) == round - 1,
            "a blocked signal was delivered"
        );
        block(libc::SIG_UNBLOCK, &[libc::SIGUSR1])?;
        ensure!(
            SEEN.load(SeqCst) == round,
            "{} deliveries, wanted {round}",
            SEEN.load(SeqCst)
        );
    }
    Ok(())
}

/// Waits for SIGUSR1, which is blocked, with a limit.
fn await_signal() -> Outcome {
    let limit = libc::timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    // SAFETY: the set and the limit are complete; no siginfo is asked for.
    sys("sigtimedwait", unsafe {
        libc::sigtimedwait(
            &set(&[libc::SIGUSR1]),
            std::ptr::null_mut(),
            &raw const limit,
        )
    })?;
    Ok(())
}

fn ping_pong() -> Outcome {
    const ROUNDS: u32 = 5000;
    block(libc::SIG_BLOCK, &[libc::SIGUSR1])?;
    let parent = own_pid();
    let child = fork(|| {
        status_of((0..ROUNDS).try_for_each(|_| {
            await_signal()?;
            kill(parent, libc::SIGUSR1)
        }))
    })?;
    for round in 0..ROUNDS {
        kill(child, libc::SIGUSR1)?;
        await_signal().map_err(|why| format!("round {round}: {why}"))?;
    }
    let ended = wait(child)?;
    ensure!(ended == Ended::Exited(0), "child: {ended:?}");
    Ok(())
}

/// Senders of the storm, and how many queued signals each sends.
const SENDERS: u64 = 4;
const SENT: u64 = 2000;

/// Queues one real-time signal with a value, waiting while the queue is full.
fn queue(pid: i32, value: u64) -> Outcome {
    loop {
        let value = libc::sigval {
            sival_ptr: value as *mut libc::c_void,
        };
        // SAFETY: sends to our parent, which waits for us.
        if unsafe { libc::sigqueue(pid, libc::SIGRTMIN(), value) } == 0 {
            return Ok(());
        }
        ensure!(errno() == libc::EAGAIN, "sigqueue: errno {}", errno());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn storm() -> Outcome {
    count_signal(libc::SIGRTMIN(), 0)?;
    let parent = own_pid();
    let mut children = Vec::new();
    for sender in 1..=SENDERS {
        children.push(fork(|| {
            status_of((0..SENT).try_for_each(|turn| queue(parent, sender * turn)))
        })?);
    }
    while SEEN.load(SeqCst) < SENDERS * SENT {
        let wrong = hold_registers(100_000);
        ensure!(wrong == 0, "{wrong} registers changed");
    }
    for child in children {
        ensure!(wait(child)? == Ended::Exited(0), "a sender failed");
    }
    let wanted: u64 = (1..=SENDERS)
        .map(|sender| sender * (SENT * (SENT - 1) / 2))
        .sum();
    let (seen, sum) = (SEEN.load(SeqCst), SUM.load(SeqCst));
    ensure!(
        seen == SENDERS * SENT && sum == wanted,
        "{seen} signals, values {sum}, wanted {wanted}"
    );
    Ok(())
}
