//! The endpoints: one list from which requests are routed and the OpenAPI document is made.

mod account;
mod execute;
mod executions;
mod sessions;
mod system;

use futures_util::future::BoxFuture;

use super::app::Call;
use super::error::ApiError;
use super::reply::Reply;

/// Answers one call.
pub type Handler = fn(Call) -> BoxFuture<'static, Result<Reply, ApiError>>;

/// What an endpoint reads as its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// Nothing.
    Nothing,
    /// JSON of this schema.
    Json(&'static str),
    /// A form of this schema.
    Form(&'static str),
}

/// Who may call an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anybody.
    Open,
    /// Who has a key or token.
    Key,
}

/// One endpoint.
#[derive(Debug)]
pub struct Endpoint {
    /// `GET` or `POST`.
    pub method: &'static str,
    /// With parameters in braces.
    pub path: &'static str,
    /// Its name in the OpenAPI document.
    pub name: &'static str,
    /// What it is for.
    pub summary: &'static str,
    /// Who may call it.
    pub access: Access,
    /// Its body.
    pub takes: Takes,
    /// The schema of its 200 reply, or a media type when it is not JSON.
    pub gives: &'static str,
    /// What answers it.
    pub handler: Handler,
}

/// Every endpoint.
pub const ENDPOINTS: &[Endpoint] = &[
    Endpoint {
        method: "POST",
        path: "/execute",
        name: "execute_command",
        summary: "Run a command in a session's VM and wait for its result",
        access: Access::Key,
        takes: Takes::Json("CommandRequest"),
        gives: "CommandResult",
        handler: |call| Box::pin(execute::execute(call)),
    },
    Endpoint {
        method: "POST",
        path: "/execute_async",
        name: "execute_command_async",
        summary: "Queue a command; it is durable once this answers",
        access: Access::Key,
        takes: Takes::Json("CommandRequest"),
        gives: "TaskAccepted",
        handler: |call| Box::pin(execute::execute_async(call)),
    },
    Endpoint {
        method: "GET",
        path: "/v1/executions/{task_id}",
        name: "get_execution",
        summary: "A queued command's state; waits up to a second for its end",
        access: Access::Key,
        takes: Takes::Nothing,
        gives: "Task",
        handler: |call| Box::pin(executions::get(call)),
    },
    Endpoint {
        method: "POST",
        path: "/v1/sessions/session",
        name: "create_session",
        summary: "Make a session; its VM comes with its first command",
        access: Access::Key,
        takes: Takes::Json("SessionRequest"),
        gives: "SessionCreated",
        handler: |call| Box::pin(sessions::create(call)),
    },
    Endpoint {
        method: "GET",
        path: "/v1/sessions/session/{session_id}",
        name: "get_session",
        summary: "What a session was made with",
        access: Access::Key,
        takes: Takes::Nothing,
        gives: "Session",
        handler: |call| Box::pin(sessions::get(call)),
    },
    Endpoint {
        method: "GET",
        path: "/v1/sessions/status/{session_id}",
        name: "get_session_status",
        summary: "Whether a session's VM runs",
        access: Access::Key,
        takes: Takes::Nothing,
        gives: "SessionStatus",
        handler: |call| Box::pin(sessions::status(call)),
    },
    Endpoint {
        method: "POST",
        path: "/kill",
        name: "kill_vm",
        summary: "End a session's VM; the session stays",
        access: Access::Key,
        takes: Takes::Json("KillRequest"),
        gives: "Killed",
        handler: |call| Box::pin(sessions::kill(call)),
    },
    Endpoint {
        method: "GET",
        path: "/v1/users/me",
        name: "get_current_user",
        summary: "Whose key this is",
        access: Access::Key,
        takes: Takes::Nothing,
        gives: "User",
        handler: |call| Box::pin(account::me(call)),
    },
    Endpoint {
        method: "POST",
        path: "/token",
        name: "login_for_access_token",
        summary: "A bearer token for a user name and password (or one of the user's API keys)",
        access: Access::Open,
        takes: Takes::Form("PasswordForm"),
        gives: "Token",
        handler: |call| Box::pin(account::token(call)),
    },
    Endpoint {
        method: "GET",
        path: "/health",
        name: "health",
        summary: "Whether the server takes requests",
        access: Access::Open,
        takes: Takes::Nothing,
        gives: "Health",
        handler: |call| Box::pin(system::health(call)),
    },
    Endpoint {
        method: "GET",
        path: "/metrics",
        name: "metrics",
        summary: "Metrics in OpenMetrics text",
        access: Access::Open,
        takes: Takes::Nothing,
        gives: "application/openmetrics-text",
        handler: |call| Box::pin(system::metrics(call)),
    },
    Endpoint {
        method: "GET",
        path: "/openapi.json",
        name: "openapi",
        summary: "This document",
        access: Access::Open,
        takes: Takes::Nothing,
        gives: "application/json",
        handler: |call| Box::pin(system::openapi(call)),
    },
];
