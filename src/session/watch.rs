//! The seam towards whoever keeps account of VMs: what is told, and what is asked, as they come
//! and go. The sessions know nothing of records or snapshots.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::future::BoxFuture;

use super::types::{Command, Outcome, SessionError, SessionId, SessionSpec, TenantId};
use super::vm::{Frozen, Vm};

/// A session's VM that has just begun to run.
#[derive(Clone, Debug)]
pub struct VmStarted {
    /// Its owner.
    pub tenant: TenantId,
    /// Its session.
    pub session: SessionId,
    /// Its id.
    pub vm_id: String,
    /// What its session was made with.
    pub spec: Arc<SessionSpec>,
    /// The guest's memory as it really is, MiB.
    pub memory_mib: u32,
    /// vCPUs that it really has.
    pub cores: u32,
    /// When its lifetime ends.
    pub expires_at: SystemTime,
    /// The snapshot it was restored from, if it was not a template.
    pub snapshot: Option<String>,
    /// The suspended VM whose life it goes on with.
    pub resumes: Option<String>,
}

/// Why a VM is no more, or not for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEnd {
    /// Its owner ended it.
    Killed,
    /// Its lifetime passed.
    Expired,
    /// It is frozen on disk and can be resumed.
    Suspended,
    /// The server went down.
    Drained,
    /// It died, or had to be ended.
    Failed(String),
}

/// What becomes of a VM whose lifetime has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// It ends.
    End,
    /// It was frozen and can be resumed.
    Suspend,
}

/// A command that is about to run.
#[derive(Clone, Copy, Debug)]
pub struct Next<'a> {
    /// Its session.
    pub session: &'a SessionId,
    /// The VM's id.
    pub vm_id: &'a str,
    /// The VM.
    pub vm: &'a Arc<dyn Vm>,
    /// The command.
    pub command: &'a Command,
}

/// A command that somebody keeps account of.
#[derive(Clone, Debug)]
pub struct Step {
    /// What it is written on.
    pub tape: String,
    /// Its number there.
    pub number: i64,
    /// Where it runs.
    pub vm: Arc<dyn Vm>,
    /// When it began.
    pub began: SystemTime,
}

/// Keeps account of VMs.
pub trait VmWatch: Debug + Send + Sync + 'static {
    /// A VM runs. Says whether it wants [`Self::expiring`] at the end of its lifetime.
    fn started(&self, vm: VmStarted) -> bool;

    /// A VM is no more.
    fn ended(&self, vm_id: &str, how: VmEnd);

    /// A VM's lifetime has passed: the last moment to freeze it. It has terminals of these names.
    fn expiring<'a>(
        &'a self,
        vm_id: &'a str,
        vm: &'a Arc<dyn Vm>,
        terminals: Vec<String>,
    ) -> BoxFuture<'a, Parting>;

    /// What is left of the lifetime of a VM that hibernates; `None`: a resumed VM's lifetime begins anew.
    fn remaining(&self, _: &str) -> Option<std::time::Duration> {
        None
    }

    /// A command is about to run; it does not before this is done. `None`: nobody keeps account of it.
    fn before<'a>(&'a self, _: Next<'a>) -> Option<BoxFuture<'a, Option<Step>>> {
        None
    }

    /// A command has ended that [`Self::before`] gave a step. The next one does not begin before this is done.
    fn after<'a>(&'a self, _: Step, _: &'a Outcome) -> BoxFuture<'a, ()> {
        Box::pin(async {})
    }

    /// Whether this VM was suspended, for sessions that are known from before the server started.
    fn is_suspended(&self, vm_id: &str) -> bool;

    /// Names of the terminals that a suspended VM had, for sessions that are known from before the server started.
    fn terminals(&self, _: &str) -> Vec<String> {
        Vec::new()
    }

    /// A command needs a VM that is suspended: what to restore it from. `None`: it is lost, and a fresh one takes its place.
    ///
    /// # Errors
    /// It is to be resumed by its owner only, or cannot be.
    fn wake<'a>(
        &'a self,
        vm_id: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<Frozen>>, SessionError>>;
}

/// Keeps no account: for tests, and for servers without one.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoWatch;

impl VmWatch for NoWatch {
    fn started(&self, _: VmStarted) -> bool {
        false
    }

    fn ended(&self, _: &str, _: VmEnd) {}

    fn expiring<'a>(
        &'a self,
        _: &'a str,
        _: &'a Arc<dyn Vm>,
        _: Vec<String>,
    ) -> BoxFuture<'a, Parting> {
        Box::pin(async { Parting::End })
    }

    fn is_suspended(&self, _: &str) -> bool {
        false
    }

    fn wake<'a>(
        &'a self,
        vm_id: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<Frozen>>, SessionError>> {
        let asleep = SessionError::Asleep(vm_id.to_owned());
        Box::pin(async { Err(asleep) })
    }
}
