//! Templates' VMs are workers.

use std::collections::BTreeMap;
use std::fs::File;

use anyhow::{Context, bail};
use futures_util::future::BoxFuture;
use thaw_vmm::protocol::{Boot, Restore};
use thaw_wire::message::{Execute, Ready, Renew};

use super::vm::{Ran, TrialVm, Vms};
use crate::worker::{Event, Launcher, Worker, describe};

/// Most bytes of a trial's output that are kept; trials write a few.
const MAX_OUTPUT: usize = 64 << 10;

/// Makes a worker for each VM.
#[derive(Debug)]
pub struct Workers(Launcher);

impl Workers {
    /// Workers that are this very program.
    ///
    /// # Errors
    /// The system does not tell where it is.
    pub fn this_program() -> anyhow::Result<Self> {
        let launcher =
            Launcher::this_program().context("cannot tell where thaw's own executable is")?;
        Ok(Self(launcher))
    }

    /// Workers that `launcher` starts.
    pub fn from_launcher(launcher: Launcher) -> Self {
        Self(launcher)
    }
}

impl Vms for Workers {
    fn boot(
        &self,
        kernel: File,
        initramfs: File,
        boot: Boot,
    ) -> BoxFuture<'_, anyhow::Result<Box<dyn TrialVm>>> {
        Box::pin(async move {
            let worker = self.0.spawn().await?;
            let ready = worker.boot(boot, kernel, initramfs).await?.ready;
            Ok(Box::new(Trial { worker, ready }) as Box<dyn TrialVm>)
        })
    }

    fn restore(
        &self,
        state: File,
        memory: File,
        working_set: Option<File>,
        restore: Restore,
    ) -> BoxFuture<'_, anyhow::Result<Box<dyn TrialVm>>> {
        Box::pin(async move {
            let worker = self.0.spawn().await?;
            let started = worker
                .restore(
                    restore.generation,
                    restore.tuning,
                    state,
                    memory,
                    None,
                    working_set,
                )
                .await?;
            Ok(Box::new(Trial {
                worker,
                ready: started.ready,
            }) as Box<dyn TrialVm>)
        })
    }
}

#[derive(Debug)]
struct Trial {
    worker: Worker,
    ready: Ready,
}

impl TrialVm for Trial {
    fn ready(&self) -> &Ready {
        &self.ready
    }

    fn warm(
        &mut self,
        modules: Vec<String>,
    ) -> BoxFuture<'_, anyhow::Result<BTreeMap<String, String>>> {
        Box::pin(async move { Ok(self.worker.warm(modules).await?) })
    }

    fn quiesce(&mut self) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move { Ok(self.worker.quiesce().await?) })
    }

    fn renew(&mut self, renew: Renew) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move { Ok(self.worker.renew(renew).await?) })
    }

    fn execute(&mut self, command: Execute) -> BoxFuture<'_, anyhow::Result<Ran>> {
        Box::pin(async move {
            let mut running = self.worker.execute(command)?;
            let mut ran = Ran::default();
            loop {
                match running.next().await {
                    Event::Stdout(bytes) => keep(&mut ran.stdout, &bytes),
                    Event::Stderr(bytes) => keep(&mut ran.stderr, &bytes),
                    Event::Rich(_) => {}
                    Event::Exit(exit) => {
                        ran.exit = exit;
                        return Ok(ran);
                    }
                    Event::Died(death) => bail!("the VM ended: {}", describe(&death)),
                }
            }
        })
    }

    fn save(&mut self, state: File, memory: File) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move {
            self.worker.save(state, memory).await?;
            Ok(())
        })
    }

    fn touched(&mut self, list: File) -> BoxFuture<'_, anyhow::Result<u64>> {
        Box::pin(async move { Ok(self.worker.touched(list).await?) })
    }

    fn end(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move { self.worker.end().await })
    }
}

fn keep(buffer: &mut Vec<u8>, bytes: &[u8]) {
    let room = MAX_OUTPUT.saturating_sub(buffer.len()).min(bytes.len());
    buffer.extend_from_slice(&bytes[..room]);
}
