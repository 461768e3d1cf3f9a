//! What makes a restored VM an individual.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use rand::TryRngCore;
use thaw_wire::message::{Execute, Language, Renew};

use super::vm::{RunEvent, Vm};

/// What the agent answers while another command has the interpreter.
const BUSY: i32 = 126;

/// How long after such an answer it is asked again.
const SETTLE_PAUSE: Duration = Duration::from_millis(50);

/// A fresh identity. The seed and the machine id come from the system's generator, every time.
pub(crate) fn identity(
    generation: u64,
    hostname: String,
    env: BTreeMap<String, String>,
    terminals: Vec<String>,
) -> anyhow::Result<Renew> {
    let mut seed = [0; 32];
    let mut machine_id = [0; 16];
    rand::rngs::OsRng.try_fill_bytes(&mut seed)?;
    rand::rngs::OsRng.try_fill_bytes(&mut machine_id)?;
    Ok(Renew {
        generation,
        seed: hex::encode(seed),
        wall_ns: wall_ns(),
        hostname,
        machine_id: hex::encode(machine_id),
        env,
        terminals,
    })
}

/// Nanoseconds since the Unix epoch.
fn wall_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// Takes a VM through what its session will do first, under a throw-away identity. Most of the
/// time to a fresh VM's first result is spent on mapping the pages that the result needs.
pub(crate) async fn rehearse(vm: &dyn Vm, generation: u64, limit: Duration) -> anyhow::Result<()> {
    let run_through = async {
        let renew = identity(generation, "thaw".to_owned(), BTreeMap::new(), Vec::new())?;
        vm.renew(renew).await?;
        let mut run = vm.execute(empty_command(limit)).await?;
        loop {
            match run.next().await {
                RunEvent::Stdout(_) | RunEvent::Stderr(_) | RunEvent::Rich(_) => {}
                RunEvent::Exit(exit) => {
                    anyhow::ensure!(exit.exit_code == 0, "it ended with {}", exit.exit_code);
                    return Ok(());
                }
                RunEvent::Died(reason) => anyhow::bail!("the VM died: {reason}"),
            }
        }
    };
    match tokio::time::timeout(limit, run_through).await {
        Ok(result) => result.map_err(|error| error.context("a restored VM failed its rehearsal")),
        Err(_) => anyhow::bail!("a restored VM's rehearsal took longer than {limit:?}"),
    }
}

/// Lets a VM that was frozen mid-flight come to rest: a command that ran when it was frozen runs on
/// in it, and until it has ended the interpreter takes no other. One that takes longer than the
/// limit is left to itself. Proves on the way that the VM runs commands at all.
pub(crate) async fn settle(vm: &dyn Vm, limit: Duration) -> anyhow::Result<()> {
    let until = tokio::time::Instant::now() + limit;
    loop {
        let mut run = vm.execute(empty_command(limit)).await?;
        let exit = loop {
            match tokio::time::timeout(limit, run.next()).await {
                Ok(RunEvent::Exit(exit)) => break exit,
                Ok(RunEvent::Died(reason)) => anyhow::bail!("the VM died: {reason}"),
                Ok(_) => {}
                Err(_) => anyhow::bail!("it did not run an empty command within {limit:?}"),
            }
        };
        match exit.exit_code {
            0 => return Ok(()),
            BUSY if tokio::time::Instant::now() < until => {
                tokio::time::sleep(SETTLE_PAUSE).await;
            }
            BUSY => return Ok(()),
            other => anyhow::bail!("an empty command ended with {other} in it"),
        }
    }
}

fn empty_command(limit: Duration) -> Execute {
    Execute {
        language: Language::Python,
        code_len: 0,
        code: Some("pass".to_owned()),
        timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        env: BTreeMap::new(),
        context: None,
        live: false,
    }
}
