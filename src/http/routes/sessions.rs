//! `/v1/sessions/…` and `POST /kill`.

use std::time::Duration;

use hyper::StatusCode;
use serde_json::json;

use super::{Access, Endpoint, Group, Takes};
use crate::audit::Event;
use crate::http::app::Call;
use crate::http::auth::{Presented, presented};
use crate::http::body::Body;
use crate::http::error::ApiError;
use crate::http::openapi::{nullable, object, or_null, text, time, truth, uuid};
use crate::http::reply::{self, Reply, iso_system};
use crate::session::{SessionId, SessionView, TenantId, VmStatus};

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "POST",
            path: "/v1/sessions/session",
            name: "create_session",
            summary: "Make a session; its VM comes with its first command",
            access: Access::KeyOrBody,
            query: &[],
            takes: Takes::Json("SessionRequest"),
            gives: "SessionCreated",
            refuses: &[503],
            handler: |call| Box::pin(create(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/sessions/session/{session_id}",
            name: "get_session",
            summary: "What a session was made with",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Session",
            refuses: &[404],
            handler: |call| Box::pin(get(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/sessions/status/{session_id}",
            name: "get_session_status",
            summary: "Whether a session's VM runs",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "SessionStatus",
            refuses: &[404],
            handler: |call| Box::pin(status(call)),
        },
        Endpoint {
            method: "POST",
            path: "/kill",
            name: "kill_vm",
            summary: "End a session's VM; the session stays",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("KillRequest"),
            gives: "Killed",
            refuses: &[400, 404],
            handler: |call| Box::pin(kill(call)),
        },
    ],
    schemas: || {
        vec![
            (
                "SessionRequest",
                object(
                    &[],
                    json!({
                        "api_key": nullable("string"),
                        "vm_lifetime_seconds": { "type": "integer", "minimum": 20, "maximum": 86400, "default": 300 },
                        "memory_mb": { "type": "integer", "minimum": 128, "maximum": 8192, "default": 512 },
                        "vcpu_count": or_null(json!({ "type": "integer", "enum": [1, 2, 4, 6, 8] })),
                        "metadata": nullable("object"),
                        "env": or_null(json!({ "type": "object", "additionalProperties": text() })),
                    }),
                ),
            ),
            (
                "SessionCreated",
                object(&["session_id"], json!({ "session_id": uuid() })),
            ),
            (
                "Session",
                object(
                    &["session_id"],
                    json!({
                        "session_id": uuid(), "created_at": time(), "vm_lifetime_seconds": { "type": "integer" },
                        "memory_mb": { "type": "integer" }, "vcpu_count": { "type": "integer" },
                        "metadata": { "type": "object" }, "env": { "type": "array", "items": text() },
                        "vm_id": nullable("string"), "vm_status": nullable("string"),
                    }),
                ),
            ),
            (
                "SessionStatus",
                object(
                    &["session_id", "exists"],
                    json!({
                        "session_id": uuid(), "exists": truth(), "vm_assigned": truth(), "vm_alive": truth(),
                        "vm_status": nullable("string"), "vm_id": nullable("string"),
                        "uptime_seconds": nullable("number"), "expires_in_seconds": nullable("number"),
                        "created_at": time(),
                    }),
                ),
            ),
            (
                "KillRequest",
                object(
                    &["session_id"],
                    json!({ "session_id": uuid(), "api_key": nullable("string") }),
                ),
            ),
            (
                "Killed",
                object(
                    &["success"],
                    json!({
                        "success": truth(), "message": text(), "vm_id": text(), "session_id": uuid(),
                    }),
                ),
            ),
        ]
    },
};

/// Clients send the key of this one request in its body.
pub(super) async fn create(mut call: Call) -> Result<Reply, ApiError> {
    let vm = call.app.config.vm.clone();
    let key_in_header = presented(&call.parts.headers) != Presented::Nothing;
    let (caller, request) = if key_in_header {
        let (caller, body) = call.caller_and_body().await?;
        (caller, body.session(true, &vm)?)
    } else {
        let body = Body::parse(&call.strangers_bytes().await?)?;
        let request = body.session(false, &vm)?;
        let key = body.api_key().unwrap_or_default();
        (call.admit(key)?, request)
    };
    let created = call
        .app
        .backend
        .create(&caller.tenant, caller.limits, request.spec);
    let id = created.await?;
    call.app.control.vms.audit().note(
        &caller.tenant,
        Event {
            kind: "session.created",
            session_id: Some(id.to_string()),
            ..Event::default()
        },
    );
    Ok(reply::json(
        StatusCode::OK,
        &json!({ "session_id": id.to_string() }),
    ))
}

pub(super) async fn get(call: Call) -> Result<Reply, ApiError> {
    let view = view(&call)?;
    let (vm_id, status) = vm_of(&view);
    let shown = json!({
        "session_id": view.id.to_string(),
        "created_at": iso_system(view.created_at),
        "vm_lifetime_seconds": view.spec.lifetime.as_secs(),
        "memory_mb": view.spec.memory_mib,
        "vcpu_count": view.spec.vcpus,
        "metadata": view.spec.metadata,
        // Values may be secrets; their owner knows them.
        "env": view.spec.env.keys().collect::<Vec<_>>(),
        "vm_id": vm_id,
        "vm_status": status,
    });
    Ok(reply::json(StatusCode::OK, &shown))
}

pub(super) async fn status(call: Call) -> Result<Reply, ApiError> {
    let view = view(&call)?;
    let (vm_id, status) = vm_of(&view);
    let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
    let shown = json!({
        "session_id": view.id.to_string(),
        "exists": true,
        "vm_assigned": vm_id.is_some(),
        "vm_alive": status == Some("active"),
        "vm_status": status,
        "vm_id": vm_id,
        "uptime_seconds": seconds(view.uptime),
        "expires_in_seconds": seconds(view.expires_in),
        "created_at": iso_system(view.created_at),
    });
    Ok(reply::json(StatusCode::OK, &shown))
}

pub(super) async fn kill(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_body().await?;
    let id = body.kill()?;
    let vm_id = call.app.backend.kill(&caller.tenant, &id).await?;
    let shown = json!({
        "success": true,
        "message": format!("VM {vm_id} killed"),
        "vm_id": vm_id,
        "session_id": id.to_string(),
    });
    Ok(reply::json(StatusCode::OK, &shown))
}

/// The session that the path names, if it is the tenant's.
pub(super) fn session_of(call: &Call, tenant: &TenantId) -> Result<SessionId, ApiError> {
    let id = path_id(call)?;
    call.app.backend.view(tenant, &id)?;
    Ok(id)
}

fn view(call: &Call) -> Result<SessionView, ApiError> {
    let caller = call.caller()?;
    let id = path_id(call)?;
    Ok(call.app.backend.view(&caller.tenant, &id)?)
}

pub(super) fn path_id(call: &Call) -> Result<SessionId, ApiError> {
    uuid::Uuid::try_parse(call.path("session_id"))
        .ok()
        .and_then(|id| SessionId::parse(&id.as_hyphenated().to_string()))
        .ok_or_else(|| ApiError::not_found("Session not found"))
}

pub(super) fn vm_of(view: &SessionView) -> (Option<&str>, Option<&'static str>) {
    match &view.vm {
        Some((id, status)) => {
            let status = match status {
                VmStatus::Active => "active",
                VmStatus::Killed => "killed",
                VmStatus::Failed => "failed",
                VmStatus::Suspended => "suspended",
            };
            (Some(id), Some(status))
        }
        None => (None, None),
    }
}
