//! Clocks and timers: monotonic, agreeing with each other, never early and not very late.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::check::{Check, Outcome, handle, patience, sys};
use crate::ensure;

/// This room's checks.
pub const CHECKS: &[Check] = &[
    Check {
        name: "clock-monotonic",
        limit: 20,
        run: monotonic,
    },
    Check {
        name: "clock-agrees",
        limit: 20,
        run: agrees,
    },
    Check {
        name: "rdtsc-monotonic",
        limit: 20,
        run: rdtsc,
    },
    Check {
        name: "rdtsc-rate",
        limit: 20,
        run: rdtsc_rate,
    },
    Check {
        name: "nanosleep",
        limit: 30,
        run: nanosleep,
    },
    Check {
        name: "itimer-real",
        limit: 20,
        run: itimer_real,
    },
    Check {
        name: "itimer-virtual",
        limit: 20,
        run: itimer_virtual,
    },
    Check {
        name: "itimer-prof",
        limit: 20,
        run: itimer_prof,
    },
    Check {
        name: "timerfd-epoll",
        limit: 20,
        run: timerfd_epoll,
    },
    Check {
        name: "poll-timeout",
        limit: 20,
        run: poll_timeout,
    },
    Check {
        name: "cpu-time",
        limit: 20,
        run: cpu_time,
    },
];

/// The clocks that must never go back.
const MONOTONIC: [i32; 4] = [
    libc::CLOCK_MONOTONIC,
    libc::CLOCK_MONOTONIC_RAW,
    libc::CLOCK_BOOTTIME,
    libc::CLOCK_MONOTONIC_COARSE,
];

/// How late a sleep may end: far more than a busy two-core host makes of it.
const LATE: Duration = Duration::from_millis(100);

/// A clock by the C library, which asks the vDSO.
fn clock(which: i32) -> Result<i128, String> {
    let mut now = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: stores the time in `now`, for which all-zero is valid too.
    unsafe {
        sys(
            "clock_gettime",
            libc::clock_gettime(which, now.as_mut_ptr()),
        )?;
        Ok(nanoseconds(now.assume_init()))
    }
}

/// The same clock by the system call itself.
fn raw_clock(which: i32) -> Result<i128, String> {
    let mut now = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: stores the time in `now`, for which all-zero is valid too.
    unsafe {
        sys(
            "clock_gettime",
            libc::syscall(libc::SYS_clock_gettime, which, now.as_mut_ptr()),
        )?;
        Ok(nanoseconds(now.assume_init()))
    }
}

fn nanoseconds(time: libc::timespec) -> i128 {
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

fn monotonic() -> Outcome {
    for which in MONOTONIC {
        let mut before = clock(which)?;
        for round in 0..200_000 {
            let now = if round % 100 == 0 {
                raw_clock(which)?
            } else {
                clock(which)?
            };
            ensure!(
                now >= before,
                "clock {which} went back {} ns in round {round}",
                before - now
            );
            before = now;
        }
    }
    Ok(())
}

fn agrees() -> Outcome {
    for which in [
        libc::CLOCK_REALTIME,
        libc::CLOCK_MONOTONIC,
        libc::CLOCK_BOOTTIME,
    ] {
        for _ in 0..2000 {
            let (before, inside, after) = (clock(which)?, raw_clock(which)?, clock(which)?);
            ensure!(
                before <= inside && inside <= after,
                "clock {which}: vDSO {before}, system call {inside}, vDSO {after}"
            );
        }
    }
    let year_2024 = 1_704_067_200_000_000_000;
    let now = clock(libc::CLOCK_REALTIME)?;
    ensure!(now > year_2024, "the wall clock says {now} ns");
    Ok(())
}

/// The time stamp counter, with `rdtscp` every other time.
fn time_stamp(serialised: bool) -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: reads a counter.
    unsafe {
        if serialised {
            std::arch::asm!("rdtscp", out("rax") low, out("rdx") high, out("rcx") _);
        } else {
            std::arch::asm!("lfence", "rdtsc", out("rax") low, out("rdx") high);
        }
    }
    high << 32 | low
}

