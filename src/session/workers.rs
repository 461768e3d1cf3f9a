//! Real VMs: workers restored from templates.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use thaw_vmm::protocol::{Death, Tuning};
use thaw_wire::message::{Execute, Process, Renew, Signal};

use super::vm::{Channel, Frozen, Input, Run, RunEvent, Shape, Vm, VmFigures, VmSource};
use crate::layers::{self, Frost, Layers};
use crate::template::Templates;
use crate::worker::{Event, Feeder, Launcher, Over, Running, Started, Worker};

/// Starts a worker process for each VM and restores a template in it.
#[derive(Debug)]
pub struct Workers {
    launcher: Launcher,
    templates: Templates,
    tuning: Tuning,
}

impl Workers {
    /// Workers that `launcher` starts, with these templates; `tuning` is the one that they were
    /// booted with.
    pub fn new(launcher: Launcher, templates: Templates, tuning: Tuning) -> Self {
        Self {
            launcher,
            templates,
            tuning,
        }
    }
}

impl VmSource for Workers {
    fn prepare(&self, shape: Shape) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move {
            self.templates.get(shape.memory_mib, shape.vcpus).await?;
            Ok(())
        })
    }

    fn start(&self, shape: Shape, generation: u64) -> BoxFuture<'_, anyhow::Result<Arc<dyn Vm>>> {
        Box::pin(async move {
            let template = self.templates.get(shape.memory_mib, shape.vcpus).await?;
            let worker = self.launcher.spawn().await?;
            let started = worker
                .restore(
                    generation,
                    self.tuning,
                    &template.state,
                    &template.memory,
                    None,
                    Some(&template.working_set),
                )
                .await?;
            let origin = Arc::new(Layers::whole(template.base())?);
            ready(worker, &started, generation, origin)
        })
    }

    fn restore<'a>(
        &'a self,
        frozen: &'a Frozen,
        generation: u64,
    ) -> BoxFuture<'a, anyhow::Result<Arc<dyn Vm>>> {
        Box::pin(async move {
            let worker = self.launcher.spawn().await?;
            let shape = frozen.shape;
            // The template's own memory rather than another copy of it, and what its clones write first.
            let template = self.templates.loaded(shape.memory_mib, shape.vcpus);
            let template = template
                .filter(|template| template.manifest.memory.sha256 == frozen.memory.base.sha256);
            let memory = match &template {
                Some(template) => Arc::new(frozen.memory.over(template.base())),
                None => frozen.memory.clone(),
            };
            let map = memory.map_file()?;
            let over = Over {
                map: map.as_fd(),
                files: memory
                    .files
                    .iter()
                    .map(|pages| pages.file.as_fd())
                    .collect(),
            };
            let started = worker
                .restore(
                    generation,
                    self.tuning,
                    &frozen.state,
                    &memory.base.file,
                    Some(over),
                    template.as_ref().map(|template| &template.working_set),
                )
                .await?;
            ready(worker, &started, generation, memory)
        })
    }
}

/// A restored VM, if it is the one that was asked for.
fn ready(
    worker: Worker,
    started: &Started,
    generation: u64,
    origin: Arc<Layers>,
) -> anyhow::Result<Arc<dyn Vm>> {
    let ready = &started.ready;
    anyhow::ensure!(
        ready.generation == generation && ready.warm,
        "a VM restored as generation {generation} says that it is generation {}, {}",
        ready.generation,
        if ready.warm { "warm" } else { "not warm" }
    );
    tracing::debug!(pid = worker.pid(), generation, phases = ?started.phases_us, "restored");
    Ok(Arc::new(WorkerVm {
        worker,
        origin,
        console_logged: Arc::default(),
    }))
}

/// A worker's VM.
#[derive(Debug)]
struct WorkerVm {
    worker: Worker,
    /// The memory that it was restored from.
    origin: Arc<Layers>,
    console_logged: Arc<AtomicBool>,
}

