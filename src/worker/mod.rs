//! `serve`'s end of a worker: one process that runs one VM.
//!
//! ```text
//! Worker ── orders, one at a time ──┐
//! Running ── a stream per command ──┴── Link ── unix socket ── thaw vmm
//! ```
//!
//! Nothing here waits without an end: orders have limits, and when the process ends, however it
//! ends, the socket closes and everybody who waits is told why.

mod link;
mod process;
mod running;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thaw_vmm::protocol::{Boot, Death, Order, Report, Restore, Stats};
use thaw_wire::message::{self, Attach, Execute, Open, Process as Program, Ready, Renew};
use tokio::sync::Mutex;

pub use running::{Event, Feeder, Running, command};

use link::{Link, Reports};
use process::Process;

/// Longest that a restored guest may take to shake hands. It takes milliseconds; a host that
/// swaps or is far overcommitted gets the rest.
pub const RESTORE_LIMIT: Duration = Duration::from_secs(20);

/// Longest that a guest may take from its first instruction to its agent's first word.
pub const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// Longest for orders that the agent answers at once.
const PROMPT_LIMIT: Duration = Duration::from_secs(10);

/// Longest for orders that make the agent or the worker move data.
const BULK_LIMIT: Duration = Duration::from_secs(120);

/// Why a worker did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The process could not be started.
    #[error("cannot start a worker process")]
    Spawn(#[source] std::io::Error),
    /// It ended.
    #[error("the VM ended: {}", describe(.0))]
    Died(Death),
    /// It did not answer in time. The VM should be ended.
    #[error("the worker did not answer to {order} within {limit:?}")]
    Silent {
        /// The order.
        order: &'static str,
        /// The time it had.
        limit: Duration,
    },
    /// It answered that it cannot.
    #[error("the worker refused to {order}: {reason}")]
    Refused {
        /// The order.
        order: &'static str,
        /// Why.
        reason: String,
    },
    /// It answered with something else.
    #[error("the worker answered to {order} with {answer}")]
    Confused {
        /// The order.
        order: &'static str,
        /// The answer.
        answer: String,
    },
    /// The message could not be put into a frame.
    #[error("a message to the worker cannot be written")]
    Message(#[from] serde_json::Error),
    /// A descriptor could not be passed on.
    #[error("a file cannot be handed to the worker")]
    Descriptor(#[source] std::io::Error),
}

/// A death in one line.
pub fn describe(death: &Death) -> String {
    match death.console.trim() {
        "" => death.detail.clone(),
        console => format!("{}; the end of its console: {console}", death.detail),
    }
}

/// How a VM came to run.
#[derive(Clone, Debug)]
pub struct Started {
    /// See [`Report::Running`].
    pub phases_us: std::collections::BTreeMap<String, u64>,
    /// The agent's first word.
    pub ready: Ready,
}

/// What freezing a VM made.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// Bytes of state.
    pub state_bytes: u64,
    /// Apparent size of the memory file, bytes.
    pub memory_bytes: u64,
    /// Pages that hold anything but zeroes.
    pub pages: u64,
    /// How long the guest stood still.
    pub pause: Duration,
}

/// Files of pages that are laid over a VM's memory.
#[derive(Debug)]
pub struct Over<'a> {
    /// Which page lies where: a [`thaw_vmm::snapshot::PageMap`].
    pub map: BorrowedFd<'a>,
    /// The files, in the map's order.
    pub files: Vec<BorrowedFd<'a>>,
}

/// How to start workers.
#[derive(Clone, Debug)]
pub struct Launcher {
    program: PathBuf,
}

impl Launcher {
    /// Workers that are this very program.
    ///
    /// # Errors
    /// The system does not tell where it is.
    pub fn this_program() -> std::io::Result<Self> {
        Ok(Self {
            program: std::env::current_exe()?,
        })
    }

    /// Workers that are another build of thaw.
    pub fn program(program: PathBuf) -> Self {
        Self { program }
    }

    /// Starts a process that waits for its first order.
    ///
    /// # Errors
    /// [`WorkerError::Spawn`].
    pub async fn spawn(&self) -> Result<Worker, WorkerError> {
        let program = self.program.clone();
        let (process, socket) = tokio::task::spawn_blocking(move || Process::start(&program))
            .await
            .map_err(|error| WorkerError::Spawn(std::io::Error::other(error)))?
            .map_err(WorkerError::Spawn)?;
        let (link, reports) = Link::open(socket).map_err(WorkerError::Spawn)?;
        Ok(Worker {
            link,
            reports: Mutex::new(reports),
            process,
        })
    }
}

