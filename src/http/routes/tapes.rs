//! `/v1/tapes` and `/v1/sessions/{id}/tape/…`: recorded sessions, gone back in and branched from.

use hyper::StatusCode;
use serde_json::{Map, Value, json};

use super::{Access, Endpoint, Group, Query, QueryKind, Takes, sessions, vms};
use crate::http::app::Call;
use crate::http::body::fields::Fields;
use crate::http::error::ApiError;
use crate::http::openapi::{array, nullable, object, text, time, truth};
use crate::http::reply::{self, Reply, iso_ms};
use crate::store::{NewTapeEvent, TapeEvent, TapeFilter, TapeRow};
use crate::vms::{How, payload};

/// Most bytes of what a client puts on a tape at a time: an output worth reading, not a file.
const MOST_PAYLOAD: usize = 64 << 10;

/// Events that one call gives at most; an export gives as many.
const MOST_EVENTS: i64 = 10_000;

const STEP: i64 = 1 << 40;

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "POST",
            path: "/v1/sessions/{session_id}/tape/start",
            name: "start_tape",
            summary: "Record a session: a checkpoint before every command; goes on with the tape that runs",
            access: Access::Key,
            query: &[],
            takes: Takes::OptionalJson("TapeRequest"),
            gives: "Tape",
            refuses: &[404, 409],
            handler: |call| Box::pin(start(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes",
            name: "list_tapes",
            summary: "Tapes, newest first",
            access: Access::Key,
            query: &[
                Query {
                    name: "session_id",
                    kind: QueryKind::Text,
                    help: "Of this session",
                },
                Query {
                    name: "vm_id",
                    kind: QueryKind::Text,
                    help: "Of this VM",
                },
                Query {
                    name: "status",
                    kind: QueryKind::Text,
                    help: "`recording` or `stopped`",
                },
                Query {
                    name: "limit",
                    kind: QueryKind::Int(50, 1, 200),
                    help: "At most so many",
                },
                Query {
                    name: "offset",
                    kind: QueryKind::Int(0, 0, STEP),
                    help: "After so many",
                },
            ],
            takes: Takes::Nothing,
            gives: "Tapes",
            refuses: &[],
            handler: |call| Box::pin(list(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes/{tape_id}",
            name: "get_tape",
            summary: "One tape",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Tape",
            refuses: &[404],
            handler: |call| Box::pin(get(call)),
        },
        Endpoint {
            method: "DELETE",
            path: "/v1/tapes/{tape_id}",
            name: "delete_tape",
            summary: "Remove a tape with its checkpoints; its session goes on",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "TapeDeleted",
            refuses: &[404],
            handler: |call| Box::pin(delete(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/tapes/{tape_id}/stop",
            name: "stop_tape",
            summary: "Stop recording; what is recorded stays",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Tape",
            refuses: &[404],
            handler: |call| Box::pin(stop(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes/{tape_id}/events",
            name: "tape_events",
            summary: "What is on a tape, step by step",
            access: Access::Key,
            query: &[
                Query {
                    name: "after_step",
                    kind: QueryKind::Int(0, 0, STEP),
                    help: "After this step",
                },
                Query {
                    name: "kind",
                    kind: QueryKind::Text,
                    help: "Of this kind",
                },
                Query {
                    name: "limit",
                    kind: QueryKind::Int(200, 1, MOST_EVENTS),
                    help: "At most so many",
                },
            ],
            takes: Takes::Nothing,
            gives: "TapeEvents",
            refuses: &[404],
            handler: |call| Box::pin(events(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/tapes/{tape_id}/events",
            name: "append_tape_event",
            summary: "Put something of the client's own on a tape",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("TapeEventRequest"),
            gives: "TapeAppended",
            refuses: &[404, 409],
            handler: |call| Box::pin(append(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes/{tape_id}/lanes",
            name: "tape_lanes",
            summary: "How many events there are of each kind",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "TapeLanes",
            refuses: &[404],
            handler: |call| Box::pin(lanes(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes/{tape_id}/export",
            name: "export_tape",
            summary: "A tape with its events as one JSON object",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "TapeExport",
            refuses: &[404],
            handler: |call| Box::pin(export(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes/{tape_id}/diff",
            name: "diff_tape",
            summary: "Files that differ between the moments before two steps; one step beyond the last is now",
            access: Access::Key,
            query: &[
                Query {
                    name: "from",
                    kind: QueryKind::Int(1, 1, STEP),
                    help: "The first step",
                },
                Query {
                    name: "to",
                    kind: QueryKind::Int(1, 1, STEP),
                    help: "The second step",
                },
            ],
            takes: Takes::Nothing,
            gives: "TapeDiff",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(diff(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/tapes/{tape_id}/branch",
            name: "branch_tape",
            summary: "A new session that begins at the moment before a step, and is recorded in its turn",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("TapeBranchRequest"),
            gives: "TapeBranch",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(branch(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/tapes/{tape_id}/rewind",
            name: "rewind_tape",
            summary: "Take the session itself back to the moment before a step; what it is now becomes a step",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("TapeRewindRequest"),
            gives: "TapeRewound",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(rewind(call)),
        },
    ],
    schemas,
};

fn schemas() -> Vec<(&'static str, Value)> {
    let step = || json!({ "type": "integer", "minimum": 1, "maximum": STEP });
    let number = || json!({ "type": "integer" });
    vec![
        (
            "TapeRequest",
            object(
                &[],
                json!({
                    "record_egress_content": nullable("boolean"), "record_fs": nullable("boolean"),
                    "retention_days": { "type": "integer", "minimum": 1, "maximum": 365, "default": 7 },
                }),
            ),
        ),
        (
            "Tape",
            object(
                &["id", "status", "session_id", "total_steps"],
                json!({
                    "id": text(), "tape_id": text(), "status": text(), "session_id": text(),
                    "vm_id": nullable("string"), "total_steps": number(), "created_at": time(),
                    "stopped_at": nullable("string"), "expires_at": time(), "record_fs": truth(),
                    "record_egress_content": truth(), "parent_tape_id": nullable("string"),
                    "parent_step_id": nullable("integer"),
                }),
            ),
        ),
        ("Tapes", array("Tape")),
        (
            "TapeDeleted",
            object(
                &["success", "id"],
                json!({ "success": truth(), "id": text() }),
            ),
        ),
        (
            "TapeEvent",
            object(
                &["step_id", "kind", "ts", "payload"],
                json!({
                    "step_id": number(), "kind": text(), "ts": time(), "payload": { "type": "object" },
                    "checkpoint_id": nullable("string"),
                }),
            ),
        ),
        ("TapeEvents", array("TapeEvent")),
        (
            "TapeEventRequest",
            object(
                &["kind"],
                json!({
                    "kind": text(), "payload": nullable("object"), "step_id": nullable("integer"),
                    "parent_step_id": nullable("integer"), "checkpoint_id": nullable("string"),
                }),
            ),
        ),
        (
            "TapeAppended",
            object(
                &["step_id"],
                json!({ "tape_id": text(), "step_id": number() }),
            ),
        ),
        (
            "TapeLanes",
            object(
                &["lanes"],
                json!({ "lanes": { "type": "object", "additionalProperties": number() } }),
            ),
        ),
        (
            "TapeExport",
            object(
                &["format", "events"],
                json!({
                    "format": text(), "tape": { "$ref": "#/components/schemas/Tape" },
                    "events": array("TapeEvent"), "truncated": truth(),
                }),
            ),
        ),
        (
            "TapeDiff",
            object(
                &["changed_paths", "mode"],
                json!({
                    "tape_id": text(), "from_step": number(), "to_step": number(), "mode": text(),
                    "changed_paths": { "type": "array", "items": text() },
                    "changes": { "type": "array", "items": { "type": "object" } },
                }),
            ),
        ),
        (
            "TapeBranchRequest",
            object(
                &["at_step"],
                json!({
                    "at_step": step(),
                    "mode": { "type": "string", "enum": ["live", "replay"], "default": "live" },
                }),
            ),
        ),
        (
            "TapeBranch",
            object(
                &[
                    "tape_id",
                    "parent_tape_id",
                    "parent_step_id",
                    "status",
                    "vm_id",
                ],
                json!({
                    "tape_id": text(), "parent_tape_id": text(), "parent_step_id": number(), "status": text(),
                    "vm_id": text(), "session_id": text(),
                }),
            ),
        ),
        (
            "TapeRewindRequest",
            object(&["to_step"], json!({ "to_step": step() })),
        ),
        (
            "TapeRewound",
            object(
                &["tape_id", "to_step", "step_id", "vm_id", "session_id"],
                json!({
                    "tape_id": text(), "to_step": number(), "vm_id": text(), "session_id": text(),
                    "step_id": { "type": "integer", "description": "The step before which the session was as it was just now" },
                }),
            ),
        ),
    ]
}

fn shown(tape: &TapeRow) -> Value {
    let (parent, step) = tape.parent.clone().unzip();
    json!({
        "id": tape.id,
        "tape_id": tape.id,
        "status": tape.status,
        "session_id": tape.session_id,
        "vm_id": tape.vm_id,
        "total_steps": tape.steps,
        "created_at": iso_ms(tape.created_ms),
        "stopped_at": tape.stopped_ms.map(iso_ms),
        "expires_at": iso_ms(tape.expires_ms),
        "record_fs": tape.files,
        // Guests have no network yet.
        "record_egress_content": false,
        "parent_tape_id": parent,
        "parent_step_id": step,
    })
}

fn shown_event(event: &TapeEvent) -> Value {
    json!({
        "step_id": event.step,
        "kind": event.kind,
        "ts": iso_ms(event.at_ms),
        "payload": payload(&event.payload),
        "checkpoint_id": event.checkpoint,
    })
}

async fn start(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_optional_body().await?;
    let (files, days) = body.fields(|fields| {
        // Read so that a wrong type is refused; there is no egress to record.
        fields.optional_truth("record_egress_content");
        let files = fields.optional_truth("record_fs").unwrap_or(true);
        (files, fields.int("retention_days", 7, 1, 365))
    })?;
    let session = sessions::path_id(&call)?;
    let vms = &call.app.control.vms;
    let tape = vms.record(&caller.tenant, &session, files, days).await?;
    Ok(reply::json(StatusCode::OK, &shown(&tape)))
}

async fn list(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let filter = call.query(|fields| {
        let mut word = |name| fields.optional_string(name).filter(|text| !text.is_empty());
        let (session_id, vm_id, status) = (word("session_id"), word("vm_id"), word("status"));
        TapeFilter {
            tenant: caller.tenant.0.clone(),
            session_id,
            vm_id,
            status,
            limit: fields.int("limit", 50, 1, 200),
            offset: fields.int("offset", 0, 0, STEP),
        }
    })?;
    let tapes = call.app.control.vms.tapes().list(filter).await?;
    let tapes: Vec<Value> = tapes.iter().map(shown).collect();
    Ok(reply::json(StatusCode::OK, &json!(tapes)))
}

async fn get(call: Call) -> Result<Reply, ApiError> {
    let tape = tape_of(&call).await?;
    Ok(reply::json(StatusCode::OK, &shown(&tape)))
}

async fn delete(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let id = call.path("tape_id");
    let vms = &call.app.control.vms;
    vms.delete_tape(&caller.tenant, id).await?;
    Ok(reply::json(
        StatusCode::OK,
        &json!({ "success": true, "id": id }),
    ))
}

async fn stop(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, _) = call.caller_and_optional_body().await?;
    let tapes = call.app.control.vms.tapes();
    let tape = tapes.stop(&caller.tenant, call.path("tape_id")).await?;
    Ok(reply::json(StatusCode::OK, &shown(&tape)))
}

async fn events(call: Call) -> Result<Reply, ApiError> {
    let tape = tape_of(&call).await?;
    let (after, kind, limit) = call.query(|fields| {
        (
            fields.int("after_step", 0, 0, STEP),
            fields
                .optional_string("kind")
                .filter(|kind| !kind.is_empty()),
            fields.int("limit", 200, 1, MOST_EVENTS),
        )
    })?;
    let events = call
        .app
        .control
        .vms
        .tapes()
        .events(&tape.id, after, kind, limit);
    let events: Vec<Value> = events.await?.iter().map(shown_event).collect();
    Ok(reply::json(StatusCode::OK, &json!(events)))
}

async fn append(mut call: Call) -> Result<Reply, ApiError> {
    let (_, body) = call.caller_and_body().await?;
    let event = body.fields(read_event)?;
    let tape = tape_of(&call).await?;
    let step = call.app.control.vms.tapes().append(&tape.id, event).await?;
    Ok(reply::json(
        StatusCode::OK,
        &json!({ "tape_id": tape.id, "step_id": step }),
    ))
}

fn read_event(fields: &mut Fields<'_>) -> NewTapeEvent {
    let kind = fields.required_string("kind").unwrap_or_default();
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if !(1..=64).contains(&kind.len()) || !kind.bytes().all(fits) {
        fields.value_error(&["kind"], "a kind has 1 to 64 letters, digits or _-.");
    }
    let payload = fields.object("payload").map_or_else(
        || "{}".to_owned(),
        |payload: &Map<String, Value>| json!(payload).to_string(),
    );
    if payload.len() > MOST_PAYLOAD {
        fields.value_error(&["payload"], "a payload has at most 64 KiB");
    }
    let given = |fields: &Fields<'_>, name| fields.raw(name).is_some_and(|value| !value.is_null());
    let step = given(fields, "step_id").then(|| fields.int("step_id", 1, 1, STEP));
    if given(fields, "parent_step_id") {
        fields.int("parent_step_id", 1, 1, STEP);
    }
    // Checkpoints are made by this server before commands: a client cannot name one.
    fields.optional_string("checkpoint_id");
    NewTapeEvent {
        step,
        kind,
        payload,
        checkpoint: None,
    }
}

async fn lanes(call: Call) -> Result<Reply, ApiError> {
    let tape = tape_of(&call).await?;
    let lanes = call.app.control.vms.tapes().lanes(&tape.id).await?;
    let lanes: Map<String, Value> = lanes
        .into_iter()
        .map(|(kind, count)| (kind, json!(count)))
        .collect();
    Ok(reply::json(StatusCode::OK, &json!({ "lanes": lanes })))
}

async fn export(call: Call) -> Result<Reply, ApiError> {
    let tape = tape_of(&call).await?;
    let events = call
        .app
        .control
        .vms
        .tapes()
        .events(&tape.id, 0, None, MOST_EVENTS);
    let events: Vec<Value> = events.await?.iter().map(shown_event).collect();
    let said = json!({
        "format": "thaw.tape/1",
        "tape": shown(&tape),
        "truncated": events.len() as i64 == MOST_EVENTS,
        "events": events,
    });
    Ok(reply::json(StatusCode::OK, &said))
}

async fn diff(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let (from, to) =
        call.query(|fields| (fields.int("from", 1, 1, STEP), fields.int("to", 1, 1, STEP)))?;
    let tape = call.path("tape_id");
    let vms = &call.app.control.vms;
    let changes = vms.tape_diff(&caller.tenant, caller.limits, tape, from, to);
    let changes = changes.await?;
    let told = changes
        .iter()
        .filter(|one| one.kind != "directory" || one.how != How::Changed);
    let paths: Vec<&str> = told.map(|one| one.path.as_str()).collect();
    let said = json!({
        "tape_id": tape, "from_step": from, "to_step": to, "mode": "fs",
        "changed_paths": paths, "changes": changes,
    });
    Ok(reply::json(StatusCode::OK, &said))
}

async fn branch(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_body().await?;
    let (step, live) = body.fields(|fields| {
        fields.must_be_given("at_step");
        let step = fields.int("at_step", 1, 1, STEP);
        (
            step,
            fields.choice("mode", &[("live", true), ("replay", false)], true),
        )
    })?;
    if !live {
        let why = "this server replays no network traffic, because its guests have none; branch with mode live";
        return Err(ApiError::new(StatusCode::CONFLICT, why.to_owned()));
    }
    let vms = &call.app.control.vms;
    let branched = vms.branch(&caller.tenant, caller.limits, call.path("tape_id"), step);
    let (tape, vm) = branched.await?;
    let said = json!({
        "tape_id": tape.id,
        "parent_tape_id": call.path("tape_id"),
        "parent_step_id": step,
        "status": tape.status,
        "vm_id": vm.vm_id,
        "session_id": vm.session_id,
    });
    Ok(reply::json(StatusCode::OK, &said))
}

async fn rewind(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_body().await?;
    let step = body.fields(|fields| {
        fields.must_be_given("to_step");
        fields.int("to_step", 1, 1, STEP)
    })?;
    let tape = call.path("tape_id");
    let rewound = call
        .app
        .control
        .vms
        .rewind(&caller.tenant, caller.limits, tape, step);
    let (vm, here) = rewound.await?;
    let said = json!({
        "tape_id": tape, "to_step": step, "step_id": here, "vm": vms::shown(&vm),
        "vm_id": vm.vm_id, "session_id": vm.session_id,
    });
    Ok(reply::json(StatusCode::OK, &said))
}

async fn tape_of(call: &Call) -> Result<TapeRow, ApiError> {
    let caller = call.caller()?;
    let tapes = call.app.control.vms.tapes();
    Ok(tapes.get(&caller.tenant, call.path("tape_id")).await?)
}
