//! What building a template needs from a VM. Workers provide it; tests use fakes.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::File;

use futures_util::future::BoxFuture;
use thaw_vmm::protocol::{Boot, Restore};
use thaw_wire::message::{Execute, Exit, Ready, Renew};

/// Makes VMs.
pub trait Vms: Debug + Send + Sync + 'static {
    /// Boots a VM; done when its agent is ready. Dropping the future ends what it had begun.
    ///
    /// # Errors
    /// It did not come up; the message has the last lines of its console.
    fn boot(
        &self,
        kernel: File,
        initramfs: File,
        boot: Boot,
    ) -> BoxFuture<'_, anyhow::Result<Box<dyn TrialVm>>>;

    /// Restores a VM; done when its agent is ready.
    ///
    /// # Errors
    /// As [`Self::boot`].
    fn restore(
        &self,
        state: File,
        memory: File,
        working_set: Option<File>,
        restore: Restore,
    ) -> BoxFuture<'_, anyhow::Result<Box<dyn TrialVm>>>;
}

/// What a command left.
#[derive(Clone, Debug, Default)]
pub struct Ran {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub exit: Exit,
}

/// A VM that a template is made from, or tried with. Dropping it ends it.
pub trait TrialVm: Debug + Send {
    /// What its agent said when it came up.
    fn ready(&self) -> &Ready;

    /// Starts the runner and imports modules; gives those that the image lacks, with reasons.
    ///
    /// # Errors
    /// The VM died, does not answer or could not.
    fn warm(
        &mut self,
        modules: Vec<String>,
    ) -> BoxFuture<'_, anyhow::Result<BTreeMap<String, String>>>;

    /// Makes the guest hold still.
    ///
    /// # Errors
    /// The VM died, does not answer or could not.
    fn quiesce(&mut self) -> BoxFuture<'_, anyhow::Result<()>>;

    /// Makes the VM an individual; `Ok` only when the agent confirmed all of it.
    ///
    /// # Errors
    /// The VM died, does not answer or could not.
    fn renew(&mut self, renew: Renew) -> BoxFuture<'_, anyhow::Result<()>>;

    /// Runs a command to its end.
    ///
    /// # Errors
    /// The VM died or does not answer.
    fn execute(&mut self, command: Execute) -> BoxFuture<'_, anyhow::Result<Ran>>;

    /// Freezes it into two empty files.
    ///
    /// # Errors
    /// The worker refused.
    fn save(&mut self, state: File, memory: File) -> BoxFuture<'_, anyhow::Result<()>>;

    /// Lists the pages that it wrote since it was restored into an empty file; gives their number.
    ///
    /// # Errors
    /// The worker refused.
    fn touched(&mut self, list: File) -> BoxFuture<'_, anyhow::Result<u64>>;

    /// Ends it and waits until it is gone.
    fn end(self: Box<Self>) -> BoxFuture<'static, ()>;
}
