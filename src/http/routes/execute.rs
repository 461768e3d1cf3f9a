//! `POST /execute` and `POST /execute_async`.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::OwnedSemaphorePermit;

use super::{Access, Endpoint, Group, Takes, executions};
use crate::backend::Ticket;
use crate::http::app::{App, Call};
use crate::http::auth::Caller;
use crate::http::body::CommandRequest;
use crate::http::error::ApiError;
use crate::http::openapi::{
    language, language_or, nullable, object, results, seconds, text, time, truth, uuid,
};
use crate::http::reply::{self, Reply, iso, iso_ms};
use crate::http::retry::{Same, name_reused};
use crate::session::{Attached, Command, ContextName, Outcome, SessionId, SessionSpec};
use crate::store::{NewTask, Submitted, language_name};
use serde_json::json;
use serde_json::value::RawValue;

/// Where a command is followed from its start.
const STREAM: &str = "/v1/executions/stream";

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "POST",
            path: "/execute",
            name: "execute_command",
            summary: "Run a command in a session's VM and wait for its result",
            access: Access::KeyOrBody,
            query: &[],
            takes: Takes::Json("CommandRequest"),
            gives: "CommandResult",
            refuses: &[400, 404, 409, 503],
            handler: |call| Box::pin(execute(call)),
        },
        Endpoint {
            method: "POST",
            path: "/execute_async",
            name: "execute_command_async",
            summary: "Queue a command; it is durable once this answers",
            access: Access::KeyOrBody,
            query: &[],
            takes: Takes::Json("CommandRequest"),
            gives: "TaskAccepted",
            refuses: &[400, 404, 409, 503],
            handler: |call| Box::pin(execute_async(call)),
        },
        Endpoint {
            method: "POST",
            path: STREAM,
            name: "stream_command",
            summary: "Queue a command and follow it: server-sent events `start`, `stdout`, `stderr`, `result`, `exit`",
            access: Access::KeyOrBody,
            query: &[],
            takes: Takes::Json("CommandRequest"),
            gives: "text/event-stream",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(execute_stream(call)),
        },
    ],
    schemas: || {
        vec![
            (
                "CommandRequest",
                object(
                    &[],
                    json!({
                        "command": nullable("string"),
                        "code": nullable("string"),
                        "api_key": nullable("string"),
                        "session_id": { "anyOf": [uuid(), { "type": "null" }] },
                        "language": language_or("python"),
                        "timeout": { "type": "integer", "minimum": 1, "maximum": 600, "default": 60 },
                        "context": { "anyOf": [
                        { "type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$" }, { "type": "null" },
                    ] },
                    "vault_ids": { "anyOf": [{ "type": "array", "items": text() }, { "type": "null" }] },
                    }),
                ),
            ),
            (
                "CommandResult",
                object(
                    &["stdout", "stderr", "exit_code", "session_id"],
                    json!({
                        "stdout": text(), "stderr": text(), "exit_code": { "type": "integer" },
                        "execution_time": seconds(), "cpu_time": seconds(), "session_id": uuid(),
                        "language": language(), "created_at": time(), "timed_out": truth(), "truncated": truth(),
                        "truncated_bytes": { "type": "integer" }, "results": results(), "vm_restarted": truth(),
                    }),
                ),
            ),
            (
                "TaskAccepted",
                object(
                    &["task_id", "session_id"],
                    json!({
                        "task_id": uuid(), "session_id": uuid(), "status": text(), "created_at": time(),
                    }),
                ),
            ),
        ]
    },
};

/// How long before the client's own time-out it is answered. The client uses one number for
/// both, so an answer at its end comes too late.
const MARGIN: Duration = Duration::from_millis(250);

/// Longest `Idempotency-Key`.
const MOST_KEY_BYTES: usize = 255;

/// The body of a 200 from `POST /execute`.
#[derive(Debug, Serialize)]
struct CommandResult<'a> {
    stdout: &'a str,
    stderr: &'a str,
    exit_code: i32,
    execution_time: f64,
    cpu_time: f64,
    session_id: &'a str,
    language: &'static str,
    created_at: String,
    timed_out: bool,
    truncated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    results: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "is_zero")]
    truncated_bytes: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    vm_restarted: bool,
}

fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

/// The body of a 200 from `POST /execute_async`.
#[derive(Debug, Serialize)]
struct TaskAccepted<'a> {
    task_id: &'a str,
    session_id: &'a str,
    status: &'static str,
    created_at: String,
}

/// What is read back of a [`TaskAccepted`].
#[derive(Deserialize)]
struct TaskId {
    task_id: String,
}

/// A request that may be run.
struct Wanted {
    caller: Caller,
    request: CommandRequest,
    idempotency_key: Option<String>,
    content: [u8; 32],
    /// Room for its body, which is kept as long as the code.
    room: Option<OwnedSemaphorePermit>,
}

