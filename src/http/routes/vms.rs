//! `/v1/vms` and `/v1/vms/{vm_id}`: VMs by themselves.

use hyper::StatusCode;
use serde_json::{Map, Value, json};

use super::egress::{self, Policy};
use super::{Access, Endpoint, Group, Query, QueryKind, Takes};
use crate::http::app::Call;
use crate::http::body::fields::Fields;
use crate::http::body::{Body, metadata, session_id, session_spec};
use crate::http::error::ApiError;
use crate::http::openapi::{nullable, object, or_null, text, time, truth, uuid};
use crate::http::reply::{self, Reply, iso_ms};
use crate::session::{SessionId, SessionSpec, TenantId};
use crate::vms::{NewVm, Options, VmChange, VmRecord};

/// Waits for the VM, or does not.
pub(super) const WAIT: Query = Query {
    name: "wait",
    kind: QueryKind::Flag(true),
    help: "Answer when it is done; false: answer at once, and let GET tell what came of it",
};

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "POST",
            path: "/v1/vms",
            name: "create_vm",
            summary: "Make a VM now, in a new session or in one that has none",
            access: Access::Key,
            query: &[WAIT],
            takes: Takes::OptionalJson("VmRequest"),
            gives: "Vm",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(create(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/vms",
            name: "list_vms",
            summary: "VMs that run, are being started, or are suspended",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Vms",
            refuses: &[],
            handler: |call| Box::pin(list(call, true)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/vms/",
            name: "list_vm_records",
            summary: "Records of all VMs, also of those that ended",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Vms",
            refuses: &[],
            handler: |call| Box::pin(list(call, false)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/vms/{vm_id}",
            name: "get_vm",
            summary: "One VM, also by an id from before it was resumed",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Vm",
            refuses: &[404],
            handler: |call| Box::pin(get(call)),
        },
        Endpoint {
            method: "PATCH",
            path: "/v1/vms/{vm_id}",
            name: "update_vm",
            summary: "Change what is wanted of a VM",
            access: Access::Key,
            query: &[],
            takes: Takes::OptionalJson("VmChange"),
            gives: "Vm",
            refuses: &[404, 409],
            handler: |call| Box::pin(update(call)),
        },
        Endpoint {
            method: "DELETE",
            path: "/v1/vms/{vm_id}",
            name: "delete_vm",
            summary: "End a VM; its session stays, and its record",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Vm",
            refuses: &[404, 409],
            handler: |call| Box::pin(delete(call)),
        },
    ],
    schemas,
};

fn schemas() -> Vec<(&'static str, Value)> {
    let integer = || json!({ "type": "integer" });
    let options = json!({
        "snapshot_on_terminate": nullable("boolean"),
        "snapshot_name": { "anyOf": [{ "type": "string", "maxLength": 200 }, { "type": "null" }] },
        "auto_suspend": nullable("boolean"),
        "auto_resume": nullable("boolean"),
        "metadata": nullable("object"),
        "vault_ids": or_null(json!({ "type": "array", "items": text() })),
    });
    let memory = json!({ "type": "integer", "minimum": 128, "maximum": 8192 });
    let mut wanted = json!({
        "session_id": or_null(uuid()),
        "vm_lifetime_seconds": or_null(json!({ "type": "integer", "minimum": 20, "maximum": 86400 })),
        "memory_mb": or_null(memory.clone()),
        "vcpu_count": or_null(json!({ "type": "integer", "enum": [1, 2, 4, 6, 8] })),
        "env": or_null(json!({ "type": "object", "additionalProperties": text() })),
        "snapshot_id": nullable("string"),
        "egress_policy": or_null(json!({ "$ref": "#/components/schemas/EgressRequest" })),
        "volumes": or_null(json!({ "type": "array", "items": { "type": "object" } })),
    });
    let mut change = json!({
        "memory_mb": or_null(memory),
        "vm_lifetime_seconds": wanted["vm_lifetime_seconds"].clone(),
    });
    if let (Some(options), Some(wanted), Some(change)) = (
        options.as_object(),
        wanted.as_object_mut(),
        change.as_object_mut(),
    ) {
        wanted.extend(options.clone());
        change.extend(options.clone());
    }
    vec![
        ("VmRequest", object(&[], wanted)),
        ("VmChange", object(&[], change)),
        (
            "Vm",
            object(
                &["vm_id", "session_id", "status"],
                json!({
                    "vm_id": text(), "session_id": uuid(),
                    "status": { "type": "string", "enum": ["creating", "active", "suspended", "terminated", "failed"] },
                    "created_at": time(), "started_at": or_null(time()), "expires_at": or_null(time()),
                    "ended_at": or_null(time()), "reason": nullable("string"),
                    "memory_mb": integer(), "vcpu_count": integer(), "vm_lifetime_seconds": integer(),
                    "metadata": { "type": "object" }, "snapshot_id": nullable("string"),
                    "snapshot_on_terminate": truth(), "snapshot_name": nullable("string"),
                    "auto_suspend": truth(), "auto_resume": truth(),
                    "previous_vm_ids": { "type": "array", "items": text() },
                    "ssh_host": nullable("string"), "devbox_name": nullable("string"),
                    "devbox_template_slug": nullable("string"),
                }),
            ),
        ),
        ("Vms", crate::http::openapi::array("Vm")),
    ]
}

/// A VM as clients see it.
pub(super) fn shown(record: &VmRecord) -> Value {
    let options = &record.options;
    json!({
        "vm_id": record.vm_id,
        "session_id": record.session_id,
        "status": record.status.name(),
        "created_at": iso_ms(record.created_ms),
        "started_at": record.started_ms.map(iso_ms),
        "expires_at": record.expires_ms.map(iso_ms),
        "ended_at": record.ended_ms.map(iso_ms),
        "reason": record.reason,
        "memory_mb": record.memory_mib,
        "vcpu_count": record.vcpus,
        "vm_lifetime_seconds": record.lifetime_s,
        "metadata": record.metadata,
        "snapshot_id": record.snapshot_id,
        "snapshot_on_terminate": options.snapshot_on_terminate,
        "snapshot_name": options.snapshot_name,
        "auto_suspend": options.auto_suspend,
        "auto_resume": options.auto_resume,
        "previous_vm_ids": record.aliases,
        // Guests have no network yet.
        "ssh_host": null,
        "devbox_name": null,
        "devbox_template_slug": null,
    })
}

/// What a body asks for, before it is known whether it can be had.
struct Asked {
    session: Option<SessionId>,
    spec: Option<SessionSpec>,
    options: Options,
    snapshot: Option<String>,
    memory: bool,
    volumes: Vec<String>,
    vaults: Vec<String>,
    egress: Option<Policy>,
}

async fn create(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_optional_body().await?;
    let body = body.without_nulls();
    let wait = call.query(|fields| fields.flag("wait", true))?;
    let vms = &call.app.control.vms;
    let tenant = &caller.tenant;
    let session = body.fields(session_id)?;
    let base = match &session {
        Some(id) => (*vms.sessions().spec(tenant, id)?).clone(),
        None => base(&call),
    };
    let asked = body.fields(|fields| read(fields, base))?;
    if let Some(vault) = asked.vaults.first() {
        return Err(ApiError::not_found(format!("no vault {vault}")));
    }
    if let Some(volume) = asked.volumes.first() {
        return Err(ApiError::not_found(format!("no volume {volume}")));
    }
    let Some(spec) = asked.spec else {
        return Err(ApiError::internal(&"a VM's body was not read"));
    };
    let new = NewVm {
        session: asked.session,
        spec,
        options: asked.options,
        snapshot: asked.snapshot,
        memory_asked: asked.memory,
    };
    let record = vms.create(tenant, caller.limits, new, wait).await?;
    if let Some(policy) = asked.egress {
        egress::store(&call, tenant, &format!("vm/{}", record.vm_id), &policy).await?;
    }
    Ok(reply::json(StatusCode::OK, &shown(&record)))
}

fn base(call: &Call) -> SessionSpec {
    let defaults = &call.app.config.vm;
    SessionSpec {
        lifetime: std::time::Duration::from_secs(defaults.lifetime_s),
        memory_mib: defaults.memory_mib,
        vcpus: defaults.vcpus,
        metadata: Default::default(),
        env: Default::default(),
    }
}

fn read(fields: &mut Fields<'_>, base: SessionSpec) -> Asked {
    let session = session_id(fields);
    let memory = fields.given("memory_mb");
    let spec = session_spec(fields, base);
    let change = options(fields);
    let no_network = "guests of this server have no network yet";
    for (name, why) in [
        ("share", no_network),
        ("custom_domain", no_network),
        (
            "image_variant",
            "this server runs one image; see `thaw serve --image`",
        ),
    ] {
        if fields.given(name) {
            fields.value_error(&[name], &format!("{name} cannot be had: {why}"));
        }
    }
    Asked {
        session,
        spec: Some(spec),
        options: Options {
            snapshot_on_terminate: change.snapshot_on_terminate.unwrap_or(false),
            snapshot_name: change.snapshot_name.flatten(),
            auto_suspend: change.auto_suspend.unwrap_or(false),
            auto_resume: change.auto_resume.unwrap_or(false),
        },
        snapshot: fields.optional_string("snapshot_id"),
        memory,
        volumes: volumes(fields),
        vaults: fields.strings("vault_ids"),
        egress: fields
            .given("egress_policy")
            .then(|| egress::inner(fields, "egress_policy")),
    }
}

/// Names of the volumes asked for.
fn volumes(fields: &mut Fields<'_>) -> Vec<String> {
    let list = match fields.raw("volumes") {
        None => return Vec::new(),
        Some(Value::Array(list)) => list,
        Some(_) => {
            fields.value_error(&["volumes"], "volumes is a list of objects");
            return Vec::new();
        }
    };
    let name = |item: &Value| Some(item.get("volume_id")?.as_str()?.to_owned());
    let names: Vec<String> = list.iter().filter_map(name).collect();
    if names.len() < list.len() {
        fields.value_error(&["volumes"], "each volume is an object with a volume_id");
    }
    names
}

/// The settings that can be changed later, too.
fn options(fields: &mut Fields<'_>) -> VmChange {
    let name = super::name_field(fields, "snapshot_name");
    VmChange {
        snapshot_on_terminate: fields.optional_truth("snapshot_on_terminate"),
        snapshot_name: name.map(Some),
        auto_suspend: fields.optional_truth("auto_suspend"),
        auto_resume: fields.optional_truth("auto_resume"),
        ..VmChange::default()
    }
}

async fn list(call: Call, live: bool) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let found = call.app.control.vms.list(&caller.tenant, live);
    let all: Vec<Value> = found.iter().map(shown).collect();
    Ok(reply::json(StatusCode::OK, &all))
}

