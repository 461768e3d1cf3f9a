//! Threads, futexes and thread-local segment bases.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::check::{Check, Outcome, errno, patience, sys};
use crate::ensure;

/// This room's checks.
pub const CHECKS: &[Check] = &[
    Check {
        name: "threads-fifty",
        limit: 60,
        run: fifty,
    },
    Check {
        name: "threads-churn",
        limit: 60,
        run: churn,
    },
    Check {
        name: "threads-mutex",
        limit: 60,
        run: mutex,
    },
    Check {
        name: "threads-condvar",
        limit: 60,
        run: condvar,
    },
    Check {
        name: "futex-ping-pong",
        limit: 60,
        run: futex_ping_pong,
    },
    Check {
        name: "futex-timeout",
        limit: 10,
        run: futex_timeout,
    },
    Check {
        name: "threads-channel",
        limit: 60,
        run: channel,
    },
    Check {
        name: "segment-bases",
        limit: 20,
        run: segment_bases,
    },
];

fn joined<T>(thread: thread::JoinHandle<T>) -> Result<T, String> {
    thread.join().map_err(|_| "a thread panicked".to_owned())
}

thread_local! {
    static OWN: Cell<u64> = const { Cell::new(0) };
}

fn fifty() -> Outcome {
    const THREADS: u64 = 50;
    let barrier = Arc::new(Barrier::new(THREADS as usize));
    let total = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (1..=THREADS)
        .map(|number| {
            let (barrier, total) = (Arc::clone(&barrier), Arc::clone(&total));
            thread::spawn(move || {
                OWN.set(number);
                for _ in 0..50 {
                    barrier.wait();
                    total.fetch_add(OWN.get(), SeqCst);
                    thread::yield_now();
                }
                OWN.get() == number
            })
        })
        .collect();
    for thread in threads {
        ensure!(joined(thread)?, "a thread-local changed");
    }
    let wanted = 50 * THREADS * (THREADS + 1) / 2;
    ensure!(
        total.load(SeqCst) == wanted,
        "total {}, wanted {wanted}",
        total.load(SeqCst)
    );
    Ok(())
}

fn churn() -> Outcome {
    for round in 0..1000u64 {
        let first = thread::spawn(move || round * 3);
        let second = thread::spawn(move || round + 7);
        let (first, second) = (joined(first)?, joined(second)?);
        ensure!(
            first == round * 3 && second == round + 7,
            "round {round}: {first}, {second}"
        );
    }
    Ok(())
}

fn mutex() -> Outcome {
    const TURNS: u64 = 20_000;
    let shared = Arc::new(Mutex::new((0u64, 0u64)));
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                for _ in 0..TURNS {
                    let mut both = shared.lock().map_err(|_| "poisoned")?;
                    if both.0 != both.1 {
                        return Err("two threads were inside the lock");
                    }
                    both.0 += 1;
                    both.1 += 1;
                }
                Ok(())
            })
        })
        .collect();
    for thread in threads {
        joined(thread)??;
    }
    let total = shared.lock().map_err(|_| "poisoned")?.0;
    ensure!(total == 8 * TURNS, "{total} turns, wanted {}", 8 * TURNS);
    Ok(())
}

fn condvar() -> Outcome {
    const ROUNDS: u32 = 5000;
    let turn = Arc::new((Mutex::new(0u32), Condvar::new()));
    let threads: Vec<_> = (0..3)
        .map(|own| {
            let turn = Arc::clone(&turn);
            thread::spawn(move || {
                for _ in 0..ROUNDS {
                    let mut now = turn.0.lock().map_err(|_| "poisoned")?;
                    while *now % 3 != own {
                        now = turn.1.wait(now).map_err(|_| "poisoned")?;
                    }
                    *now += 1;
                    turn.1.notify_all();
                }
                Ok::<(), &str>(())
            })
        })
        .collect();
    for thread in threads {
        joined(thread)??;
    }
    let turns = *turn.0.lock().map_err(|_| "poisoned")?;
    ensure!(turns == 3 * ROUNDS, "{turns} turns, wanted {}", 3 * ROUNDS);
    Ok(())
}

/// `futex(FUTEX_WAIT)`: sleeps while the word has this value.
fn futex_wait(word: &AtomicU32, value: u32, limit: Duration) -> i64 {
    let limit = libc::timespec {
        tv_sec: limit.as_secs() as i64,
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    // SAFETY: the word and the limit outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            value,
            &raw const limit,
        )
    }
}

/// `futex(FUTEX_WAKE)` of everybody.
fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word outlives the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// Waits until the word is `wanted`, a few seconds at most.
fn until(word: &AtomicU32, wanted: u32) -> Outcome {
    let start = Instant::now();
    loop {
        let now = word.load(SeqCst);
        if now == wanted {
            return Ok(());
        }
        futex_wait(word, now, Duration::from_secs(5));
        ensure!(
            start.elapsed() < patience(Duration::from_secs(20)),
            "waited for {wanted}, still {now}"
        );
    }
}

