//! Everything at once for a while, each result verified.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::check::{self, Ended, Outcome, fork, wait};
use crate::{debugger, ensure, faults, fpu, signals, threads};

/// What the workers share: operations done, and how many were wrong.
struct Tally {
    operations: AtomicU64,
    errors: AtomicU64,
}

/// Time that workers get to finish an operation after the end: a few checks' worth.
const GRACE: Duration = Duration::from_secs(120);

/// Runs every kind of load in its own process for `seconds`.
pub fn main(seconds: u64) -> ExitCode {
    match stress(Duration::from_secs(seconds)) {
        Ok((operations, errors)) => {
            println!("stress: {operations} operations, {errors} errors");
            if errors == 0 && operations > 0 {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(why) => {
            println!("stress: {why}");
            ExitCode::FAILURE
        }
    }
}

/// A kind of load: its name, and one operation, which its turn's number varies.
type Kind = (&'static str, fn(u64) -> Outcome);

/// A page of counters that forked workers share.
fn shared_tally() -> Result<&'static Tally, String> {
    // SAFETY: a new zeroed page, never unmapped, larger and more aligned than a Tally, whose
    // all-zero bytes are valid.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let at = libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return Err("mmap failed".to_owned());
        }
        Ok(&*at.cast::<Tally>())
    }
}

fn stress(time: Duration) -> Result<(u64, u64), String> {
    let kinds: [Kind; 7] = [
        ("compute", compute),
        ("memory", memory),
        ("fork-exec", fork_exec),
        ("signals", some_checks),
        ("files", files),
        ("unix-sockets", unix_sockets),
        ("tcp-sockets", tcp_sockets),
    ];
    let (tally, end) = (shared_tally()?, Instant::now() + time);
    let mut workers = Vec::new();
    for (name, run) in kinds {
        let worker = fork(|| {
            // SAFETY: leads its own group, so that its children end with it.
            unsafe { libc::setpgid(0, 0) };
            let mut turn = 0;
            while Instant::now() < end {
                if let Err(why) = run(turn) {
                    println!("stress {name} turn {turn}: {why}");
                    tally.errors.fetch_add(1, SeqCst);
                }
                tally.operations.fetch_add(1, SeqCst);
                turn += 1;
            }
            0
        })?;
        workers.push((name, worker));
    }
    for (name, worker) in workers {
        let ended = check::wait_until(worker, end + GRACE)?;
        if ended != Some(Ended::Exited(0)) {
            println!("stress {name}: ended {ended:?}");
            tally.errors.fetch_add(1, SeqCst);
        }
    }
    Ok((tally.operations.load(SeqCst), tally.errors.load(SeqCst)))
}

/// A pseudo-random block that `seed` determines.
fn block(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut block = Vec::with_capacity(bytes + 8);
    while block.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        block.extend_from_slice(&state.to_le_bytes());
    }
    block.truncate(bytes);
    block
}

/// Integers and floats by two ways that must agree.
fn compute(turn: u64) -> Outcome {
    let n = 100_000 + turn % 1000;
    let sum = (1..=n).fold(0u64, |sum, value| std::hint::black_box(sum + value));
    ensure!(sum == n * (n + 1) / 2, "sum to {n} is {sum}");
    let halves = (0..n).fold(0f64, |sum, _| std::hint::black_box(sum + 0.5));
    ensure!(halves == n as f64 / 2.0, "{n} halves are {halves}");
    Ok(())
}

/// Fresh memory is zero, and keeps what is written.
fn memory(turn: u64) -> Outcome {
    let fresh = vec![0u8; 1 << 20];
    ensure!(
        fresh.iter().all(|byte| *byte == 0),
        "fresh memory is not zero"
    );
    drop(fresh);
    let written = block(turn, 1 << 20);
    let copy = written.clone();
    std::thread::yield_now();
    ensure!(
        written == copy && copy == block(turn, 1 << 20),
        "a block changed"
    );
    Ok(())
}

/// A copy-on-write child and a fresh program.
fn fork_exec(turn: u64) -> Outcome {
    let given = block(turn, 64 << 10);
    let mut own = given.clone();
    let child = fork(|| {
        let right = own == given;
        own.fill(7);
        i32::from(!right || own.iter().any(|byte| *byte != 7))
    })?;
    let right = own == given;
    ensure!(
        wait(child)? == Ended::Exited(0) && right,
        "copy-on-write mixed two processes' memory"
    );
    let done = Command::new("/proc/self/exe")
        .args(["echo", &format!("turn-{turn}")])
        .output()
        .map_err(|error| format!("exec: {error}"))?;
    ensure!(
        done.stdout == format!("turn-{turn}\n").as_bytes(),
        "echo: {done:?}"
    );
    Ok(())
}

/// The short checks of other rooms, one after the other.
fn some_checks(turn: u64) -> Outcome {
    let rooms = [
        faults::CHECKS,
        signals::CHECKS,
        debugger::CHECKS,
        threads::CHECKS,
        fpu::CHECKS,
    ];
    let all: Vec<_> = rooms.into_iter().flatten().collect();
    let check = all[turn as usize % all.len()];
    // Under this load the limits are for hangs only.
    let patient = check::Check {
        limit: check.limit.max(60) * 2,
        ..*check
    };
    check::run(&patient).map_err(|why| format!("{}: {why}", check.name))
}

fn files(turn: u64) -> Outcome {
    let told = |error: std::io::Error| format!("file: {error}");
    let directory = std::env::temp_dir().join(format!("selftest-{}", std::process::id()));
    fs::create_dir_all(&directory).map_err(told)?;
    let (first, second) = (directory.join("first"), directory.join("second"));
    let content = block(turn, 1 + (turn as usize * 7919) % (256 << 10));
    fs::write(&first, &content).map_err(told)?;
    fs::rename(&first, &second).map_err(told)?;
    let found = fs::read(&second).map_err(told)?;
    ensure!(found == content, "{} bytes differ", content.len());
    ensure!(!first.exists(), "the old name is still there");
    fs::remove_dir_all(&directory).map_err(told)
}

/// Sends a block through a stream to a thread that sends it back.
fn echo(mut near: impl Read + Write, mut far: impl Read + Write + Send, turn: u64) -> Outcome {
    let told = |error: std::io::Error| format!("socket: {error}");
    let content = block(turn, 16 << 10);
    let bytes = content.len();
    std::thread::scope(|scope| {
        let other = scope.spawn(move || {
            let mut seen = vec![0; bytes];
            far.read_exact(&mut seen)?;
            far.write_all(&seen)
        });
        near.write_all(&content).map_err(told)?;
        let mut back = vec![0; bytes];
        near.read_exact(&mut back).map_err(told)?;
        other
            .join()
            .map_err(|_| "a thread panicked")?
            .map_err(told)?;
        ensure!(back == content, "{bytes} bytes came back changed");
        Ok(())
    })
}

fn unix_sockets(turn: u64) -> Outcome {
    let (near, far) = UnixStream::pair().map_err(|error| format!("socketpair: {error}"))?;
    echo(near, far, turn)
}

fn tcp_sockets(turn: u64) -> Outcome {
    let told = |error: std::io::Error| format!("TCP: {error}");
    let listener = TcpListener::bind("127.0.0.1:0").map_err(told)?;
    let near = TcpStream::connect(listener.local_addr().map_err(told)?).map_err(told)?;
    let (far, _) = listener.accept().map_err(told)?;
    echo(near, far, turn)
}