fn rdtsc() -> Outcome {
    let mut before = time_stamp(false);
    for round in 0..1_000_000 {
        let now = time_stamp(round % 2 == 0);
        ensure!(
            now >= before,
            "the counter went back {} in round {round}",
            before - now
        );
        before = now;
    }
    Ok(())
}

fn rdtsc_rate() -> Outcome {
    // Two stretches of the same clock must show the same rate, within two percent.
    let mut rates = [0f64; 2];
    for rate in &mut rates {
        let (ticks, time) = (time_stamp(true), clock(libc::CLOCK_MONOTONIC_RAW)?);
        std::thread::sleep(Duration::from_millis(200));
        let ticks = time_stamp(true) - ticks;
        *rate = ticks as f64 / (clock(libc::CLOCK_MONOTONIC_RAW)? - time) as f64;
    }
    let ratio = rates[0] / rates[1];
    ensure!(
        (0.98..1.02).contains(&ratio),
        "{:.4} and then {:.4} ticks a ns",
        rates[0],
        rates[1]
    );
    ensure!((0.1..10.0).contains(&rates[0]), "{} ticks a ns", rates[0]);
    Ok(())
}

fn nanosleep() -> Outcome {
    for micros in [0, 50, 500, 1000, 5000, 20_000, 110_000, 300_000] {
        for _ in 0..5 {
            let wanted = Duration::from_micros(micros);
            let start = Instant::now();
            std::thread::sleep(wanted);
            let slept = start.elapsed();
            ensure!(slept >= wanted, "slept {slept:?} of {wanted:?}");
            ensure!(
                slept < wanted + patience(LATE),
                "slept {slept:?} instead of {wanted:?}"
            );
        }
    }
    // Many short ones in a row: a lost timer would show as a long one.
    let start = Instant::now();
    (0..200).for_each(|_| std::thread::sleep(Duration::from_millis(1)));
    let slept = start.elapsed();
    ensure!(
        (Duration::from_millis(200)..patience(Duration::from_secs(5))).contains(&slept),
        "200 x 1 ms: {slept:?}"
    );
    Ok(())
}

/// Expiries that [`tick`] has counted.
static TICKS: AtomicU64 = AtomicU64::new(0);

extern "C" fn tick(_signal: i32) {
    TICKS.fetch_add(1, SeqCst);
}

/// Expiries that each interval timer is watched for.
const EXPIRIES: u64 = 20;

/// Starts a 10 ms interval timer, keeps busy for twenty expiries; the time it took.
fn busy_with_itimer(which: libc::c_int, signal: i32) -> Result<Duration, String> {
    handle(signal, libc::SA_RESTART, tick as *const () as usize)?;
    let often = libc::timeval {
        tv_sec: 0,
        tv_usec: 10_000,
    };
    let timer = libc::itimerval {
        it_interval: often,
        it_value: often,
    };
    let start = Instant::now();
    // SAFETY: the timer's value is complete.
    sys("setitimer", unsafe {
        libc::syscall(libc::SYS_setitimer, which, &raw const timer, 0)
    })?;
    let mut turns = 0u64;
    while TICKS.load(SeqCst) < EXPIRIES {
        turns += 1;
        if turns.is_multiple_of(1 << 12) {
            ensure!(
                start.elapsed() < patience(Duration::from_secs(15)),
                "{} expiries in 15 s",
                TICKS.load(SeqCst)
            );
            // The system's share of the time, for ITIMER_PROF.
            std::thread::yield_now();
        }
    }
    Ok(start.elapsed())
}

fn itimer_real() -> Outcome {
    let took = busy_with_itimer(libc::ITIMER_REAL as libc::c_int, libc::SIGALRM)?;
    let wanted = Duration::from_millis(10 * EXPIRIES - 1);
    ensure!(took >= wanted, "{EXPIRIES} expiries of 10 ms in {took:?}");
    Ok(())
}

