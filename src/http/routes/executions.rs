//! `/v1/executions/…`: tasks, looked at, followed and cancelled.

use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use serde::Serialize;

use super::execute::raw_json;
use super::{Access, Endpoint, Group, Takes};
use crate::http::app::{App, Call};
use crate::http::error::ApiError;
use crate::http::openapi::{language, nullable, object, results, text, time, truth, uuid};
use crate::http::reply::{self, Reply, iso_ms};
use crate::http::sse::{self, Events};
use crate::session::{Output, TenantId};
use crate::store::{StoreError, TaskRow, language_name};
use serde_json::json;
use serde_json::value::RawValue;

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "GET",
            path: "/v1/executions/{task_id}",
            name: "get_execution",
            summary: "A queued command's state; waits up to a second for its end",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Task",
            refuses: &[404],
            handler: |call| Box::pin(get(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/executions/{task_id}/stream",
            name: "follow_execution",
            summary: "A queued command's events from its start, whenever that was; see POST /v1/executions/stream",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "text/event-stream",
            refuses: &[404],
            handler: |call| Box::pin(reattach(call)),
        },
        Endpoint {
            method: "DELETE",
            path: "/v1/executions/{task_id}",
            name: "cancel_execution",
            summary: "Stop a queued command: interrupt it, or kill it if it does not heed that",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Task",
            refuses: &[404, 409],
            handler: |call| Box::pin(cancel(call)),
        },
    ],
    schemas: || {
        vec![(
            "Task",
            object(
                &["task_id", "is_complete"],
                json!({
                    "task_id": uuid(), "session_id": uuid(),
                    "status": { "type": "string", "enum": ["queued", "running", "done", "cancelled", "interrupted"] },
                    "is_complete": truth(), "serialized_stdout": text(), "serialized_stderr": text(),
                    "exit_code": nullable("integer"), "execution_time": nullable("number"),
                    "cpu_time": nullable("number"), "created_at": time(), "language": language(),
                    "truncated": truth(), "results": results(), "vm_restarted": truth(),
                }),
            ),
        )]
    },
};

/// How long an answer waits for the task's end. Clients pause a second between polls, so this is
/// what makes their polling cost nothing; longer would keep them from noticing their own time-out.
const LONG_POLL: Duration = Duration::from_secs(1);

/// The names lie, as they do in the API this follows: the texts are not serialized in any way.
#[derive(Debug, Serialize)]
struct Task<'a> {
    task_id: &'a str,
    session_id: &'a str,
    status: &'static str,
    is_complete: bool,
    serialized_stdout: &'a str,
    serialized_stderr: &'a str,
    exit_code: Option<i32>,
    execution_time: Option<f64>,
    cpu_time: Option<f64>,
    created_at: String,
    language: &'static str,
    truncated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    results: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    vm_restarted: bool,
}

/// The task that the path names.
async fn task_of(call: Call, wait: Duration) -> Result<(Arc<App>, TenantId, TaskRow), ApiError> {
    let caller = call.caller()?;
    let not_found = || ApiError::not_found("Task not found");
    // Anything else cannot be in the store.
    let id = uuid::Uuid::try_parse(call.path("task_id")).map_err(|_| not_found())?;
    let app = call.app;
    let task = app
        .tasks
        .view(&caller.tenant, &id.to_string(), wait)
        .await?;
    Ok((app, caller.tenant, task.ok_or_else(not_found)?))
}

pub(super) async fn get(call: Call) -> Result<Reply, ApiError> {
    let wait = if call.is_draining() {
        Duration::ZERO
    } else {
        LONG_POLL
    };
    let (_, _, task) = task_of(call, wait).await?;
    Ok(reply::json(StatusCode::OK, &shown(&task)))
}

