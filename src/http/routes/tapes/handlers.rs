//! What answers tapes' endpoints.

use hyper::StatusCode;
use serde_json::{Map, Value, json};

use super::super::{sessions, vms};
use super::{MOST_EVENTS, STEP};
use crate::http::app::Call;
use crate::http::body::fields::Fields;
use crate::http::error::ApiError;
use crate::http::reply::{self, Reply, iso_ms};
use crate::store::{NewTapeEvent, TapeEvent, TapeFilter, TapeRow};
use crate::vms::{How, payload};

/// Most bytes of what a client puts on a tape at a time: an output worth reading, not a file.
const MOST_PAYLOAD: usize = 64 << 10;

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

pub(super) async fn start(mut call: Call) -> Result<Reply, ApiError> {
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

pub(super) async fn list(call: Call) -> Result<Reply, ApiError> {
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

pub(super) async fn get(call: Call) -> Result<Reply, ApiError> {
    let tape = tape_of(&call).await?;
    Ok(reply::json(StatusCode::OK, &shown(&tape)))
}

pub(super) async fn delete(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let id = call.path("tape_id");
    let vms = &call.app.control.vms;
    vms.delete_tape(&caller.tenant, id).await?;
    Ok(reply::json(
        StatusCode::OK,
        &json!({ "success": true, "id": id }),
    ))
}

pub(super) async fn stop(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, _) = call.caller_and_optional_body().await?;
    let tapes = call.app.control.vms.tapes();
    let tape = tapes.stop(&caller.tenant, call.path("tape_id")).await?;
    Ok(reply::json(StatusCode::OK, &shown(&tape)))
}

pub(super) async fn events(call: Call) -> Result<Reply, ApiError> {
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

pub(super) async fn append(mut call: Call) -> Result<Reply, ApiError> {
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

pub(super) async fn lanes(call: Call) -> Result<Reply, ApiError> {
    let tape = tape_of(&call).await?;
    let lanes = call.app.control.vms.tapes().lanes(&tape.id).await?;
    let lanes: Map<String, Value> = lanes
        .into_iter()
        .map(|(kind, count)| (kind, json!(count)))
        .collect();
    Ok(reply::json(StatusCode::OK, &json!({ "lanes": lanes })))
}

pub(super) async fn export(call: Call) -> Result<Reply, ApiError> {
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

pub(super) async fn diff(call: Call) -> Result<Reply, ApiError> {
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

pub(super) async fn branch(mut call: Call) -> Result<Reply, ApiError> {
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

pub(super) async fn rewind(mut call: Call) -> Result<Reply, ApiError> {
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