pub(super) async fn execute(mut call: Call) -> Result<Reply, ApiError> {
    let wanted = wanted(&mut call, "/execute").await?;
    let same = same(&wanted, "/execute");
    let app = call.app.clone();
    let Wanted {
        caller,
        request,
        content,
        room,
        ..
    } = wanted;
    let timeout = Duration::from_secs(request.timeout_s.into());
    let command = Command {
        language: request.language,
        code: request.code,
        context: request.context,
        live: false,
        timeout,
        answer_within: Some(timeout.saturating_sub(MARGIN)),
    };
    let retries = app.retries.clone();
    let minted = Arc::new(OnceLock::new());
    // The session that was made for this command, and that nobody has been told of, keeps no VM.
    let unclaimed = {
        let (app, tenant, minted) = (app.clone(), caller.tenant.clone(), minted.clone());
        async move {
            if let Some(session) = minted.get()
                && let Err(error) = app.backend.kill(&tenant, session).await
            {
                tracing::debug!(%error, "a session that nobody knows of has no VM to end");
            }
        }
    };
    let start = || {
        let created_at = iso(jiff::Timestamp::now());
        let language = language_name(command.language);
        let place = Place::take(&app, &caller, request.session_id)?;
        Ok(async move {
            let _room = room;
            let is_new = matches!(place, Place::New);
            let (session, ticket) = place.found(&app, &caller).await?;
            if is_new {
                minted.get_or_init(|| session.clone());
            }
            let running = ticket.run(caller.limits, command, Attached::default());
            let outcome = running.await?;
            Ok(result(&outcome, &session.to_string(), language, created_at))
        })
    };
    let body = retries.run(same, content, start, unclaimed).await?;
    Ok(reply::raw(StatusCode::OK, "application/json", body))
}

/// Where a command runs.
enum Place {
    /// In this session, in this place of its line, which was taken when the request came.
    In(SessionId, Box<dyn Ticket>),
    /// In a session of its own, made when it is certain that the command runs.
    New,
}

impl Place {
    fn take(app: &App, caller: &Caller, session: Option<SessionId>) -> Result<Self, ApiError> {
        let Some(session) = session else {
            return Ok(Self::New);
        };
        let ticket = app.backend.accept(&caller.tenant, &session)?;
        Ok(Self::In(session, ticket))
    }

    async fn found(
        self,
        app: &App,
        caller: &Caller,
    ) -> Result<(SessionId, Box<dyn Ticket>), ApiError> {
        match self {
            Self::In(session, ticket) => Ok((session, ticket)),
            Self::New => {
                let vm = &app.config.vm;
                let spec = SessionSpec {
                    lifetime: Duration::from_secs(vm.lifetime_s),
                    memory_mib: vm.memory_mib,
                    vcpus: vm.vcpus,
                    metadata: Default::default(),
                    env: Default::default(),
                };
                let made = app.backend.create(&caller.tenant, caller.limits, spec);
                let session = made.await?;
                let ticket = app.backend.accept(&caller.tenant, &session)?;
                Ok((session, ticket))
            }
        }
    }
}

pub(super) async fn execute_async(mut call: Call) -> Result<Reply, ApiError> {
    let wanted = wanted(&mut call, "/execute_async").await?;
    let (_, body) = submit(&call.app, wanted, "/execute_async").await?;
    Ok(reply::raw(StatusCode::OK, "application/json", body))
}

/// `POST /v1/executions/stream`: as `/execute_async`, followed at once.
pub(super) async fn execute_stream(mut call: Call) -> Result<Reply, ApiError> {
    let wanted = wanted(&mut call, STREAM).await?;
    let tenant = wanted.caller.tenant.clone();
    let (task, _) = submit(&call.app, wanted, STREAM).await?;
    executions::follow(call.app.clone(), tenant, task)
}

/// Hands a task in; its id, and the answer that tells it.
async fn submit(
    app: &Arc<App>,
    wanted: Wanted,
    route: &'static str,
) -> Result<(String, Bytes), ApiError> {
    let (same, content) = (same(&wanted, route), wanted.content);
    let (app, retries) = (app.clone(), app.retries.clone());
    let start = || {
        let (caller, mut request) = (wanted.caller, wanted.request);
        let place = Place::take(&app, &caller, request.session_id.take())?;
        Ok(async move {
            let _room = wanted.room;
            if matches!(place, Place::New) {
                // No session is made for a task that has run already or is not taken.
                let (key, length) = (wanted.idempotency_key.clone(), request.code.len());
                let tasks = &app.tasks;
                let foreseen = tasks.foresee(&caller.tenant, key, content, length);
                if let Some(submitted) = foreseen.await? {
                    return told(&app, submitted, Bytes::new);
                }
            }
            let (session, ticket) = place.found(&app, &caller).await?;
            let session_id = session.to_string();
            let task = NewTask {
                id: uuid::Uuid::new_v4().to_string(),
                tenant: caller.tenant.0.clone(),
                session_id: session_id.clone(),
                command: Command {
                    language: request.language,
                    code: request.code,
                    context: request.context,
                    live: route == STREAM,
                    timeout: Duration::from_secs(request.timeout_s.into()),
                    answer_within: None,
                },
                max_vms: caller.limits.max_vms,
                idempotency_key: wanted.idempotency_key,
                body_hash: content,
            };
            let id = task.id.clone();
            let created_at = iso(jiff::Timestamp::now());
            let submitted = app.tasks.submit(task, ticket).await?;
            told(&app, submitted, || accepted(&id, &session_id, created_at))
        })
    };
    let body = retries.run(same, content, start, async {}).await?;
    // A repetition is answered with the first one's id.
    let told: TaskId = serde_json::from_slice(&body).map_err(|error| ApiError::internal(&error))?;
    Ok((told.task_id, body))
}

