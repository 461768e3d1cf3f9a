//! `/v1/audit/…`: who did what to whom.

use hyper::StatusCode;
use serde_json::{Value, json};

use super::{Access, Endpoint, Group, Query, QueryKind, Takes};
use crate::audit::CATALOG;
use crate::http::app::Call;
use crate::http::error::ApiError;
use crate::http::openapi::{array, nullable, object, text, time};
use crate::http::reply::{self, Reply, iso_ms};
use crate::store::{AuditFilter, AuditRow};

const fn only(name: &'static str, help: &'static str) -> Query {
    Query {
        name,
        kind: QueryKind::Text,
        help,
    }
}

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "GET",
            path: "/v1/audit/catalog",
            name: "audit_catalog",
            summary: "Every kind of event",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "AuditCatalog",
            refuses: &[],
            handler: |call| Box::pin(catalog(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/audit/events",
            name: "audit_events",
            summary: "What happened to you and yours, newest first",
            access: Access::Key,
            query: &[
                only("event_group", "Only this group, such as vm"),
                only("event_type", "Only this type, such as vm.started"),
                only("status", "Only success, or only failure"),
                only("user_id", "Only what this user did"),
                only("vm_id", "Only of this VM"),
                only("session_id", "Only of this session"),
                only("cursor", "Where an earlier page ended: its next_cursor"),
                Query {
                    name: "limit",
                    kind: QueryKind::Int(50, 1, 200),
                    help: "Events in a page",
                },
            ],
            takes: Takes::Nothing,
            gives: "AuditEvents",
            refuses: &[],
            handler: |call| Box::pin(events(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/audit/events/{event_id}",
            name: "audit_event",
            summary: "One event",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "AuditEvent",
            refuses: &[404],
            handler: |call| Box::pin(event(call)),
        },
    ],
    schemas: || {
        vec![
            (
                "AuditCatalog",
                object(
                    &["events", "groups"],
                    json!({
                        "groups": { "type": "array", "items": text() },
                        "events": { "type": "array", "items": object(
                            &["event_type", "event_group", "description"],
                            json!({ "event_type": text(), "event_group": text(), "description": text() }),
                        ) },
                    }),
                ),
            ),
            (
                "AuditEvent",
                object(
                    &["id", "created_at", "event_type", "status"],
                    json!({
                        "id": text(), "created_at": time(), "event_type": text(), "event_group": text(),
                        "status": { "type": "string", "enum": ["success", "failure"] },
                        "actor_type": text(), "actor_id": nullable("string"), "vm_id": nullable("string"),
                        "session_id": nullable("string"), "resource_type": nullable("string"),
                        "resource_id": nullable("string"), "detail": nullable("string"),
                    }),
                ),
            ),
            (
                "AuditEvents",
                object(
                    &["items", "next_cursor"],
                    json!({ "items": array("AuditEvent"), "next_cursor": nullable("string") }),
                ),
            ),
        ]
    },
};

fn shown(row: &AuditRow) -> Value {
    json!({
        "id": row.id,
        "created_at": iso_ms(row.created_ms),
        "event_type": row.event_type,
        "event_group": group(&row.event_type),
        "status": row.status,
        "actor_type": row.actor_type,
        "actor_id": row.actor_id,
        "vm_id": row.vm_id,
        "session_id": row.session_id,
        "resource_type": row.resource_type,
        "resource_id": row.resource_id,
        "detail": row.detail,
    })
}

fn group(kind: &str) -> &str {
    kind.split('.').next().unwrap_or(kind)
}

async fn catalog(call: Call) -> Result<Reply, ApiError> {
    call.caller()?;
    let mut groups: Vec<&str> = CATALOG.iter().map(|(kind, _)| group(kind)).collect();
    groups.dedup();
    let events: Vec<Value> = CATALOG
        .iter()
        .map(|(kind, text)| {
            json!({ "event_type": kind, "event_group": group(kind), "description": text })
        })
        .collect();
    let said = json!({ "groups": groups, "events": events });
    Ok(reply::json(StatusCode::OK, &said))
}

async fn events(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let filter = call.query(|fields| {
        let mut word = |name| fields.optional_string(name).filter(|text| !text.is_empty());
        let (event_group, event_type, status) =
            (word("event_group"), word("event_type"), word("status"));
        let (actor_id, vm_id, session_id) = (word("user_id"), word("vm_id"), word("session_id"));
        let cursor = word("cursor");
        let before = cursor.as_deref().map(str::parse::<i64>);
        if let Some(Err(_)) = before {
            fields.value_error(&["cursor"], "a cursor is what next_cursor said");
        }
        let limit = fields.int("limit", 50, 1, 200);
        AuditFilter {
            tenant: caller.tenant.0.clone(),
            event_group,
            event_type,
            status,
            actor_id,
            vm_id,
            session_id,
            before: before.and_then(Result::ok),
            // One more tells whether there is another page.
            limit: u32::try_from(limit).unwrap_or(50) + 1,
        }
    })?;
    let page = filter.limit as usize - 1;
    let rows = call.app.control.vms.audit().find(filter).await?;
    let next = (rows.len() > page).then(|| rows[page - 1].seq.to_string());
    let items: Vec<Value> = rows.iter().take(page).map(shown).collect();
    let said = json!({ "items": items, "next_cursor": next });
    Ok(reply::json(StatusCode::OK, &said))
}

async fn event(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let id = call.path("event_id").to_owned();
    let audit = call.app.control.vms.audit();
    let found = audit.get(&caller.tenant, id).await?;
    let row = found.ok_or_else(|| ApiError::not_found("no such event, or it is too old"))?;
    Ok(reply::json(StatusCode::OK, &shown(&row)))
}