/// Stops a task and waits a moment for its end.
pub(super) async fn cancel(call: Call) -> Result<Reply, ApiError> {
    let (app, tenant, task) = task_of(call, Duration::ZERO).await?;
    let tasks = &app.tasks;
    if task.state.is_complete() || tasks.cancel(&tenant, &task.id).is_none() {
        let detail = format!("The task is {} already", task.state.as_str());
        return Err(ApiError::new(StatusCode::CONFLICT, detail));
    }
    let now = tasks.view(&tenant, &task.id, LONG_POLL).await?;
    Ok(reply::json(StatusCode::OK, &shown(&now.unwrap_or(task))))
}

/// Follows a task from its beginning, whenever it began.
pub(super) async fn reattach(call: Call) -> Result<Reply, ApiError> {
    let (app, tenant, task) = task_of(call, Duration::ZERO).await?;
    follow(app, tenant, task.id)
}

/// Events of a task that is there. Whether anybody listens is nothing to the task itself.
pub(super) fn follow(app: Arc<App>, tenant: TenantId, id: String) -> Result<Reply, ApiError> {
    let (events, reply) = sse::events();
    tokio::spawn(async move {
        if let Err(error) = tell(&app, &tenant, &id, &events).await {
            tracing::error!(%error, "a task can be followed no further");
            let detail = "the task cannot be read; ask for it by GET /v1/executions";
            events.send("error", &json!({ "detail": detail })).await;
        }
    });
    Ok(reply)
}

async fn tell(app: &App, tenant: &TenantId, id: &str, events: &Events) -> Result<(), StoreError> {
    // Taken before the row is read: a task that ends in between is complete in the row.
    let follower = app.tasks.follow(tenant, id);
    let Some(task) = app.tasks.view(tenant, id, Duration::ZERO).await? else {
        return Ok(());
    };
    let start = json!({
        "task_id": task.id,
        "session_id": task.session_id,
        "language": language_name(task.command.language),
        "created_at": iso_ms(task.created_ms),
    });
    if !events.send("start", &start).await {
        return Ok(());
    }
    let mut told = [0; 2];
    if let Some(mut follower) = follower {
        loop {
            let Some(next) = events.wait(follower.next()).await else {
                return Ok(());
            };
            let Some((output, text)) = next else { break };
            told[output as usize] += text.len();
            if !events.send(name(output), &json!({ "text": text })).await {
                return Ok(());
            }
        }
    }
    let Some(task) = app.tasks.view(tenant, id, Duration::ZERO).await? else {
        return Ok(());
    };
    // Notes are added at the end; of a task that was complete before, this is all.
    for (output, text) in [
        (Output::Stdout, &task.stdout),
        (Output::Stderr, &task.stderr),
    ] {
        let rest = text.get(told[output as usize]..).unwrap_or_default();
        if !rest.is_empty() && !events.send(name(output), &json!({ "text": rest })).await {
            return Ok(());
        }
    }
    let results: Vec<&RawValue> = serde_json::from_str(&task.results).unwrap_or_default();
    for result in results {
        if !events.send("result", &result).await {
            return Ok(());
        }
    }
    let mut end = serde_json::to_value(shown(&task)).unwrap_or_default();
    if let Some(end) = end.as_object_mut() {
        // Told already, piece by piece.
        for told in ["serialized_stdout", "serialized_stderr", "results"] {
            end.remove(told);
        }
    }
    events.send("exit", &end).await;
    Ok(())
}

fn name(output: Output) -> &'static str {
    match output {
        Output::Stdout => "stdout",
        Output::Stderr => "stderr",
    }
}

fn shown(row: &TaskRow) -> Task<'_> {
    let seconds = |us: i64| us as f64 / 1e6;
    Task {
        task_id: &row.id,
        session_id: &row.session_id,
        status: row.state.as_str(),
        is_complete: row.state.is_complete(),
        serialized_stdout: &row.stdout,
        serialized_stderr: &row.stderr,
        exit_code: row.exit_code,
        execution_time: row.execution_us.map(seconds),
        cpu_time: row.cpu_us.map(seconds),
        created_at: iso_ms(row.created_ms),
        language: language_name(row.command.language),
        truncated: row.truncated_bytes > 0,
        results: raw_json(&row.results),
        vm_restarted: row.vm_restarted,
    }
}
