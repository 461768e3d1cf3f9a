//! Benchmarks of frozen VMs: forks, suspended VMs that wake, and what a snapshot adds to the disk.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::samples::Samples;
use super::server::Server;

/// Copies that one fork makes.
pub const FORKS: usize = 8;

/// What the session has in memory of its own before it is frozen: 20 MiB that nothing shares.
const FILL: &str = "import os; kept = os.urandom(20 << 20)";

/// What was measured.
#[derive(Debug)]
pub struct Forked {
    /// How long the source stood still.
    pub pause: Samples,
    /// From the request to all copies being ready for code.
    pub ready: Samples,
    /// From a command for a suspended VM to its result.
    pub wake: Samples,
    /// What a first snapshot of the VM adds to the disk, MiB.
    pub snapshot_mib: f64,
}

/// Forks, suspends, wakes and snapshots one VM in turn.
///
/// # Errors
/// A request failed, or a copy is not what its source was.
pub fn measure(server: &Server, rounds: usize) -> anyhow::Result<Forked> {
    let mut done = Forked {
        pause: Samples::new("fork: the source stands still"),
        ready: Samples::new("fork: 8 copies ready for code"),
        wake: Samples::new("suspended VM to first result"),
        snapshot_mib: 0.0,
    };
    let made = server.post("/v1/vms", &json!({ "auto_resume": true }))?;
    let session = text(&made, "session_id")?;
    let mut vm = text(&made, "vm_id")?;
    server.python(&session, FILL)?;
    let frozen = server.post(&format!("/v1/vms/{vm}/snapshot"), &json!({}))?;
    let bytes = frozen["size_bytes"]
        .as_f64()
        .context("no size in the answer")?;
    done.snapshot_mib = bytes / f64::from(1 << 20);
    for _ in 0..rounds {
        let start = Instant::now();
        let said = server.post(&format!("/v1/vms/{vm}/fork"), &json!({ "count": FORKS }))?;
        done.ready.add(start.elapsed());
        let pause = said["pause_ms"]
            .as_f64()
            .context("no pause in the answer")?;
        done.pause.add(Duration::from_secs_f64(pause / 1000.0));
        for fork in said["forks"].as_array().context("no forks in the answer")? {
            let copy = text(fork, "session_id")?;
            if server.python(&copy, "len(kept)")? != "20971520\n" {
                bail!("a fork is not what its source was");
            }
            server.kill(&copy)?;
        }
        server.post(&format!("/v1/vms/{vm}/suspend"), &json!({}))?;
        let start = Instant::now();
        let woken = server.python(&session, "len(kept)")?;
        done.wake.add(start.elapsed());
        if woken != "20971520\n" {
            bail!("a woken VM is not what it was");
        }
        let mut reply = server.get(&format!("/v1/vms/{vm}"))?;
        vm = text(&reply.body_mut().read_json()?, "vm_id")?;
    }
    Ok(done)
}

fn text(value: &Value, name: &str) -> anyhow::Result<String> {
    let found = value[name].as_str();
    Ok(found
        .with_context(|| format!("no {name} in the answer"))?
        .to_owned())
}
