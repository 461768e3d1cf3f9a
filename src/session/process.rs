//! Processes beside a session's commands: terminals, and work on files.
//!
//! They need the session's VM but not its turn: a file can be fetched while a command runs. Only when
//! there is no VM yet does starting one take a place in the line, as a command would.

use std::sync::Arc;

use bytes::Bytes;
use thaw_wire::message::{Exit, Process, Signal};
use tokio::sync::{OwnedSemaphorePermit, TryAcquireError};

use super::core::Core;
use super::live::{End, Live};
use super::session::{Attendance, Session};
use super::start::NoVm;
use super::types::{PlanLimits, SessionError, SessionId, TenantId};
use super::vm::{Channel, Input, Run, RunEvent};

/// Processes that a session's VM runs for its owner at once; its agent takes no more either.
pub(crate) const MOST_PROCESSES: usize = 32;

/// What a process does.
#[derive(Clone, Debug, PartialEq)]
pub enum ProcessEvent {
    /// Bytes on standard output, or on the terminal.
    Stdout(Vec<u8>),
    /// Bytes on standard error.
    Stderr(Vec<u8>),
    /// It ended. The last event.
    Exit(Exit),
    /// Its VM is gone: what its owner is told. The last event.
    Gone(String),
    /// It is a terminal, and its VM is suspended; [`ProcessHandle::revive`] goes on with it. The last event.
    Asleep,
}

/// A process in a session's VM. Dropping it before its end kills the process.
#[derive(Debug)]
pub struct ProcessHandle {
    output: Box<dyn Run>,
    input: Arc<dyn Input>,
    session: Arc<Session>,
    live: Arc<Live>,
    ended: bool,
    /// What a terminal is known by in the guest.
    name: Option<String>,
    /// Work that its owner waits for. A terminal may be left alone.
    _attended: Option<Attendance>,
    _place: OwnedSemaphorePermit,
}

impl ProcessHandle {
    /// What happens next. Safe to drop and call again: nothing is lost. After the last event, the
    /// last event again.
    pub async fn next(&mut self) -> ProcessEvent {
        let live = self.live.clone();
        let event = tokio::select! {
            biased;
            event = self.output.next() => event,
            how = live.ended() => RunEvent::Died(how.note()),
        };
        match event {
            RunEvent::Stdout(bytes) => ProcessEvent::Stdout(bytes),
            RunEvent::Stderr(bytes) => ProcessEvent::Stderr(bytes),
            // No process of ours sends any.
            RunEvent::Rich(_) => ProcessEvent::Stdout(Vec::new()),
            RunEvent::Exit(exit) => {
                self.ended = true;
                ProcessEvent::Exit(exit)
            }
            RunEvent::Died(reason) => {
                self.ended = true;
                let how = self.live.how_ended();
                if how == Some(End::Suspended) && self.name.is_some() {
                    return ProcessEvent::Asleep;
                }
                ProcessEvent::Gone(how.map_or(reason, |how: End| how.note()))
            }
        }
    }

    /// Goes on with a terminal whose VM was suspended, when somebody has woken that. `None`: nobody will any more.
    pub async fn revive(mut self) -> Option<Self> {
        let name = self.name.take()?;
        let revived = Self::go_on(&self.session, &self.live.vm_id, &name).await;
        if revived.is_none() {
            self.session.drop_terminal(&name);
        }
        revived
    }

    pub(crate) async fn go_on(session: &Arc<Session>, suspended: &str, name: &str) -> Option<Self> {
        let live = session.successor(suspended).await?;
        let place = live.processes.clone().try_acquire_owned().ok()?;
        let Channel { output, input } = live.vm.attach(name.to_owned()).await.ok()?;
        Some(Self {
            output,
            input,
            session: session.clone(),
            live,
            ended: false,
            name: Some(name.to_owned()),
            _attended: None,
            _place: place,
        })
    }

    /// Notes that somebody looks at it: its VM is not idle until that is dropped.
    pub fn attender(&self) -> Attender {
        Attender(self.session.clone())
    }

    /// The way to it, for others than the one who reads.
    pub fn input(&self) -> ProcessInput {
        ProcessInput(self.input.clone())
    }
}

/// A terminal of a VM that was suspended by an earlier server.
#[derive(Debug)]
pub struct Sleeper {
    /// Its [`Process::name`].
    pub name: String,
    pub(crate) session: Arc<Session>,
    pub(crate) suspended: String,
}