async fn get(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let record = call
        .app
        .control
        .vms
        .get(&caller.tenant, call.path("vm_id"))?;
    Ok(reply::json(StatusCode::OK, &shown(&record)))
}

async fn update(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_optional_body().await?;
    let body: Body = body.without_nulls();
    let (change, vaults) = body.fields(|fields| {
        let mut change = options(fields);
        change.metadata = metadata(fields);
        if fields.given("memory_mb") {
            let mib = fields.int("memory_mb", 0, 128, 8192);
            change.memory_mib = u32::try_from(mib).ok();
        }
        if fields.given("vm_lifetime_seconds") {
            let seconds = fields.int("vm_lifetime_seconds", 300, 20, 86_400);
            change.lifetime = Some(std::time::Duration::from_secs(seconds.unsigned_abs()));
        }
        (change, fields.strings("vault_ids"))
    })?;
    let vms = &call.app.control.vms;
    let vm_id = call.path("vm_id");
    known(vms.get(&caller.tenant, vm_id).is_ok(), vm_id)?;
    if let Some(vault) = vaults.first() {
        return Err(ApiError::not_found(format!("no vault {vault}")));
    }
    let record = vms.update(&caller.tenant, vm_id, change).await?;
    Ok(reply::json(StatusCode::OK, &shown(&record)))
}

async fn delete(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let vms = &call.app.control.vms;
    let record = vms.delete(&caller.tenant, call.path("vm_id")).await?;
    Ok(reply::json(StatusCode::OK, &shown(&record)))
}

fn known(is: bool, vm_id: &str) -> Result<(), ApiError> {
    match is {
        true => Ok(()),
        false => Err(ApiError::not_found(format!("no VM {vm_id}"))),
    }
}

/// The tenant's VM, for calls about something that belongs to it.
pub(super) fn vm_of(call: &Call, tenant: &TenantId) -> Result<VmRecord, ApiError> {
    Ok(call.app.control.vms.get(tenant, call.path("vm_id"))?)
}

/// An object with other fields beside those of a VM.
pub(super) fn with(record: &VmRecord, more: Value) -> Value {
    let mut all: Map<String, Value> = match shown(record) {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    if let Value::Object(more) = more {
        all.extend(more);
    }
    Value::Object(all)
}