/// What became of a task that was handed in; `new` is the answer if it is a new one.
fn told(app: &App, submitted: Submitted, new: impl FnOnce() -> Bytes) -> Result<Bytes, ApiError> {
    match submitted {
        Submitted::New => Ok(new()),
        Submitted::Same {
            id,
            session_id,
            created_ms,
        } => Ok(accepted(&id, &session_id, iso_ms(created_ms))),
        Submitted::KeyReused => Err(name_reused()),
        Submitted::Full(limit) => {
            let detail =
                format!("{limit} of your tasks wait or run already; wait for one to finish");
            Err(ApiError::too_many(detail, 1))
        }
        Submitted::TooMuchCode => {
            let most = app.tasks.most_code_mib();
            let detail = format!(
                "The code of your tasks that wait or run would be more than {most} MiB; wait for one to finish"
            );
            Err(ApiError::too_many(detail, 1))
        }
    }
}

/// Who wants what, as far as that can be told without a session.
async fn wanted(call: &mut Call, route: &'static str) -> Result<Wanted, ApiError> {
    let (caller, body) = call.caller_and_body().await?;
    let request = body.command()?;
    if let Some(vault) = request.vault_ids.first() {
        let shown: String = vault.chars().take(64).collect();
        return Err(ApiError::not_found(format!(
            "No vault {shown:?}: this server has no vaults; nothing was run"
        )));
    }
    let idempotency_key = idempotency_key(call)?;
    let content = content_hash(route, &request);
    Ok(Wanted {
        caller,
        request,
        idempotency_key,
        content,
        room: call.room(),
    })
}

/// What makes another request the same as this one.
fn same(wanted: &Wanted, route: &'static str) -> Same {
    let tenant = wanted.caller.tenant.clone();
    match (&wanted.idempotency_key, &wanted.request.session_id) {
        (Some(key), _) => Same::Named(tenant, route, key.clone()),
        (None, Some(_)) => Same::Body(tenant, wanted.content),
        (None, None) => Same::New(tenant, wanted.content),
    }
}

fn idempotency_key(call: &Call) -> Result<Option<String>, ApiError> {
    let Some(value) = call.parts.headers.get("idempotency-key") else {
        return Ok(None);
    };
    let text = value.to_str().ok().map(str::trim);
    match text.filter(|text| !text.is_empty() && text.len() <= MOST_KEY_BYTES) {
        Some(text) => Ok(Some(text.to_owned())),
        None => Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "Idempotency-Key must be 1 to 255 visible ASCII characters",
        )),
    }
}

/// What the request asks for, whatever its spelling. Lengths keep neighbours apart.
fn content_hash(route: &str, request: &CommandRequest) -> [u8; 32] {
    let session = request
        .session_id
        .as_ref()
        .map(ToString::to_string)
        .unwrap_or_default();
    let timeout = request.timeout_s.to_string();
    let mut hash = Sha256::new();
    for part in [
        route,
        &session,
        language_name(request.language),
        request.context.as_ref().map_or("", ContextName::as_str),
        &timeout,
        &request.code,
    ] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

fn result(
    outcome: &Outcome,
    session_id: &str,
    language: &'static str,
    created_at: String,
) -> Bytes {
    json_bytes(&CommandResult {
        stdout: &outcome.stdout,
        stderr: &outcome.stderr,
        exit_code: outcome.exit_code,
        execution_time: outcome.execution_time.as_secs_f64(),
        cpu_time: outcome.cpu_time.as_secs_f64(),
        session_id,
        language,
        created_at,
        timed_out: outcome.timed_out,
        truncated: outcome.truncated_bytes > 0,
        results: raw_json(&outcome.results),
        truncated_bytes: outcome.truncated_bytes,
        vm_restarted: outcome.vm_restarted,
    })
}

/// Results as they are stored: JSON, or nothing.
pub(super) fn raw_json(text: &str) -> Option<&RawValue> {
    serde_json::from_str(text).ok()
}

fn accepted(task_id: &str, session_id: &str, created_at: String) -> Bytes {
    json_bytes(&TaskAccepted {
        task_id,
        session_id,
        status: "queued",
        created_at,
    })
}

/// These are plain structures of text and numbers, which cannot fail to be written.
fn json_bytes(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).unwrap_or_default().into()
}