impl Sleeper {
    /// Whose it is, and of which session.
    pub fn owner(&self) -> (TenantId, SessionId) {
        (self.session.tenant.clone(), self.session.id.clone())
    }

    /// Notes that somebody looks at it.
    pub fn attender(&self) -> Attender {
        Attender(self.session.clone())
    }

    /// As [`ProcessHandle::revive`].
    pub async fn revive(self) -> Option<ProcessHandle> {
        let revived = ProcessHandle::go_on(&self.session, &self.suspended, &self.name).await;
        if revived.is_none() {
            self.session.drop_terminal(&self.name);
        }
        revived
    }
}

/// The way to say that somebody looks at a terminal. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Attender(Arc<Session>);

impl Attender {
    /// Somebody looks, until this is dropped.
    pub fn attend(&self) -> Attendance {
        self.0.attend()
    }
}

impl Drop for ProcessHandle {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            self.session.drop_terminal(name);
        }
        if !self.ended
            && let Err(error) = self.input.signal(Signal::Kill)
        {
            tracing::debug!("a process that nobody wants is gone already: {error:#}");
        }
    }
}

/// The way to a process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ProcessInput(Arc<dyn Input>);

impl ProcessInput {
    /// Hands it bytes; waits while it does not take them.
    ///
    /// # Errors
    /// It or its VM is gone.
    pub async fn write(&self, bytes: Bytes) -> anyhow::Result<()> {
        self.0.write(bytes).await
    }

    /// No more input will come.
    ///
    /// # Errors
    /// Its VM is gone.
    pub fn finish(&self) -> anyhow::Result<()> {
        self.0.finish()
    }

    /// Signals it.
    ///
    /// # Errors
    /// Its VM is gone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.0.signal(signal)
    }
}

impl Core {
    /// Starts a process in the session's VM, which is started if there is none.
    pub(crate) async fn open(
        self: &Arc<Self>,
        session: &Arc<Session>,
        limits: PlanLimits,
        mut process: Process,
    ) -> Result<ProcessHandle, SessionError> {
        if self.is_draining() {
            return Err(SessionError::ShuttingDown);
        }
        let kills = session.touch();
        let live = match session.live(&self.reaper) {
            Some(live) => live,
            None => self.begin_vm(session, limits, kills).await?,
        };
        let place = match live.processes.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(TryAcquireError::NoPermits | TryAcquireError::Closed) => {
                return Err(SessionError::TooManyProcesses {
                    limit: MOST_PROCESSES,
                });
            }
        };
        // Only a terminal can be gone on with.
        let name = process.terminal.and(process.name.take());
        let attended = process.terminal.is_none().then(|| session.attend());
        process.name.clone_from(&name);
        let opened = live.vm.open(process).await;
        let Channel { output, input } = opened.map_err(|error| {
            tracing::debug!("a VM took no process: {error:#}");
            SessionError::NoVm(session.id.clone())
        })?;
        if let Some(name) = &name {
            session.keep_terminal(name);
        }
        Ok(ProcessHandle {
            output,
            input,
            session: session.clone(),
            live,
            ended: false,
            name,
            _attended: attended,
            _place: place,
        })
    }

    /// Wakes the session's VM if that is suspended and may be woken.
    pub(crate) async fn wake(
        self: &Arc<Self>,
        session: &Arc<Session>,
        limits: PlanLimits,
    ) -> Result<(), SessionError> {
        if session.suspended().is_none() || self.is_draining() {
            return Ok(());
        }
        let kills = session.touch();
        self.begin_vm(session, limits, kills).await?;
        Ok(())
    }

    async fn begin_vm(
        self: &Arc<Self>,
        session: &Arc<Session>,
        limits: PlanLimits,
        kills: u64,
    ) -> Result<Arc<Live>, SessionError> {
        let most = self.config.max_waiting;
        let place = session.line.join(most);
        let place = place.map_err(|_| SessionError::QueueFull { limit: most })?;
        let _turn = place.turn().await;
        match self.vm_of(session, limits, kills).await {
            Ok((live, _)) => Ok(live),
            Err(NoVm::Error(error)) => Err(error),
            Err(NoVm::Killed) => Err(SessionError::NoVm(session.id.clone())),
        }
    }
}
