//! `/v1/sessions/…` and `POST /kill`.

use std::time::Duration;

use hyper::StatusCode;
use serde_json::json;

use crate::http::app::Call;
use crate::http::auth::{Presented, presented};
use crate::http::body::Body;
use crate::http::error::ApiError;
use crate::http::reply::{self, Reply, iso_system};
use crate::session::{SessionId, SessionView, VmStatus};

/// Clients send the key of this one request in its body.
pub(super) async fn create(mut call: Call) -> Result<Reply, ApiError> {
    let vm = call.app.config.vm.clone();
    let key_in_header = presented(&call.parts.headers) != Presented::Nothing;
    let (caller, request) = if key_in_header {
        let (caller, body) = call.caller_and_body().await?;
        (caller, body.session(true, &vm)?)
    } else {
        let body = Body::parse(&call.bytes().await?)?;
        let request = body.session(false, &vm)?;
        let key = body.api_key().unwrap_or_default();
        (call.admit(key)?, request)
    };
    let created = call
        .app
        .backend
        .create(&caller.tenant, caller.limits, request.spec);
    let id = created.await?;
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

fn view(call: &Call) -> Result<SessionView, ApiError> {
    let caller = call.caller()?;
    let id = uuid::Uuid::try_parse(&call.param)
        .ok()
        .and_then(|id| SessionId::parse(&id.as_hyphenated().to_string()))
        .ok_or_else(|| ApiError::not_found("Session not found"))?;
    Ok(call.app.backend.view(&caller.tenant, &id)?)
}

fn vm_of(view: &SessionView) -> (Option<&str>, Option<&'static str>) {
    match &view.vm {
        Some((id, status)) => {
            let status = match status {
                VmStatus::Active => "active",
                VmStatus::Killed => "killed",
                VmStatus::Failed => "failed",
            };
            (Some(id), Some(status))
        }
        None => (None, None),
    }
}