/// One worker and its VM. Ends with this value; [`Worker::end`] waits for that.
#[derive(Debug)]
pub struct Worker {
    link: Arc<Link>,
    /// Reports on orders. Whoever holds it has the one order that is under way.
    reports: Mutex<Reports>,
    process: Process,
}

impl Worker {
    /// The worker's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Boots a VM and waits for its agent.
    ///
    /// # Errors
    /// See [`WorkerError`]; the worker is of no more use then.
    pub async fn boot(
        &self,
        boot: Boot,
        kernel: impl AsFd,
        initramfs: impl AsFd,
    ) -> Result<Started, WorkerError> {
        let fds = copies(&[kernel.as_fd(), initramfs.as_fd()])?;
        self.start("boot", &Order::Boot(boot), fds, BOOT_LIMIT)
            .await
    }

    /// Restores a VM and waits for its agent.
    ///
    /// # Errors
    /// See [`WorkerError`]; the worker is of no more use then.
    pub async fn restore(
        &self,
        generation: u64,
        tuning: thaw_vmm::protocol::Tuning,
        state: impl AsFd,
        memory: impl AsFd,
        over: Option<Over<'_>>,
        working_set: Option<impl AsFd>,
    ) -> Result<Started, WorkerError> {
        let restore = Restore {
            generation,
            working_set: working_set.is_some(),
            overlays: over.as_ref().map(|over| over.files.len() as u32),
            tuning,
        };
        let mut fds = copies(&[state.as_fd(), memory.as_fd()])?;
        if let Some(over) = over {
            fds.extend(copies(&[over.map])?);
            fds.extend(copies(&over.files)?);
        }
        if let Some(working_set) = working_set {
            fds.extend(copies(&[working_set.as_fd()])?);
        }
        self.start("restore", &Order::Restore(restore), fds, RESTORE_LIMIT)
            .await
    }