impl Vm for WorkerVm {
    fn renew(&self, renew: Renew) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move { Ok(self.worker.renew(renew).await?) })
    }

    fn execute(&self, command: Execute) -> BoxFuture<'_, anyhow::Result<Box<dyn Run>>> {
        // Handing over does not wait: what the socket does not take is sent behind.
        let running = self.worker.execute(command);
        Box::pin(async move { Ok(Box::new(WorkerRun(running?)) as Box<dyn Run>) })
    }

    fn freeze(&self) -> BoxFuture<'_, anyhow::Result<Frost>> {
        Box::pin(async move {
            let state = layers::memory_file("thaw-state")?;
            let pages = layers::memory_file("thaw-pages")?;
            let list = layers::memory_file("thaw-list")?;
            let saved = self.worker.freeze(&state, &pages, &list).await?;
            tracing::debug!(pid = self.worker.pid(), ?saved, "a VM was frozen");
            let numbers = layers::page_numbers(&list, self.origin.map.pages())?;
            Ok(Frost {
                state: Arc::new(state),
                pages: Arc::new(pages),
                numbers,
                origin: self.origin.clone(),
                pause: saved.pause,
            })
        })
    }

    fn figures(&self) -> BoxFuture<'_, anyhow::Result<VmFigures>> {
        Box::pin(async move {
            let stats = self.worker.stats().await?;
            Ok(VmFigures {
                cpu: Duration::from_micros(stats.cpu_us),
                memory_bytes: stats.private_pages * 4096,
            })
        })
    }

    fn open(&self, process: Process) -> BoxFuture<'_, anyhow::Result<Channel>> {
        let opened = self.worker.process(process);
        Box::pin(async move {
            let (running, feeder) = opened?;
            Ok(Channel {
                output: Box::new(WorkerRun(running)),
                input: Arc::new(WorkerInput(feeder)),
            })
        })
    }

    fn attach(&self, name: String) -> BoxFuture<'_, anyhow::Result<Channel>> {
        let opened = self.worker.attach(name);
        Box::pin(async move {
            let (running, feeder) = opened?;
            Ok(Channel {
                output: Box::new(WorkerRun(running)),
                input: Arc::new(WorkerInput(feeder)),
            })
        })
    }

    fn set_share(&self, vcpus: u32) {
        super::share::give(self.worker.pid(), vcpus);
    }

    fn died(&self) -> BoxFuture<'static, String> {
        let (died, logged) = (self.worker.died(), self.console_logged.clone());
        let pid = self.worker.pid();
        Box::pin(async move {
            let Death {
                cause,
                detail,
                console,
            } = died.await;
            // For the operator: the user is told the detail only. Once, however many wait.
            if !console.is_empty() && !logged.swap(true, Ordering::Relaxed) {
                tracing::warn!(pid, ?cause, detail, console, "a VM's last console lines");
            }
            detail
        })
    }

    fn end(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.worker.end())
    }
}

/// A command in a worker's VM.
#[derive(Debug)]
struct WorkerRun(Running);

impl Run for WorkerRun {
    fn next(&mut self) -> BoxFuture<'_, RunEvent> {
        Box::pin(async {
            match self.0.next().await {
                Event::Stdout(bytes) => RunEvent::Stdout(bytes),
                Event::Stderr(bytes) => RunEvent::Stderr(bytes),
                Event::Rich(bytes) => RunEvent::Rich(bytes),
                Event::Exit(exit) => RunEvent::Exit(exit),
                Event::Died(death) => RunEvent::Died(death.detail),
            }
        })
    }

    fn signal(&mut self, signal: Signal) -> BoxFuture<'_, anyhow::Result<()>> {
        let sent = self.0.signal(signal);
        Box::pin(async move { Ok(sent?) })
    }
}

/// The way to a process in a worker's VM.
#[derive(Debug)]
struct WorkerInput(Feeder);

impl Input for WorkerInput {
    fn write(&self, bytes: bytes::Bytes) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move { Ok(self.0.write(bytes).await?) })
    }

    fn finish(&self) -> anyhow::Result<()> {
        Ok(self.0.finish()?)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(self.0.signal(signal)?)
    }
}
