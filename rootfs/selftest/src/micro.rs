//! Small measurements of what a guest pays for: the median of several rounds, in nanoseconds.

use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Instant;

use crate::check::{Ended, Outcome, fork, pipe, wait};

/// Rounds per figure: the median of these is steady on a busy machine.
const ROUNDS: usize = 7;

/// A name, how often one round does it, and a round.
type Figure = (&'static str, u64, fn(u64) -> Outcome);

/// Prints every figure; one JSON object a line if asked for.
pub fn main(json: bool) -> ExitCode {
    let figures: [Figure; 4] = [
        ("getppid", 100_000, getppid),
        ("page_touch", 4096, page_touch),
        ("pipe_ping_pong", 2000, pipe_ping_pong),
        ("fork_exec_wait", 40, fork_exec_wait),
    ];
    for (name, count, run) in figures {
        match median(count, run) {
            Ok(nanos) if json => println!("{{\"name\":\"{name}\",\"n\":{count},\"ns\":{nanos}}}"),
            Ok(nanos) => println!("{name:<16} {:>10.2} us", nanos as f64 / 1000.0),
            Err(why) => {
                eprintln!("{name}: {why}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// Nanoseconds for one of `count` operations: the median round.
fn median(count: u64, run: fn(u64) -> Outcome) -> Result<u64, String> {
    let mut rounds = [0; ROUNDS];
    for round in &mut rounds {
        let start = Instant::now();
        run(count)?;
        *round = start.elapsed().as_nanos() as u64 / count;
    }
    rounds.sort_unstable();
    Ok(rounds[ROUNDS / 2])
}

fn getppid(count: u64) -> Outcome {
    for _ in 0..count {
        // SAFETY: touches no memory.
        unsafe { libc::syscall(libc::SYS_getppid) };
    }
    Ok(())
}

fn page_touch(count: u64) -> Outcome {
    let bytes = count as usize * 4096;
    // SAFETY: a mapping of this function's own: written within its size, then unmapped.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return Err("mmap failed".to_owned());
        }
        libc::madvise(at, bytes, libc::MADV_NOHUGEPAGE);
        for page in 0..count as usize {
            at.cast::<u8>().add(page * 4096).write_volatile(1);
        }
        libc::munmap(at, bytes);
    }
    Ok(())
}

/// Moves one byte from one descriptor's end to the other's.
fn relay(from: i32, to: i32) -> bool {
    let mut byte = 0u8;
    // SAFETY: one byte in a valid place.
    unsafe {
        libc::read(from, (&raw mut byte).cast(), 1) == 1
            && libc::write(to, (&raw const byte).cast(), 1) == 1
    }
}

fn pipe_ping_pong(count: u64) -> Outcome {
    let (there, back) = (pipe()?, pipe()?);
    let child =
        fork(|| i32::from(!(0..count).all(|_| relay(there.0.as_raw_fd(), back.1.as_raw_fd()))))?;
    // SAFETY: writes the byte that then goes round.
    unsafe { libc::write(there.1.as_raw_fd(), b"x".as_ptr().cast(), 1) };
    let sent = (1..count).all(|_| relay(back.0.as_raw_fd(), there.1.as_raw_fd()));
    if !sent || wait(child)? != Ended::Exited(0) {
        return Err("the pipe broke".to_owned());
    }
    Ok(())
}

fn fork_exec_wait(count: u64) -> Outcome {
    for _ in 0..count {
        let child = fork(|| {
            let error = Command::new("/proc/self/exe").arg("nothing").exec();
            eprintln!("exec: {error}");
            1
        })?;
        if wait(child)? != Ended::Exited(0) {
            return Err("the program failed".to_owned());
        }
    }
    Ok(())
}