    async fn start(
        &self,
        name: &'static str,
        order: &Order,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Started, WorkerError> {
        let mut reports = self.reports.lock().await;
        self.link.order(order, fds)?;
        let phases_us = match reports.next(name, limit).await? {
            Report::Running { phases_us } => phases_us,
            other => return Err(confused(name, &other)),
        };
        match reports.next(name, limit).await? {
            Report::Agent {
                message: message::Report::Ready(ready),
            } => Ok(Started { phases_us, ready }),
            other => Err(confused(name, &other)),
        }
    }

    /// Makes the VM an individual; `Ok` only when the agent confirmed all of it.
    ///
    /// # Errors
    /// See [`WorkerError`]; the VM must not serve anybody then.
    pub async fn renew(&self, renew: Renew) -> Result<(), WorkerError> {
        let ordered = renew.generation;
        match self
            .agent("renew", message::Order::Renew(renew), PROMPT_LIMIT)
            .await?
        {
            message::Report::Renewed { generation, .. } if generation == ordered => Ok(()),
            other => Err(unexpected("renew", &other)),
        }
    }

    /// Starts the runner and imports modules; returns those that the image lacks, with reasons.
    ///
    /// # Errors
    /// See [`WorkerError`].
    pub async fn warm(
        &self,
        modules: Vec<String>,
    ) -> Result<std::collections::BTreeMap<String, String>, WorkerError> {
        match self
            .agent("warm", message::Order::Warm { modules }, BULK_LIMIT)
            .await?
        {
            message::Report::Warmed { missing } => Ok(missing),
            other => Err(unexpected("warm", &other)),
        }
    }

    /// Makes the guest hold still.
    ///
    /// # Errors
    /// See [`WorkerError`].
    pub async fn quiesce(&self) -> Result<(), WorkerError> {
        match self
            .agent("quiesce", message::Order::Quiesce, BULK_LIMIT)
            .await?
        {
            message::Report::Quiet => Ok(()),
            other => Err(unexpected("quiesce", &other)),
        }
    }

    async fn agent(
        &self,
        name: &'static str,
        message: message::Order,
        limit: Duration,
    ) -> Result<message::Report, WorkerError> {
        match self
            .ask(name, &Order::Agent { message }, Vec::new(), limit)
            .await?
        {
            Report::Agent {
                message: message::Report::Failed { reason, .. },
            } => Err(WorkerError::Refused {
                order: name,
                reason,
            }),
            Report::Agent { message } => Ok(message),
            other => Err(confused(name, &other)),
        }
    }

    /// Freezes the VM into two empty files; it goes on running.
    ///
    /// # Errors
    /// See [`WorkerError`].
    pub async fn save(&self, state: impl AsFd, memory: impl AsFd) -> Result<Saved, WorkerError> {
        let fds = copies(&[state.as_fd(), memory.as_fd()])?;
        self.saved("save", &Order::Save, fds).await
    }

    async fn saved(
        &self,
        name: &'static str,
        order: &Order,
        fds: Vec<OwnedFd>,
    ) -> Result<Saved, WorkerError> {
        match self.ask(name, order, fds, BULK_LIMIT).await? {
            Report::Saved {
                state_bytes,
                memory_bytes,
                pages,
                pause_us,
            } => Ok(Saved {
                state_bytes,
                memory_bytes,
                pages,
                pause: Duration::from_micros(pause_us),
            }),
            other => Err(confused(name, &other)),
        }
    }

    /// Freezes the VM as the pages that it wrote since its restore, one after the other, and the list of their
    /// numbers; it goes on running. The files are empty.
    ///
    /// # Errors
    /// See [`WorkerError`].
    pub async fn freeze(
        &self,
        state: impl AsFd,
        pages: impl AsFd,
        list: impl AsFd,
    ) -> Result<Saved, WorkerError> {
        let fds = copies(&[state.as_fd(), pages.as_fd(), list.as_fd()])?;
        self.saved("freeze", &Order::Freeze, fds).await
    }

    /// Lists, in an empty file, the pages that the VM wrote since its restore; returns how many.
    ///
    /// # Errors
    /// See [`WorkerError`].
    pub async fn touched(&self, list: impl AsFd) -> Result<u64, WorkerError> {
        let fds = copies(&[list.as_fd()])?;
        match self
            .ask("touched", &Order::Touched, fds, BULK_LIMIT)
            .await?
        {
            Report::Touched { pages } => Ok(pages),
            other => Err(confused("touched", &other)),
        }
    }

    /// Figures about the VM.
    ///
    /// # Errors
    /// See [`WorkerError`].
    pub async fn stats(&self) -> Result<Stats, WorkerError> {
        match self
            .ask("stats", &Order::Stats, Vec::new(), PROMPT_LIMIT)
            .await?
        {
            Report::Stats(stats) => Ok(stats),
            other => Err(confused("stats", &other)),
        }
    }

    async fn ask(
        &self,
        name: &'static str,
        order: &Order,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Report, WorkerError> {
        let mut reports = self.reports.lock().await;
        // What is left belongs to an order whose asker gave up.
        reports.forget();
        self.link.order(order, fds)?;
        reports.next(name, limit).await
    }

    /// Starts a command. Output is held back in the guest when it is not taken here.
    ///
    /// # Errors
    /// The VM ended, or the command cannot be put into frames.
    pub fn execute(&self, command: Execute) -> Result<Running, WorkerError> {
        Running::start(&self.link, command)
    }

    /// Starts a process beside the commands.
    ///
    /// # Errors
    /// The VM ended, or the order cannot be put into a frame.
    pub fn process(&self, process: Program) -> Result<(Running, Feeder), WorkerError> {
        Running::process(&self.link, &Open::Process(process))
    }

    /// Goes on with a terminal that the renewal kept; one that is not there ends at once.
    ///
    /// # Errors
    /// As [`Self::process`].
    pub fn attach(&self, name: String) -> Result<(Running, Feeder), WorkerError> {
        Running::process(&self.link, &Open::Attach(Attach { name }))
    }

    /// Why the VM ended by itself, once it has.
    pub fn died(&self) -> impl Future<Output = Death> + Send + 'static {
        self.link.died()
    }

    /// Ends the VM at once and waits until its process is reaped.
    pub async fn end(&self) {
        self.process.end().await;
    }
}

/// The agent's answer to another order than the one given.
fn unexpected(order: &'static str, answer: &message::Report) -> WorkerError {
    WorkerError::Confused {
        order,
        answer: format!("{answer:?}"),
    }
}

fn confused(order: &'static str, answer: &Report) -> WorkerError {
    match answer {
        Report::Refused { reason } => WorkerError::Refused {
            order,
            reason: reason.clone(),
        },
        Report::Died(death) => WorkerError::Died(death.clone()),
        other => WorkerError::Confused {
            order,
            answer: format!("{other:?}"),
        },
    }
}

/// Copies of descriptors, so that they live until the socket has taken them.
fn copies(fds: &[BorrowedFd<'_>]) -> Result<Vec<OwnedFd>, WorkerError> {
    fds.iter()
        .map(|fd| fd.try_clone_to_owned())
        .collect::<Result<_, _>>()
        .map_err(WorkerError::Descriptor)
}
