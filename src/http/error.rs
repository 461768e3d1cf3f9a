//! Errors as FastAPI shapes them: `{"detail": …}`.
//!
//! What a client reads and what an operator reads are two texts: details say what the client can
//! do, the log has the cause. Clients of this API retry nothing but lost connections and time-outs, lose
//! the detail of most 4xx and treat 5xx as an outage, so a permanent failure is never 5xx and overload is 429.

use std::borrow::Cow;

use hyper::StatusCode;
use hyper::header::{ALLOW, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use serde::Serialize;
use serde_json::{Value, json};

use super::auth::Refusal;
use super::reply::{self, Reply};
use crate::session::SessionError;
use crate::snapshots::SnapshotError;
use crate::store::StoreError;
use crate::tapes::TapeError;
use crate::vms::VmError;

/// One thing that is wrong with a request's body, in pydantic's words.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fault {
    /// pydantic's name for the kind of fault, such as `int_parsing`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Where: `["body", "timeout"]`.
    pub loc: Vec<Value>,
    /// For a person.
    pub msg: Cow<'static, str>,
    /// What was given.
    pub input: Value,
    /// The parts that `msg` was made of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ctx: Option<Value>,
}

/// Why a request is not served.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    detail: Value,
    retry_after_s: Option<u64>,
    allow: Option<String>,
}

impl ApiError {
    /// An error with a text for the client.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            status,
            detail: Value::String(detail.into()),
            retry_after_s: None,
            allow: None,
        }
    }

    /// 422 with everything that is wrong.
    pub fn invalid(faults: &[Fault]) -> Self {
        Self {
            detail: json!(faults),
            ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, "")
        }
    }

    /// 404.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    /// 405 with the methods that there are.
    pub fn wrong_method(allow: String) -> Self {
        Self {
            allow: Some(allow),
            ..Self::new(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed")
        }
    }

    /// 429 with the seconds to wait.
    pub fn too_many(detail: impl Into<String>, retry_after_s: u64) -> Self {
        Self {
            retry_after_s: Some(retry_after_s),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, detail)
        }
    }

    /// 500. The cause goes to the log only.
    pub fn internal(cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(%cause, "a request failed");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "Internal Server Error; the operator's log has the cause",
        )
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// What it tells the client, as text.
    pub fn detail(&self) -> String {
        match &self.detail {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    }

    /// Its reply.
    pub fn reply(&self) -> Reply {
        let mut reply = reply::json(self.status, &json!({ "detail": self.detail }));
        let headers = reply.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = self.retry_after_s {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(value) = self
            .allow
            .as_ref()
            .and_then(|a| HeaderValue::from_str(a).ok())
        {
            headers.insert(ALLOW, value);
        }
        reply
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoCredentials => Self::new(StatusCode::UNAUTHORIZED, "Not authenticated"),
            Refusal::BadCredentials => {
                Self::new(StatusCode::UNAUTHORIZED, "Could not validate credentials")
            }
            Refusal::TooManyLogins => Self::too_many("Too many login attempts; wait a minute", 60),
        }
    }
}

impl From<SessionError> for ApiError {
    fn from(error: SessionError) -> Self {
        let detail = error.to_string();
        match error {
            SessionError::NotFound(_) | SessionError::NoVm(_) => Self::not_found(detail),
            SessionError::PlanFull { .. } => Self::too_many(detail, 5),
            SessionError::HostFull { .. }
            | SessionError::QueueFull { .. }
            | SessionError::NoMemory
            | SessionError::TooManyProcesses { .. }
            | SessionError::TooManySessions { .. } => Self::too_many(detail, 1),
            SessionError::Asleep(_)
            | SessionError::HasVm(_)
            | SessionError::Conflict(_)
            | SessionError::EndedEarly => Self::new(StatusCode::CONFLICT, detail),
            SessionError::ShuttingDown => Self::new(StatusCode::SERVICE_UNAVAILABLE, detail),
            SessionError::Unavailable(cause) => {
                tracing::error!(cause = format!("{cause:#}"), "no VM could be started");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, detail)
            }
        }
    }
}

impl From<SnapshotError> for ApiError {
    fn from(error: SnapshotError) -> Self {
        let detail = error.to_string();
        match error {
            SnapshotError::NotFound(_) => Self::not_found(detail),
            SnapshotError::TooMany { .. } | SnapshotError::TooLarge { .. } => {
                Self::too_many(detail, 60)
            }
            SnapshotError::NoSpace { .. }
            | SnapshotError::Building(_)
            | SnapshotError::Failed { .. }
            | SnapshotError::Unfit { .. }
            | SnapshotError::NotMade(_) => Self::new(StatusCode::CONFLICT, detail),
        }
    }
}

impl From<VmError> for ApiError {
    fn from(error: VmError) -> Self {
        match error {
            VmError::NotFound(_) => Self::not_found(error.to_string()),
            VmError::State(detail) => Self::new(StatusCode::CONFLICT, detail),
            VmError::Session(error) => error.into(),
            VmError::Snapshot(error) => error.into(),
            VmError::Tape(error) => error.into(),
            VmError::Store(error) => error.into(),
        }
    }
}

impl From<TapeError> for ApiError {
    fn from(error: TapeError) -> Self {
        match error {
            TapeError::NotFound(_) | TapeError::NoCheckpoint { .. } => {
                Self::not_found(error.to_string())
            }
            TapeError::State(detail) => Self::new(StatusCode::CONFLICT, detail),
            TapeError::Store(error) => error.into(),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        Self::internal(&error)
    }
}
