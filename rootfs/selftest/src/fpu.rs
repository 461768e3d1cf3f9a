//! Vector and floating-point state: kept across switches, signals and forks.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::check::{Check, Ended, Outcome, fork, handle, status_of, sys, wait};
use crate::ensure;

/// This room's checks.
pub const CHECKS: &[Check] = &[
    Check {
        name: "fpu-switches",
        limit: 60,
        run: switches,
    },
    Check {
        name: "fpu-threads",
        limit: 60,
        run: threads,
    },
    Check {
        name: "fpu-signals",
        limit: 60,
        run: signals,
    },
    Check {
        name: "fpu-fork",
        limit: 60,
        run: forks,
    },
    Check {
        name: "fpu-control-words",
        limit: 20,
        run: control_words,
    },
    Check {
        name: "fpu-exception",
        limit: 10,
        run: exception,
    },
];

/// Sixteen registers of at most 64 bytes.
type Registers = [[u64; 8]; 16];

/// Fills every vector register with a pattern made from `seed`, spins `turns` times and reads
/// them back: what is kept of the widest registers this processor and kernel have.
macro_rules! hold {
    ($mov:literal, $reg:literal, $turns:expr, $given:expr, $found:expr) => {
        // SAFETY: reads and writes 16 registers of at most 64 bytes from and to arrays of that
        // size; the instructions were asked for by CPUID, and every register is declared.
        unsafe {
            std::arch::asm!(
                concat!($mov, " ", $reg, "0, [rsi]"), concat!($mov, " ", $reg, "1, [rsi + 64]"),
                concat!($mov, " ", $reg, "2, [rsi + 128]"), concat!($mov, " ", $reg, "3, [rsi + 192]"),
                concat!($mov, " ", $reg, "4, [rsi + 256]"), concat!($mov, " ", $reg, "5, [rsi + 320]"),
                concat!($mov, " ", $reg, "6, [rsi + 384]"), concat!($mov, " ", $reg, "7, [rsi + 448]"),
                concat!($mov, " ", $reg, "8, [rsi + 512]"), concat!($mov, " ", $reg, "9, [rsi + 576]"),
                concat!($mov, " ", $reg, "10, [rsi + 640]"), concat!($mov, " ", $reg, "11, [rsi + 704]"),
                concat!($mov, " ", $reg, "12, [rsi + 768]"), concat!($mov, " ", $reg, "13, [rsi + 832]"),
                concat!($mov, " ", $reg, "14, [rsi + 896]"), concat!($mov, " ", $reg, "15, [rsi + 960]"),
                "2: dec rcx", "jnz 2b",
                concat!($mov, " [rdi], ", $reg, "0"), concat!($mov, " [rdi + 64], ", $reg, "1"),
                concat!($mov, " [rdi + 128], ", $reg, "2"), concat!($mov, " [rdi + 192], ", $reg, "3"),
                concat!($mov, " [rdi + 256], ", $reg, "4"), concat!($mov, " [rdi + 320], ", $reg, "5"),
                concat!($mov, " [rdi + 384], ", $reg, "6"), concat!($mov, " [rdi + 448], ", $reg, "7"),
                concat!($mov, " [rdi + 512], ", $reg, "8"), concat!($mov, " [rdi + 576], ", $reg, "9"),
                concat!($mov, " [rdi + 640], ", $reg, "10"), concat!($mov, " [rdi + 704], ", $reg, "11"),
                concat!($mov, " [rdi + 768], ", $reg, "12"), concat!($mov, " [rdi + 832], ", $reg, "13"),
                concat!($mov, " [rdi + 896], ", $reg, "14"), concat!($mov, " [rdi + 960], ", $reg, "15"),
                in("rsi") $given.as_ptr(), in("rdi") $found.as_mut_ptr(), inout("rcx") $turns => _,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _,
                out("xmm5") _, out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _,
                out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _,
                out("xmm15") _,
            );
        }
    };
}

/// Holds patterns made from `seed` in the vector registers for `turns` and compares.
fn keep(seed: u64, turns: u64) -> Outcome {
    let mut given: Registers = [[0; 8]; 16];
    for (index, word) in given.iter_mut().flatten().enumerate() {
        *word = (seed + 1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(index as u32)
            ^ index as u64;
    }
    let mut found: Registers = [[0; 8]; 16];
    let words = if std::arch::is_x86_feature_detected!("avx512f") {
        hold!("vmovdqu64", "zmm", turns, given, found);
        8
    } else if std::arch::is_x86_feature_detected!("avx") {
        hold!("vmovdqu", "ymm", turns, given, found);
        4
    } else {
        hold!("movdqu", "xmm", turns, given, found);
        2
    };
    for (number, (given, found)) in given.iter().zip(&found).enumerate() {
        ensure!(
            given[..words] == found[..words],
            "register {number} ({words} words): {:x?}, wanted {:x?}",
            &found[..words],
            &given[..words]
        );
    }
    Ok(())
}

/// Turns that take about a millisecond.
const MILLISECOND: u64 = 2_000_000;

/// Keeps its registers over many switches, both forced and asked for.
fn keep_long(seed: u64) -> Outcome {
    for round in 0..100 {
        keep(seed * 1000 + round, MILLISECOND / 2)?;
        keep(seed * 1000 + round, 100)?;
        std::thread::yield_now();
    }
    Ok(())
}

fn switches() -> Outcome {
    let children: Vec<_> = (1..=4)
        .map(|seed| fork(move || status_of(keep_long(seed))))
        .collect::<Result<_, _>>()?;
    keep_long(9)?;
    for child in children {
        let ended = wait(child)?;
        ensure!(
            ended == Ended::Exited(0),
            "a process lost its registers: {ended:?}"
        );
    }
    Ok(())
}

fn threads() -> Outcome {
    let threads: Vec<_> = (1..=4)
        .map(|seed| std::thread::spawn(move || keep_long(seed)))
        .collect();
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")??;
    }
    Ok(())
}

