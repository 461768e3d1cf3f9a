//! `/v1/snapshots`: frozen VMs.

use hyper::StatusCode;
use serde_json::{Value, json};

use super::{Access, Endpoint, Group, Query, QueryKind, Takes};
use crate::audit::Event;
use crate::http::app::Call;
use crate::http::error::ApiError;
use crate::http::openapi::{array, nullable, object, text, time, truth};
use crate::http::reply::{self, Reply, iso_ms};
use crate::snapshots::{Status, View};
use crate::vms::How;

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "GET",
            path: "/v1/snapshots",
            name: "list_snapshots",
            summary: "Snapshots, newest first",
            access: Access::Key,
            query: &[Query {
                name: "type",
                kind: QueryKind::Text,
                help: "`user` or `system`; there are none of the system here",
            }],
            takes: Takes::Nothing,
            gives: "Snapshots",
            refuses: &[],
            handler: |call| Box::pin(list(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/snapshots",
            name: "build_snapshot",
            summary: "Building from an OCI image: not on this server",
            access: Access::Key,
            query: &[],
            takes: Takes::OptionalJson("SnapshotBuildRequest"),
            gives: "",
            refuses: &[409],
            handler: |call| Box::pin(build(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/snapshots/{snapshot_id}",
            name: "get_snapshot",
            summary: "One snapshot, and how far it is",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Snapshot",
            refuses: &[404],
            handler: |call| Box::pin(get(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/snapshots/{snapshot_id}/diff",
            name: "diff_snapshots",
            summary: "Files that differ between two snapshots: both are restored for a moment and list theirs",
            access: Access::Key,
            query: &[Query {
                name: "to",
                kind: QueryKind::Required,
                help: "The snapshot to compare with",
            }],
            takes: Takes::Nothing,
            gives: "SnapshotDiff",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(diff(call)),
        },
        Endpoint {
            method: "DELETE",
            path: "/v1/snapshots/{snapshot_id}",
            name: "delete_snapshot",
            summary: "Remove a snapshot; VMs restored from it go on running",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "SnapshotDeleted",
            refuses: &[404, 409],
            handler: |call| Box::pin(delete(call)),
        },
    ],
    schemas: || {
        vec![
            (
                "Snapshot",
                object(
                    &["id", "snapshot_id", "status"],
                    json!({
                        "id": text(), "snapshot_id": text(), "name": text(),
                        "status": { "type": "string", "enum": ["building", "ready", "failed"] },
                        "type": text(), "is_public": truth(), "created_at": time(),
                        "error": nullable("string"), "oci_image": nullable("string"),
                        "size_bytes": { "type": "integer" }, "memory_mb": { "type": "integer" },
                        "vcpu_count": { "type": "integer" }, "vm_id": text(), "session_id": text(),
                        "image": text(), "parent_snapshot_id": nullable("string"),
                    }),
                ),
            ),
            ("Snapshots", array("Snapshot")),
            (
                "SnapshotDiff",
                object(
                    &["from", "to", "added", "removed", "changed", "changes"],
                    json!({
                        "from": text(), "to": text(), "added": { "type": "integer" },
                        "removed": { "type": "integer" }, "changed": { "type": "integer" },
                        "changes": { "type": "array", "items": object(
                            &["path", "how", "kind"],
                            json!({
                                "path": text(), "kind": text(),
                                "how": { "type": "string", "enum": ["added", "removed", "changed"] },
                                "bytes_before": nullable("integer"), "bytes_after": nullable("integer"),
                            }),
                        ) },
                    }),
                ),
            ),
            (
                "SnapshotBuildRequest",
                object(
                    &[],
                    json!({ "oci_image": text(), "name": nullable("string") }),
                ),
            ),
            (
                "SnapshotDeleted",
                object(
                    &["success", "id"],
                    json!({ "success": truth(), "id": text(), "status": text() }),
                ),
            ),
        ]
    },
};

/// A snapshot as clients see it.
pub(super) fn shown(view: &View) -> Value {
    let manifest = &view.manifest;
    let (status, error) = match &view.status {
        Status::Building => ("building", None),
        Status::Ready => ("ready", None),
        Status::Failed(why) => ("failed", Some(why)),
    };
    json!({
        "id": manifest.id,
        "snapshot_id": manifest.id,
        "name": manifest.name,
        "status": status,
        "type": "user",
        "is_public": false,
        "created_at": iso_ms(manifest.created_ms),
        "error": error,
        "oci_image": null,
        "size_bytes": manifest.disk_bytes,
        "memory_mb": manifest.memory_mib,
        "vcpu_count": manifest.vcpus,
        "vm_id": manifest.vm_id,
        "session_id": manifest.session_id,
        "image": manifest.image_name,
        "parent_snapshot_id": manifest.parent,
    })
}

async fn diff(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let to = call.query(|fields| fields.required_string("to"))?;
    let (from, to) = (call.path("snapshot_id"), to.unwrap_or_default());
    let vms = &call.app.control.vms;
    let changes = vms.changed_files(&caller.tenant, caller.limits, from, &to);
    let changes = changes.await?;
    let count = |how| changes.iter().filter(|change| change.how == how).count();
    let said = json!({
        "from": from, "to": to,
        "added": count(How::Added), "removed": count(How::Removed), "changed": count(How::Changed),
        "changes": changes,
    });
    Ok(reply::json(StatusCode::OK, &said))
}

async fn list(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let kind = call.query(|fields| fields.optional_string("type"))?;
    let all: Vec<Value> = match kind.as_deref() {
        None | Some("" | "user" | "all") => {
            let found = call.app.control.vms.snapshots().list(&caller.tenant);
            found.iter().map(shown).collect()
        }
        Some(_) => Vec::new(),
    };
    Ok(reply::json(StatusCode::OK, &all))
}

async fn build(mut call: Call) -> Result<Reply, ApiError> {
    call.caller_and_optional_body().await?;
    Err(ApiError::new(
        StatusCode::CONFLICT,
        "this server makes no images from OCI images: its operator builds one with `thaw image build`; \
         POST /v1/vms/{vm_id}/snapshot freezes a VM that runs",
    ))
}

async fn get(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let snapshots = call.app.control.vms.snapshots();
    let view = snapshots.get(&caller.tenant, call.path("snapshot_id"))?;
    Ok(reply::json(StatusCode::OK, &shown(&view)))
}

async fn delete(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let vms = &call.app.control.vms;
    // A suspended VM's is not to be seen by this name.
    let view = vms
        .snapshots()
        .get(&caller.tenant, call.path("snapshot_id"))?;
    let gone = vms
        .snapshots()
        .delete(&caller.tenant, &view.manifest.id)
        .await?;
    vms.audit().note(
        &caller.tenant,
        Event {
            kind: "snapshot.deleted",
            vm_id: Some(gone.vm_id),
            session_id: Some(gone.session_id),
            resource: Some(("snapshot", gone.id.clone())),
            ..Event::default()
        },
    );
    let said = json!({ "success": true, "id": gone.id, "status": "deleted" });
    Ok(reply::json(StatusCode::OK, &said))
}
