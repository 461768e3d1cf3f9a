//! `/v1/vms/{vm_id}/…`: what is done to a VM.

use std::collections::BTreeMap;

use hyper::StatusCode;
use serde_json::{Value, json};

use super::vms::{WAIT, shown, vm_of, with};
use super::{Access, Endpoint, Group, Takes};
use crate::http::app::Call;
use crate::http::body::check_env;
use crate::http::body::fields::Fields;
use crate::http::error::ApiError;
use crate::http::openapi::{array, nullable, object, or_null, text, truth};
use crate::http::reply::{self, Reply};
use crate::vms::MOST_FORKS;

/// Most variables that one call stages.
const MOST_ENTRIES: usize = 256;

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "POST",
            path: "/v1/vms/{vm_id}/clone",
            name: "clone_vm",
            summary: "Copy a VM mid-flight into a session of its own",
            access: Access::Key,
            query: &[WAIT],
            takes: Takes::OptionalJson("CloneRequest"),
            gives: "ClonedVm",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(clone(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/vms/{vm_id}/snapshot",
            name: "snapshot_vm",
            summary: "Freeze a copy of a VM that runs, memory included; it goes on running",
            access: Access::Key,
            query: &[WAIT],
            takes: Takes::OptionalJson("SnapshotRequest"),
            gives: "Snapshot",
            refuses: &[404, 409],
            handler: |call| Box::pin(snapshot(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/vms/{vm_id}/suspend",
            name: "suspend_vm",
            summary: "Freeze a VM to disk and end it, to be resumed",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Vm",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(suspend(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/vms/{vm_id}/fork",
            name: "fork_vm",
            summary: "Live copies of a VM, mid-flight; it goes on running",
            access: Access::Key,
            query: &[WAIT],
            takes: Takes::OptionalJson("ForkRequest"),
            gives: "Forked",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(fork(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/vms/{vm_id}/resume",
            name: "resume_vm",
            summary: "Let a suspended VM go on, under a new id",
            access: Access::Key,
            query: &[WAIT],
            takes: Takes::Nothing,
            gives: "Vm",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(resume(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/vms/{vm_id}/stage-env",
            name: "stage_env",
            summary: "Variables for everything that runs in this VM from now on; kept in memory only",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("StageEnvRequest"),
            gives: "Staged",
            refuses: &[404, 409],
            handler: |call| Box::pin(stage_env(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/vms/{vm_id}/volumes",
            name: "list_vm_volumes",
            summary: "A VM's volumes: none yet",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Objects",
            refuses: &[404],
            handler: |call| Box::pin(volumes(call)),
        },
    ],
    schemas,
};

fn schemas() -> Vec<(&'static str, Value)> {
    let name = || or_null(json!({ "type": "string", "maxLength": 200 }));
    vec![
        (
            "CloneRequest",
            object(&[], json!({ "snapshot_name": name() })),
        ),
        (
            "ForkRequest",
            object(
                &[],
                json!({ "count": { "type": "integer", "minimum": 1, "maximum": MOST_FORKS, "default": 1 } }),
            ),
        ),
        (
            "Forked",
            object(
                &["vm_id", "requested", "created", "forks"],
                json!({
                    "vm_id": text(), "requested": { "type": "integer" }, "created": { "type": "integer" },
                    "pause_ms": nullable("number"),
                    "forks": { "type": "array", "items": { "anyOf": [
                        { "$ref": "#/components/schemas/Vm" },
                        object(&["status", "error"], json!({ "status": text(), "error": text() })),
                    ] } },
                }),
            ),
        ),
        ("SnapshotRequest", object(&[], json!({ "name": name() }))),
        (
            "ClonedVm",
            json!({
                "allOf": [
                    { "$ref": "#/components/schemas/Vm" },
                    object(
                        &["snapshot_id", "snapshot_deleted"],
                        json!({ "snapshot_id": nullable("string"), "snapshot_deleted": truth() }),
                    ),
                ],
            }),
        ),
        (
            "StageEnvRequest",
            object(&["entries"], json!({ "entries": array("StageEnvEntry") })),
        ),
        (
            "StageEnvEntry",
            object(
                &["env_name", "value"],
                json!({ "env_name": { "type": "string", "minLength": 1, "pattern": "^[^=\\x00]+$" }, "value": { "type": "string", "pattern": "^[^\\x00]*$" } }),
            ),
        ),
        (
            "Staged",
            object(
                &["success", "staged"],
                json!({ "success": truth(), "vm_id": text(), "staged": { "type": "array", "items": text() } }),
            ),
        ),
    ]
}

async fn clone(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_optional_body().await?;
    let name = body.fields(|fields| super::name_field(fields, "snapshot_name"))?;
    let wait = call.query(|fields| fields.flag("wait", true))?;
    let vms = &call.app.control.vms;
    let made = vms.clone_vm(
        &caller.tenant,
        caller.limits,
        call.path("vm_id"),
        name,
        wait,
    );
    let made = made.await?;
    let more = json!({ "snapshot_id": made.snapshot, "snapshot_deleted": made.snapshot.is_some() });
    Ok(reply::json(StatusCode::OK, &with(&made.vm, more)))
}

async fn fork(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_optional_body().await?;
    let count = body.fields(|fields| fields.int("count", 1, 1, MOST_FORKS.into()))?;
    let count = u32::try_from(count).unwrap_or(MOST_FORKS);
    let wait = call.query(|fields| fields.flag("wait", true))?;
    let vm_id = call.path("vm_id").to_owned();
    let vms = &call.app.control.vms;
    let forked = vms.fork(&caller.tenant, caller.limits, &vm_id, count, wait);
    let forked = forked.await?;
    let created = forked.copies.iter().filter(|copy| copy.is_ok()).count();
    let mut forks = Vec::with_capacity(forked.copies.len());
    for copy in forked.copies {
        match copy {
            Ok(vm) => forks.push(shown(&vm)),
            // Nothing came of it: an error like any other.
            Err(error) if created == 0 => return Err(error.into()),
            Err(error) => {
                let error = ApiError::from(error).detail();
                forks.push(json!({ "status": "failed", "error": error }));
            }
        }
    }
    let said = json!({
        "vm_id": vm_id,
        "requested": count,
        "created": created,
        "pause_ms": forked.pause.map(|pause| pause.as_secs_f64() * 1000.0),
        "forks": forks,
    });
    Ok(reply::json(StatusCode::OK, &said))
}

async fn snapshot(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_optional_body().await?;
    let name = body.fields(|fields| super::name_field(fields, "name"))?;
    let wait = call.query(|fields| fields.flag("wait", true))?;
    let vms = &call.app.control.vms;
    let made = vms
        .snapshot(&caller.tenant, call.path("vm_id"), name, wait)
        .await?;
    Ok(reply::json(StatusCode::OK, &super::snapshots::shown(&made)))
}

async fn suspend(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, _) = call.caller_and_optional_body().await?;
    let vms = &call.app.control.vms;
    let record = vms.suspend(&caller.tenant, call.path("vm_id")).await?;
    Ok(reply::json(StatusCode::OK, &shown(&record)))
}

async fn resume(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, _) = call.caller_and_optional_body().await?;
    let wait = call.query(|fields| fields.flag("wait", true))?;
    let vms = &call.app.control.vms;
    let record = vms
        .resume(&caller.tenant, caller.limits, call.path("vm_id"), wait)
        .await?;
    Ok(reply::json(StatusCode::OK, &shown(&record)))
}

async fn stage_env(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_body().await?;
    let env = body.fields(entries)?;
    let names: Vec<String> = env.keys().cloned().collect();
    let vms = &call.app.control.vms;
    let record = vms.stage_env(&caller.tenant, call.path("vm_id"), env)?;
    let said = json!({ "success": true, "vm_id": record.vm_id, "staged": names });
    Ok(reply::json(StatusCode::OK, &said))
}

/// The variables to stage. Whatever is wrong, values are not sent back.
fn entries(fields: &mut Fields<'_>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let list = match fields.raw("entries") {
        Some(Value::Array(list)) if list.len() <= MOST_ENTRIES => list,
        given => {
            let kind = if given.is_some() {
                "list_type"
            } else {
                "missing"
            };
            let msg = format!("a list of at most {MOST_ENTRIES} objects with env_name and value");
            fields.fault(&["entries"], kind, msg, Value::Null, None);
            return env;
        }
    };
    for item in list {
        let of = |name: &str| item.get(name).and_then(Value::as_str);
        match (of("env_name"), of("value")) {
            (Some(name), Some(value)) => {
                env.insert(name.to_owned(), value.to_owned());
            }
            _ => {
                let msg = "each entry has an env_name and a value, both texts";
                fields.fault(&["entries"], "dict_type", msg, Value::Null, None);
                return env;
            }
        }
    }
    check_env(fields, &env);
    env
}

async fn volumes(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    vm_of(&call, &caller.tenant)?;
    let none: [Value; 0] = [];
    Ok(reply::json(StatusCode::OK, &none))
}
