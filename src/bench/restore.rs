//! `thaw bench restore`: workers started and VMs restored one after another, with no server and
//! no pool between.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use thaw_vmm::protocol::Tuning;

use super::samples::Samples;
use crate::template::{Template, Templates};
use crate::worker::{Launcher, Worker};

/// The guest's memory: what a session gets when the client does not say.
const MEMORY_MIB: u32 = 512;

/// Pause between two rounds, so that tearing one VM down does not slow the next one's start.
const REST: Duration = Duration::from_millis(30);

/// Restores `runs` VMs. The result: from the worker process's first instruction to the guest's
/// first (as the worker counts it), and from before the fork to the agent's first word (as
/// `serve` waits for it).
///
/// # Errors
/// There is no image, or a VM cannot be restored.
pub fn measure(data_dir: &Path, image: &str, runs: usize) -> anyhow::Result<Vec<Samples>> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let templates = Templates::open(data_dir, image)?;
        let template = templates.get(MEMORY_MIB, 1).await?;
        let launcher = Launcher::this_program()?;
        let mut running = Samples::new("restore, process start to guest running");
        let mut ready = Samples::new("restore, before the fork to agent ready");
        let first = first_generation()?;
        for run in 0..=runs as u64 {
            let restored = once(&launcher, &template, first + run).await?;
            // The first round brings the program into the page cache.
            if run > 0 {
                running.add(restored.running);
                ready.add(restored.ready);
            }
            restored.worker.end().await;
            tokio::time::sleep(REST).await;
        }
        Ok(vec![running, ready])
    })
}

/// One restored VM, and when it was how far, from before the fork.
pub(super) struct Restored {
    pub worker: Worker,
    /// The worker was there to take its order.
    pub ordered: Duration,
    /// From the process's start, as the worker counts it: the guest ran.
    pub running: Duration,
    /// The agent had said its first word.
    pub ready: Duration,
}

/// Starts a worker and restores a template in it.
pub(super) async fn once(
    launcher: &Launcher,
    template: &Template,
    generation: u64,
) -> anyhow::Result<Restored> {
    let start = Instant::now();
    let worker = launcher.spawn().await?;
    let ordered = start.elapsed();
    let started = worker
        .restore(
            generation,
            Tuning::default(),
            &template.state,
            &template.memory,
            None,
            Some(&template.working_set),
        )
        .await?;
    let ready = start.elapsed();
    let total = started
        .phases_us
        .get("total")
        .context("the worker did not say how long its start took")?;
    Ok(Restored {
        worker,
        ordered,
        running: Duration::from_micros(*total),
        ready,
    })
}

/// Larger than any generation that a server on this host has used: they count from the clock, too.
pub(super) fn first_generation() -> anyhow::Result<u64> {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)?
        .as_nanos();
    u64::try_from(now).context("the clock is beyond the year 2554")
}
