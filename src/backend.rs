//! What the front end and the task queue need from the sessions: nothing else, so that their tests run
//! without VMs.

use futures_util::future::BoxFuture;
use thaw_wire::message::Process;

use crate::session::{
    Accepted, Attached, Command, Outcome, PlanLimits, ProcessHandle, SessionError, SessionId,
    SessionSpec, SessionView, Sessions, TenantId,
};

/// The sessions, as seen from the API.
pub trait Backend: std::fmt::Debug + Send + Sync + 'static {
    /// Makes a session.
    fn create<'a>(
        &'a self,
        tenant: &'a TenantId,
        limits: PlanLimits,
        spec: SessionSpec,
    ) -> BoxFuture<'a, Result<SessionId, SessionError>>;

    /// What can be told about the tenant's session.
    ///
    /// # Errors
    /// [`SessionError::NotFound`], for another tenant's session too.
    fn view(&self, tenant: &TenantId, id: &SessionId) -> Result<SessionView, SessionError>;

    /// Gives a command its place in the session's line, at once and for good.
    ///
    /// # Errors
    /// There is no such session, or its line is full.
    fn accept(&self, tenant: &TenantId, id: &SessionId) -> Result<Box<dyn Ticket>, SessionError>;

    /// Starts a process in the session's VM, beside its commands.
    fn open<'a>(
        &'a self,
        tenant: &'a TenantId,
        limits: PlanLimits,
        id: &'a SessionId,
        process: Process,
    ) -> BoxFuture<'a, Result<ProcessHandle, SessionError>>;

    /// Wakes the session's VM if that is suspended; else does nothing.
    fn wake<'a>(
        &'a self,
        tenant: &'a TenantId,
        limits: PlanLimits,
        id: &'a SessionId,
    ) -> BoxFuture<'a, Result<(), SessionError>>;

    /// Ends the session's VM and returns the VM's id.
    fn kill<'a>(
        &'a self,
        tenant: &'a TenantId,
        id: &'a SessionId,
    ) -> BoxFuture<'a, Result<String, SessionError>>;
}

/// A command's place in its session's line.
pub trait Ticket: Send {
    /// Waits until every command before this one has ended.
    fn ready(&mut self) -> BoxFuture<'_, ()>;

    /// Runs the command when its turn comes.
    fn run(
        self: Box<Self>,
        limits: PlanLimits,
        command: Command,
        attached: Attached,
    ) -> BoxFuture<'static, Result<Outcome, SessionError>>;
}

impl Backend for Sessions {
    fn create<'a>(
        &'a self,
        tenant: &'a TenantId,
        limits: PlanLimits,
        spec: SessionSpec,
    ) -> BoxFuture<'a, Result<SessionId, SessionError>> {
        Box::pin(Self::create(self, tenant, limits, spec))
    }

    fn view(&self, tenant: &TenantId, id: &SessionId) -> Result<SessionView, SessionError> {
        Self::view(self, tenant, id)
    }

    fn accept(&self, tenant: &TenantId, id: &SessionId) -> Result<Box<dyn Ticket>, SessionError> {
        let accepted = Self::accept(self, tenant, id)?;
        Ok(Box::new(SessionTicket {
            sessions: self.clone(),
            accepted,
        }))
    }

    fn open<'a>(
        &'a self,
        tenant: &'a TenantId,
        limits: PlanLimits,
        id: &'a SessionId,
        process: Process,
    ) -> BoxFuture<'a, Result<ProcessHandle, SessionError>> {
        Box::pin(Self::open(self, tenant, limits, id, process))
    }

    fn wake<'a>(
        &'a self,
        tenant: &'a TenantId,
        limits: PlanLimits,
        id: &'a SessionId,
    ) -> BoxFuture<'a, Result<(), SessionError>> {
        Box::pin(Self::wake(self, tenant, limits, id))
    }

    fn kill<'a>(
        &'a self,
        tenant: &'a TenantId,
        id: &'a SessionId,
    ) -> BoxFuture<'a, Result<String, SessionError>> {
        Box::pin(Self::kill(self, tenant, id))
    }
}

struct SessionTicket {
    sessions: Sessions,
    accepted: Accepted,
}

impl Ticket for SessionTicket {
    fn ready(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(self.accepted.ready())
    }

    fn run(
        self: Box<Self>,
        limits: PlanLimits,
        command: Command,
        attached: Attached,
    ) -> BoxFuture<'static, Result<Outcome, SessionError>> {
        Box::pin(async move {
            self.sessions
                .run(self.accepted, limits, command, attached)
                .await
        })
    }
}

#[cfg(test)]
pub(crate) mod fake;