/// Signals that [`spoil`] has handled.
static SPOILED: AtomicU64 = AtomicU64::new(0);

/// A handler that overwrites every vector register: what it interrupted must not see it.
extern "C" fn spoil(_signal: i32) {
    if keep(u64::MAX / 2, 10).is_ok() {
        SPOILED.fetch_add(1, SeqCst);
    }
}

fn signals() -> Outcome {
    handle(libc::SIGALRM, libc::SA_RESTART, spoil as *const () as usize)?;
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
    while SPOILED.load(SeqCst) < 200 {
        keep(SPOILED.load(SeqCst), MILLISECOND)?;
        ensure!(
            start.elapsed() < Duration::from_secs(40),
            "{} signals in 40 s",
            SPOILED.load(SeqCst)
        );
    }
    Ok(())
}

fn forks() -> Outcome {
    for seed in 0..200 {
        let child = fork(|| status_of(keep(seed, 1000)))?;
        keep(seed + 5000, 1000)?;
        ensure!(
            wait(child)? == Ended::Exited(0),
            "child {seed} lost its registers"
        );
    }
    Ok(())
}

/// The x87 control word and MXCSR.
fn read_control() -> (u16, u32) {
    let (mut x87, mut mxcsr) = (0u16, 0u32);
    // SAFETY: stores two control words in places of their size.
    unsafe {
        std::arch::asm!("fnstcw [{}]", "stmxcsr [{}]", in(reg) &raw mut x87, in(reg) &raw mut mxcsr)
    };
    (x87, mxcsr)
}

fn set_control(x87: u16, mxcsr: u32) {
    // SAFETY: all exceptions stay masked; rounding is put back before Rust computes with floats.
    unsafe {
        std::arch::asm!("fldcw [{}]", "ldmxcsr [{}]", in(reg) &raw const x87, in(reg) &raw const mxcsr)
    };
}

/// Keeps control words of its own over switches.
fn keep_control(rounding: u16) -> Outcome {
    let plain = read_control();
    let own = (
        0x037f & !0x0c00 | rounding << 10,
        0x1f80 | u32::from(rounding) << 13,
    );
    let mut found = own;
    for _ in 0..200 {
        set_control(own.0, own.1);
        // SAFETY: always succeeds.
        unsafe { libc::sched_yield() };
        keep_nothing(MILLISECOND / 10);
        found = read_control();
        if found != own {
            break;
        }
    }
    set_control(plain.0, plain.1);
    ensure!(found == own, "control words {found:x?}, wanted {own:x?}");
    Ok(())
}

/// Spins without touching any state.
fn keep_nothing(turns: u64) {
    // SAFETY: counts a register down.
    unsafe { std::arch::asm!("2: dec {0}", "jnz 2b", inout(reg) turns => _) };
}

fn control_words() -> Outcome {
    let (x87, mxcsr) = read_control();
    ensure!(
        x87 == 0x037f && mxcsr & !0x3f == 0x1f80,
        "a new process has {x87:#x} and {mxcsr:#x}"
    );
    let threads: Vec<_> = (0..4)
        .map(|rounding| std::thread::spawn(move || keep_control(rounding)))
        .collect();
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")??;
    }
    Ok(())
}

fn exception() -> Outcome {
    // An unmasked division by zero is SIGFPE: SSE's and, at the next waiting instruction, x87's.
    let sse = crate::check::in_child(|| {
        set_control(0x037f, 0x1f80 & !0x200);
        // SAFETY: divides one by zero in registers, which ends this child.
        unsafe {
            std::arch::asm!("pxor xmm1, xmm1", "divsd xmm0, xmm1", inout("xmm0") 1.0f64 => _, out("xmm1") _)
        };
        0
    })?;
    ensure!(sse == Ended::Killed(libc::SIGFPE), "SSE: {sse:?}");
    let x87 = crate::check::in_child(|| {
        set_control(0x037f & !0x4, 0x1f80);
        // SAFETY: divides one by zero on the x87 stack, which ends this child.
        unsafe {
            std::arch::asm!("fld1", "fldz", "fdivp", "fwait", out("st(0)") _, out("st(1)") _)
        };
        0
    })?;
    ensure!(x87 == Ended::Killed(libc::SIGFPE), "x87: {x87:?}");
    Ok(())
}