fn itimer_virtual() -> Outcome {
    busy_with_itimer(libc::ITIMER_VIRTUAL as libc::c_int, libc::SIGVTALRM)?;
    // Asleep it must stand still, but for a tick's rounding.
    let before = TICKS.load(SeqCst);
    std::thread::sleep(Duration::from_millis(200));
    let during = TICKS.load(SeqCst) - before;
    ensure!(
        during <= 2,
        "{during} expiries of virtual time while asleep"
    );
    Ok(())
}

fn itimer_prof() -> Outcome {
    busy_with_itimer(libc::ITIMER_PROF as libc::c_int, libc::SIGPROF)?;
    Ok(())
}

fn timerfd_epoll() -> Outcome {
    let interval = Duration::from_millis(20);
    let often = libc::timespec {
        tv_sec: 0,
        tv_nsec: i64::from(interval.subsec_nanos()),
    };
    let setting = libc::itimerspec {
        it_interval: often,
        it_value: often,
    };
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 42,
    };
    let start = Instant::now();
    // SAFETY: every structure is complete and outlives its call; the descriptors are new ones.
    let (timer, poller) = unsafe {
        let timer = sys(
            "timerfd_create",
            libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK),
        )?;
        let poller = sys("epoll_create1", libc::epoll_create1(0))?;
        sys(
            "epoll_ctl",
            libc::epoll_ctl(poller, libc::EPOLL_CTL_ADD, timer, &raw mut event),
        )?;
        sys(
            "timerfd_settime",
            libc::timerfd_settime(timer, 0, &raw const setting, std::ptr::null_mut()),
        )?;
        (timer, poller)
    };
    let mut expiries = 0;
    while expiries < 20 {
        let (mut found, mut count) = (libc::epoll_event { events: 0, u64: 0 }, 0u64);
        // SAFETY: one event and one eight-byte counter, both valid places.
        let (ready, read) = unsafe {
            let ready = sys(
                "epoll_wait",
                libc::epoll_wait(poller, &raw mut found, 1, 5000),
            )?;
            (ready, libc::read(timer, (&raw mut count).cast(), 8))
        };
        let data = found.u64;
        ensure!(
            ready == 1 && data == 42 && read == 8,
            "ready {ready}, data {data}, read {read}"
        );
        expiries += count;
    }
    let (took, due) = (start.elapsed(), interval * expiries as u32);
    ensure!(
        took >= due && took < due + patience(LATE),
        "{expiries} expiries of {interval:?} in {took:?}"
    );
    Ok(())
}

fn poll_timeout() -> Outcome {
    for millis in [1, 7, 40, 150] {
        let start = Instant::now();
        // SAFETY: no descriptors are given.
        let ready = unsafe { libc::poll(std::ptr::null_mut(), 0, millis) };
        let (took, wanted) = (start.elapsed(), Duration::from_millis(millis as u64));
        ensure!(
            ready == 0 && took >= wanted && took < wanted + patience(LATE),
            "poll({millis}): {ready} after {took:?}"
        );
    }
    Ok(())
}

fn cpu_time() -> Outcome {
    let (wall, own) = (Instant::now(), clock(libc::CLOCK_PROCESS_CPUTIME_ID)?);
    std::thread::sleep(Duration::from_millis(100));
    let asleep = clock(libc::CLOCK_PROCESS_CPUTIME_ID)? - own;
    ensure!(
        asleep < patience(Duration::from_millis(50)).as_nanos().cast_signed(),
        "100 ms of sleep cost {asleep} ns of processor time"
    );
    while clock(libc::CLOCK_PROCESS_CPUTIME_ID)? - own < 100_000_000 {
        ensure!(
            wall.elapsed() < patience(Duration::from_secs(10)),
            "processor time does not pass"
        );
    }
    Ok(())
}
