//! The benchmarks.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::samples::Samples;
use super::server::Server;

/// The Python that most cases run.
const TRIVIAL: &str = "print(1)";

/// Times a fresh interpreter, from spawn to exit, and prints seconds. Runs the same on the
/// bare host and in a guest, so that only the place differs.
const FRESH_PYTHON: &str = "\
import os, time
argv = ['/usr/bin/python3', '-c', 'print(1)']
out = os.open('/dev/null', os.O_WRONLY)
start = time.perf_counter()
pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, out, 1)])
_, status = os.waitpid(pid, 0)
took = time.perf_counter() - start
os.close(out)
assert status == 0, status
print(took)
";

fn check(output: &str) -> anyhow::Result<()> {
    if output != "1\n" {
        bail!("`{TRIVIAL}` printed {output:?}");
    }
    Ok(())
}

/// `POST /execute` of `print(1)` in one session over one kept-alive connection.
///
/// # Errors
/// A request failed or gave a wrong answer.
pub fn warm(server: &Server, runs: usize) -> anyhow::Result<Samples> {
    let session = server.session()?;
    let mut samples = Samples::new("warm execute of print(1)");
    for _ in 0..50 {
        check(&server.python(&session, TRIVIAL)?)?;
    }
    for _ in 0..runs {
        let start = Instant::now();
        let output = server.python(&session, TRIVIAL)?;
        samples.add(start.elapsed());
        check(&output)?;
    }
    server.kill(&session)?;
    Ok(samples)
}

/// A new session's first result, with VMs waiting in the pool: making the session, taking a
/// VM, renewing its identity, running `print(1)`.
///
/// # Errors
/// As [`warm`], and a pool that does not fill.
pub fn cold(server: &Server, runs: usize) -> anyhow::Result<Samples> {
    let mut samples = Samples::new("new session to first Python result, pooled");
    for _ in 0..runs {
        server.wait_for_pool(1.0)?;
        // Let the refill that the last round set off come to rest: it is not what is measured.
        std::thread::sleep(Duration::from_millis(100));
        let start = Instant::now();
        let session = server.session()?;
        let output = server.python(&session, TRIVIAL)?;
        samples.add(start.elapsed());
        check(&output)?;
        server.kill(&session)?;
    }
    Ok(samples)
}

/// Create, execute, destroy, from `clients` clients at once. One sample is one cycle; the rate
/// over all clients is the second value, in cycles a second.
///
/// # Errors
/// As [`warm`].
pub fn churn(server: &Server, cycles: usize, clients: usize) -> anyhow::Result<(Samples, f64)> {
    let start = Instant::now();
    let times = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..clients)
            .map(|_| {
                scope.spawn(move || {
                    let mut times = Vec::new();
                    for _ in 0..cycles / clients {
                        let start = Instant::now();
                        let session = server.session()?;
                        check(&server.python(&session, TRIVIAL)?)?;
                        server.kill(&session)?;
                        times.push(start.elapsed());
                    }
                    anyhow::Ok(times)
                })
            })
            .collect();
        let mut all = Vec::new();
        for worker in workers {
            all.extend(
                worker
                    .join()
                    .map_err(|_| anyhow::anyhow!("a client panicked"))??,
            );
        }
        anyhow::Ok(all)
    })?;
    let rate = times.len() as f64 / start.elapsed().as_secs_f64();
    let mut samples = Samples::new("create, execute, destroy: one cycle");
    for time in times {
        samples.add(time);
    }
    Ok((samples, rate))
}

/// Memory that belongs to one idle session alone, worker included, in KiB: one value for each
/// of `sessions` sessions that each ran `print(1)`.
///
/// # Errors
/// As [`warm`], and a `/proc` that does not say.
pub fn memory(server: &Server, sessions: usize) -> anyhow::Result<Vec<u64>> {
    let mut ids = Vec::new();
    for _ in 0..sessions {
        let session = server.session()?;
        check(&server.python(&session, TRIVIAL)?)?;
        ids.push(session);
    }
    std::thread::sleep(Duration::from_secs(2));
    let mut sizes = Vec::new();
    for pid in server.workers()? {
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
            .with_context(|| format!("cannot read the memory map of worker {pid}"))?;
        sizes.push(
            rollup
                .lines()
                .filter(|line| {
                    line.starts_with("Private_Clean:") || line.starts_with("Private_Dirty:")
                })
                .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
                .sum(),
        );
    }
    for session in ids {
        server.kill(&session)?;
    }
    sizes.sort_unstable();
    Ok(sizes)
}

/// A fresh `python3 -c 'print(1)'` in the guest and on the bare host, in turn.
///
/// # Errors
/// As [`warm`], and a host without `/usr/bin/python3`.
pub fn fresh_python(server: &Server, runs: usize) -> anyhow::Result<(Samples, Samples)> {
    let session = server.session()?;
    let mut guest = Samples::new("fresh python3 in the guest");
    let mut host = Samples::new("fresh python3 on the bare host");
    let seconds = |text: &str| {
        text.trim()
            .parse::<f64>()
            .context("not a time")
            .map(Duration::from_secs_f64)
    };
    for round in 0..=runs {
        let inside = seconds(&server.python(&session, FRESH_PYTHON)?)?;
        let output = std::process::Command::new("/usr/bin/python3")
            .args(["-c", FRESH_PYTHON])
            .output()
            .context("the bare host has no /usr/bin/python3; install python3")?;
        let outside = seconds(&String::from_utf8(output.stdout)?)?;
        // The first round warms both.
        if round > 0 {
            guest.add(inside);
            host.add(outside);
        }
    }
    server.kill(&session)?;
    Ok((guest, host))
}
