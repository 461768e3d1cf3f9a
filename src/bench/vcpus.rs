//! What a second vCPU gains and costs: the same work in a VM with one and in a VM with two, in turn.

use std::time::Duration;

use anyhow::{Context, ensure};

use super::samples::Samples;
use super::server::Server;

/// Two processes that compute; prints the seconds until both are done.
const WORK: &str = "
import subprocess, sys, time
began = time.perf_counter()
both = [subprocess.Popen([sys.executable, '-c', 'n = 0\\nwhile n < 3000000: n += 1']) for _ in range(2)]
assert all(one.wait() == 0 for one in both)
print(time.perf_counter() - began)
";

/// A byte that goes to another process and back, over pipes, 200 times; prints the seconds for one round. Each
/// process stays on a processor of its own, if there are two.
const HAND_OVER: &str = "
import os, time
cpus = sorted(os.sched_getaffinity(0))
here, there = os.pipe(), os.pipe()
other = os.fork()
if other == 0:
    os.sched_setaffinity(0, cpus[-1:])
    while os.read(here[0], 1) == b'x':
        os.write(there[1], b'x')
    os._exit(0)
os.sched_setaffinity(0, cpus[:1])
began = time.perf_counter()
for _ in range(200):
    os.write(here[1], b'x')
    os.read(there[0], 1)
took = time.perf_counter() - began
os.write(here[1], b'.')
os.waitpid(other, 0)
os.sched_setaffinity(0, cpus)
for end in (*here, *there):
    os.close(end)
print(took / 200)
";

/// One job on one vCPU and on two.
#[derive(Debug)]
pub struct Pair {
    /// On one.
    pub one: Samples,
    /// On two.
    pub two: Samples,
}

/// Both jobs: work that is done by two processes, and a byte that goes back and forth between two.
///
/// # Errors
/// This host has but one processor, or a request failed.
pub fn measure(server: &Server, runs: usize) -> anyhow::Result<[Pair; 2]> {
    let processors = std::thread::available_parallelism()
        .context("the host does not say how many processors it has")?;
    ensure!(
        processors.get() > 1,
        "this host has one processor: two vCPUs cannot run at once"
    );
    let (one, two) = (server.session_with(1)?, server.session_with(2)?);
    let jobs = [
        (WORK, "two processes compute"),
        (HAND_OVER, "a byte to another process and back"),
    ];
    let mut pairs = jobs.map(|(_, name)| Pair {
        one: Samples::new(format!("{name}, 1 vCPU")),
        two: Samples::new(format!("{name}, 2 vCPUs")),
    });
    for _ in 0..runs {
        for ((code, _), pair) in jobs.iter().zip(&mut pairs) {
            pair.one.add(seconds(server, &one, code)?);
            pair.two.add(seconds(server, &two, code)?);
        }
    }
    server.kill(&one)?;
    server.kill(&two)?;
    Ok(pairs)
}

fn seconds(server: &Server, session: &str, code: &str) -> anyhow::Result<Duration> {
    let said = server.python(session, code)?;
    let seconds: f64 = said.trim().parse().context("the guest printed no number")?;
    Ok(Duration::try_from_secs_f64(seconds)?)
}
