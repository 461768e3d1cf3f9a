//! `GET /v1/executions/{task_id}`.

use std::time::Duration;

use hyper::StatusCode;
use serde::Serialize;

use super::execute::raw_json;
use super::{Access, Endpoint, Group, Takes};
use crate::http::app::Call;
use crate::http::error::ApiError;
use crate::http::openapi::{language, nullable, object, text, time, truth, uuid};
use crate::http::reply::{self, Reply, iso_ms};
use crate::store::{TaskRow, language_name};
use serde_json::json;
use serde_json::value::RawValue;

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[Endpoint {
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
    }],
    schemas: || {
        vec![(
            "Task",
            object(
                &["task_id", "is_complete"],
                json!({
                    "task_id": uuid(), "session_id": uuid(),
                    "status": { "type": "string", "enum": ["queued", "running", "done", "interrupted"] },
                    "is_complete": truth(), "serialized_stdout": text(), "serialized_stderr": text(),
                    "exit_code": nullable("integer"), "execution_time": nullable("number"),
                    "cpu_time": nullable("number"), "created_at": time(), "language": language(),
                    "truncated": truth(), "vm_restarted": truth(),
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

pub(super) async fn get(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let not_found = || ApiError::not_found("Task not found");
    // Anything else cannot be in the store.
    let id = uuid::Uuid::try_parse(call.path("task_id")).map_err(|_| not_found())?;
    let wait = if call.is_draining() {
        Duration::ZERO
    } else {
        LONG_POLL
    };
    let task = call
        .app
        .tasks
        .view(&caller.tenant, &id.to_string(), wait)
        .await?;
    Ok(reply::json(
        StatusCode::OK,
        &shown(&task.ok_or_else(not_found)?),
    ))
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