fn futex_ping_pong() -> Outcome {
    const ROUNDS: u32 = 10_000;
    let word = Arc::new(AtomicU32::new(0));
    let other = Arc::clone(&word);
    let thread = thread::spawn(move || {
        for round in 0..ROUNDS {
            until(&other, 2 * round + 1)?;
            other.store(2 * round + 2, SeqCst);
            futex_wake(&other);
        }
        Outcome::Ok(())
    });
    for round in 0..ROUNDS {
        word.store(2 * round + 1, SeqCst);
        futex_wake(&word);
        until(&word, 2 * round + 2)?;
    }
    joined(thread)?
}

fn futex_timeout() -> Outcome {
    let word = AtomicU32::new(5);
    let (start, limit) = (Instant::now(), Duration::from_millis(50));
    let waited = futex_wait(&word, 5, limit);
    ensure!(
        waited == -1 && errno() == libc::ETIMEDOUT,
        "returned {waited}, errno {}",
        errno()
    );
    ensure!(
        start.elapsed() >= limit,
        "timed out after {:?}, before its time",
        start.elapsed()
    );
    let waited = futex_wait(&word, 6, limit);
    ensure!(
        waited == -1 && errno() == libc::EAGAIN,
        "another value: {waited}, errno {}",
        errno()
    );
    Ok(())
}

fn channel() -> Outcome {
    const SENDERS: u64 = 4;
    const EACH: u64 = 20_000;
    let (sender, receiver) = mpsc::sync_channel(16);
    let threads: Vec<_> = (0..SENDERS)
        .map(|number| {
            let sender = sender.clone();
            thread::spawn(move || (0..EACH).all(|value| sender.send(number * EACH + value).is_ok()))
        })
        .collect();
    drop(sender);
    let (mut seen, mut sum) = (0, 0);
    for value in receiver {
        seen += 1;
        sum += value;
    }
    for thread in threads {
        ensure!(joined(thread)?, "a sender lost its receiver");
    }
    let all = SENDERS * EACH;
    ensure!(
        seen == all && sum == all * (all - 1) / 2,
        "{seen} values, sum {sum}"
    );
    Ok(())
}

/// `arch_prctl` codes (asm/prctl.h).
const ARCH_SET_GS: i32 = 0x1001;
const ARCH_GET_FS: i32 = 0x1003;
const ARCH_GET_GS: i32 = 0x1004;
/// AT_HWCAP2's bit that says `wrfsbase` and its kin are allowed.
const HWCAP2_FSGSBASE: u64 = 1 << 1;

/// The word at `gs:0`.
fn at_gs() -> u64 {
    let word;
    // SAFETY: the callers have set GS's base to a readable word.
    unsafe { std::arch::asm!("mov {}, gs:[0]", out(reg) word) };
    word
}

/// The base that `code` asks for.
fn base(code: i32) -> Result<u64, String> {
    let mut found = 0u64;
    // SAFETY: stores the base in `found`.
    sys("arch_prctl", unsafe {
        libc::syscall(libc::SYS_arch_prctl, code, &raw mut found)
    })?;
    Ok(found)
}

/// Gives this thread a GS base of its own and sees that it keeps it.
fn keep_gs(number: u64) -> Outcome {
    // SAFETY: reads the auxiliary vector.
    let direct = unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE != 0;
    let words = [number * 1000, number * 1000 + 1];
    let fs = base(ARCH_GET_FS)?;
    for round in 0..500 {
        let word = &words[round % 2];
        let address = std::ptr::from_ref(word).addr() as u64;
        if direct && round % 4 >= 2 {
            // SAFETY: nothing else in this program uses GS; the word outlives the loop.
            unsafe { std::arch::asm!("wrgsbase {}", in(reg) address) };
        } else {
            // SAFETY: as above, by system call.
            sys("arch_prctl", unsafe {
                libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, address)
            })?;
        }
        thread::yield_now();
        ensure!(
            at_gs() == *word,
            "round {round}: gs:0 is {}, wanted {word}",
            at_gs()
        );
        ensure!(
            base(ARCH_GET_GS)? == address,
            "GS base {:#x}, wanted {address:#x}",
            base(ARCH_GET_GS)?
        );
        ensure!(
            base(ARCH_GET_FS)? == fs,
            "FS base changed to {:#x}",
            base(ARCH_GET_FS)?
        );
        if direct {
            let (read_fs, read_gs): (u64, u64);
            // SAFETY: reads the two bases.
            unsafe {
                std::arch::asm!("rdfsbase {}", "rdgsbase {}", out(reg) read_fs, out(reg) read_gs)
            };
            ensure!(
                read_fs == fs && read_gs == address,
                "rdfsbase {read_fs:#x}, rdgsbase {read_gs:#x}"
            );
        }
    }
    Ok(())
}

fn segment_bases() -> Outcome {
    let threads: Vec<_> = (1..=8)
        .map(|number| thread::spawn(move || keep_gs(number)))
        .collect();
    keep_gs(99)?;
    for thread in threads {
        joined(thread)??;
    }
    Ok(())
}
