//! What sessions need from a VM and from whatever makes VMs.
//!
//! The session logic knows nothing else about workers, templates or machines, so its tests
//! run on fakes and a new kind of machine needs only another [`VmSource`].

use std::fmt::Debug;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use thaw_wire::message::{Execute, Exit, Process, Renew, Signal};

use crate::layers::{Frost, Layers};

/// The shape of a VM: which template it is restored from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shape {
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u32,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} MiB, {} vCPU", self.memory_mib, self.vcpus)
    }
}

/// A frozen VM, which others can be restored from.
#[derive(Debug)]
pub struct Frozen {
    /// The snapshot's id.
    pub snapshot: String,
    /// What a VM restored from it is like.
    pub shape: Shape,
    /// Everything but memory.
    pub state: Arc<File>,
    /// Guest memory; nobody writes to it any more.
    pub memory: Arc<Layers>,
}

/// Figures about a running VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmFigures {
    /// Processor time that it took, all told.
    pub cpu: Duration,
    /// Bytes of memory that belong to it alone.
    pub memory_bytes: u64,
}

/// Makes VMs.
pub trait VmSource: Debug + Send + Sync + 'static {
    /// Makes sure that there is a template of this shape; may take as long as a build. The
    /// build goes on when the future is dropped.
    ///
    /// # Errors
    /// There is none and none can be built; the message is for the operator.
    fn prepare(&self, shape: Shape) -> BoxFuture<'_, anyhow::Result<()>>;

    /// Restores a VM that gets this generation; done when its agent is ready for
    /// [`Vm::renew`]. Dropping the future ends whatever it had begun.
    ///
    /// # Errors
    /// No VM could be made; the message is for the operator.
    fn start(&self, shape: Shape, generation: u64) -> BoxFuture<'_, anyhow::Result<Arc<dyn Vm>>>;

    /// As [`Self::start`], from a VM that was frozen mid-flight.
    ///
    /// # Errors
    /// As [`Self::start`].
    fn restore<'a>(
        &'a self,
        frozen: &'a Frozen,
        generation: u64,
    ) -> BoxFuture<'a, anyhow::Result<Arc<dyn Vm>>>;
}

/// One VM. Dropping the last handle ends it, too, but on the dropper's time: sessions
/// always use [`Vm::end`], on the reaper.
pub trait Vm: Debug + Send + Sync + 'static {
    /// Makes the VM an individual. `Ok` only when the agent confirmed all of it.
    ///
    /// # Errors
    /// It did not, and the VM must not serve anybody.
    fn renew(&self, renew: Renew) -> BoxFuture<'_, anyhow::Result<()>>;

    /// Starts a command. Dropping the run leaves the command to itself: the caller signals it
    /// and drains it, or ends the VM.
    ///
    /// # Errors
    /// The VM does not take commands any more.
    fn execute(&self, command: Execute) -> BoxFuture<'_, anyhow::Result<Box<dyn Run>>>;

    /// Freezes the VM as what it has written since it was restored; it goes on running.
    ///
    /// # Errors
    /// It could not be brought to a good moment, or the host has no memory for it.
    fn freeze(&self) -> BoxFuture<'_, anyhow::Result<Frost>>;

    /// Figures about the VM.
    ///
    /// # Errors
    /// It does not answer.
    fn figures(&self) -> BoxFuture<'_, anyhow::Result<VmFigures>>;

    /// Gives the VM this share of the processor, in vCPUs' worth.
    fn set_share(&self, vcpus: u32);

    /// Starts a process beside the commands. Dropping the channel leaves the process to itself.
    ///
    /// # Errors
    /// The VM does not take processes any more.
    fn open(&self, process: Process) -> BoxFuture<'_, anyhow::Result<Channel>>;

    /// Goes on with a terminal from before the VM was frozen, which [`Self::renew`] has kept.
    ///
    /// # Errors
    /// As [`Self::open`].
    fn attach(&self, _: String) -> BoxFuture<'_, anyhow::Result<Channel>> {
        Box::pin(async { anyhow::bail!("it keeps no terminals") })
    }

    /// Why the VM ended by itself, once it has; never resolves before. Any number of callers
    /// may wait.
    fn died(&self) -> BoxFuture<'static, String>;

    /// Ends the VM without grace. Resolves when its process is gone and reaped.
    fn end(&self) -> BoxFuture<'_, ()>;
}

/// A command that runs in a VM.
pub trait Run: Debug + Send {
    /// What happens next. Safe to drop and call again: nothing is lost.
    fn next(&mut self) -> BoxFuture<'_, RunEvent>;

    /// Sends a signal to the command.
    ///
    /// # Errors
    /// The VM does not take signals any more.
    fn signal(&mut self, signal: Signal) -> BoxFuture<'_, anyhow::Result<()>>;
}

/// Both ends of a process's stream: what it writes, and the way to it.
#[derive(Debug)]
pub struct Channel {
    /// What it writes, and its end.
    pub output: Box<dyn Run>,
    /// Its input.
    pub input: Arc<dyn Input>,
}

/// The way to a process.
pub trait Input: Debug + Send + Sync {
    /// Hands bytes to the process. Resolves when there is room for more: a process that does not read
    /// holds its writer up.
    ///
    /// # Errors
    /// The process or its VM is gone.
    fn write(&self, bytes: Bytes) -> BoxFuture<'_, anyhow::Result<()>>;

    /// No more input will come.
    ///
    /// # Errors
    /// The process or its VM is gone.
    fn finish(&self) -> anyhow::Result<()>;

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// The VM is gone.
    fn signal(&self, signal: Signal) -> anyhow::Result<()>;
}

/// What a running command does.
#[derive(Clone, Debug, PartialEq)]
pub enum RunEvent {
    /// Bytes on standard output.
    Stdout(Vec<u8>),
    /// Bytes on standard error.
    Stderr(Vec<u8>),
    /// A piece of the rich results.
    Rich(Vec<u8>),
    /// It ended. The last event.
    Exit(Exit),
    /// The VM is gone. The last event.
    Died(String),
}
