//! Sessions looked at from outside: usage, lists, addresses; and a user's usage by day.

use std::collections::BTreeMap;

use hyper::StatusCode;
use jiff::civil::Date;
use jiff::{Timestamp, ToSpan, tz::TimeZone};
use serde_json::{Map, Value, json};

use super::sessions::{session_of, vm_of};
use super::{Access, Endpoint, Group, Query, QueryKind, Takes};
use crate::http::app::Call;
use crate::http::error::ApiError;
use crate::http::openapi::{array, nullable, object, or_null, text, time, uuid};
use crate::http::reply::{self, Reply, iso_system};
use crate::session::SessionView;
use crate::store::now_ms;
use crate::vms::VmRecord;

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "GET",
            path: "/v1/sessions/usage/{session_id}",
            name: "get_session_usage",
            summary: "What a session's VM has used so far",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "SessionUsage",
            refuses: &[404],
            handler: |call| Box::pin(usage(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/sessions/sandboxes",
            name: "list_sandboxes",
            summary: "Your sessions, newest first",
            access: Access::Key,
            query: &[
                Query {
                    name: "metadata",
                    kind: QueryKind::Text,
                    help: "A JSON object: only sessions whose metadata has all of its pairs",
                },
                Query {
                    name: "limit",
                    kind: QueryKind::Int(100, 1, 1000),
                    help: "How many at most",
                },
            ],
            takes: Takes::Nothing,
            gives: "Sandboxes",
            refuses: &[],
            handler: |call| Box::pin(sandboxes(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/sessions/app-url/{session_id}",
            name: "get_session_app_url",
            summary: "The address of a port in the guest: guests have no network yet",
            access: Access::Key,
            query: &[Query {
                name: "port",
                kind: QueryKind::Int(80, 1, 65_535),
                help: "The port",
            }],
            takes: Takes::Nothing,
            gives: "",
            refuses: &[404, 409],
            handler: |call| Box::pin(app_url(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/users/me/usage-breakdown",
            name: "get_usage_breakdown",
            summary: "What your VMs have used, by day, as far as their records go back",
            access: Access::Key,
            query: &[
                Query {
                    name: "days",
                    kind: QueryKind::Int(30, 1, 365),
                    help: "How many days, today included",
                },
                Query {
                    name: "start_date",
                    kind: QueryKind::Text,
                    help: "The first day, such as 2026-01-31, instead of `days`",
                },
                Query {
                    name: "end_date",
                    kind: QueryKind::Text,
                    help: "The last day; today when absent",
                },
            ],
            takes: Takes::Nothing,
            gives: "UsageBreakdown",
            refuses: &[],
            handler: |call| Box::pin(breakdown(call)),
        },
    ],
    schemas,
};

fn schemas() -> Vec<(&'static str, Value)> {
    let number = || json!({ "type": "number" });
    let integer = || json!({ "type": "integer" });
    let day = object(
        &["date"],
        json!({
            "date": text(), "vm_hours": number(), "ram_gib_hours": number(),
            "cpu_hours": nullable("number"), "cost_dollars": nullable("number"),
        }),
    );
    vec![
        (
            "SessionUsage",
            object(
                &["session_id", "commands_run"],
                json!({
                    "session_id": uuid(), "vm_id": nullable("string"), "vm_status": nullable("string"),
                    "cpu_seconds": nullable("number"), "memory_bytes": nullable("integer"),
                    "memory_mb": integer(), "vcpu_count": integer(), "uptime_seconds": nullable("number"),
                    "commands_run": integer(),
                }),
            ),
        ),
        (
            "Sandbox",
            object(
                &["session_id"],
                json!({
                    "session_id": uuid(), "vm_id": nullable("string"), "status": nullable("string"),
                    "created_at": time(), "expires_at": or_null(time()), "metadata": { "type": "object" },
                    "memory_mb": integer(), "vcpu_count": integer(), "vm_lifetime_seconds": integer(),
                }),
            ),
        ),
        ("Sandboxes", array("Sandbox")),
        (
            "UsageBreakdown",
            object(
                &["totals", "daily_breakdown"],
                json!({
                    "period_start": text(), "period_end": text(), "total_days": integer(),
                    "totals": object(&[], json!({
                        "vm_hours": number(), "ram_gib_hours": number(), "cpu_hours": nullable("number"),
                        "cost_dollars": nullable("number"),
                    })),
                    "daily_breakdown": { "type": "array", "items": day },
                }),
            ),
        ),
    ]
}

async fn usage(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let id = session_of(&call, &caller.tenant)?;
    let sessions = call.app.control.vms.sessions();
    let used = sessions.usage(&caller.tenant, &id).await?;
    let (vm_id, status) = vm_of(&used.view);
    let figures = used.figures;
    let said = json!({
        "session_id": id.to_string(),
        "vm_id": vm_id,
        "vm_status": status,
        "cpu_seconds": figures.map(|figures| figures.cpu.as_secs_f64()),
        "memory_bytes": figures.map(|figures| figures.memory_bytes),
        "memory_mb": used.view.spec.memory_mib,
        "vcpu_count": used.view.spec.vcpus,
        "uptime_seconds": used.view.uptime.map(|uptime| uptime.as_secs_f64()),
        "commands_run": used.commands,
    });
    Ok(reply::json(StatusCode::OK, &said))
}

async fn sandboxes(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let (wanted, limit) = call.query(|fields| {
        let text = fields
            .optional_string("metadata")
            .filter(|text| !text.is_empty());
        let wanted = text.map(|text| serde_json::from_str::<Map<String, Value>>(&text));
        if let Some(Err(error)) = &wanted {
            let why = format!("metadata is no JSON object: {error}");
            fields.value_error(&["metadata"], &why);
        }
        let limit = fields.int("limit", 100, 1, 1000);
        (
            wanted.and_then(Result::ok),
            usize::try_from(limit).unwrap_or(100),
        )
    })?;
    let all = call.app.control.vms.sessions().of_tenant(&caller.tenant);
    let fits = |view: &SessionView| match &wanted {
        Some(wanted) => wanted
            .iter()
            .all(|(name, value)| view.spec.metadata.get(name) == Some(value)),
        None => true,
    };
    let found = all.iter().filter(|view| fits(view)).take(limit);
    let shown: Vec<Value> = found.map(sandbox).collect();
    Ok(reply::json(StatusCode::OK, &shown))
}

fn sandbox(view: &SessionView) -> Value {
    let (vm_id, status) = vm_of(view);
    let expires = view
        .expires_in
        .map(|left| std::time::SystemTime::now() + left);
    json!({
        "session_id": view.id.to_string(),
        "vm_id": vm_id,
        "status": status,
        "created_at": iso_system(view.created_at),
        "expires_at": expires.map(iso_system),
        "metadata": view.spec.metadata,
        "memory_mb": view.spec.memory_mib,
        "vcpu_count": view.spec.vcpus,
        "vm_lifetime_seconds": view.spec.lifetime.as_secs(),
    })
}

async fn app_url(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    session_of(&call, &caller.tenant)?;
    call.query(|fields| fields.int("port", 80, 1, 65_535))?;
    Err(ApiError::new(
        StatusCode::CONFLICT,
        "guests of this server have no network yet, so no port of theirs can be reached",
    ))
}

async fn breakdown(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let today = Timestamp::now().to_zoned(TimeZone::UTC).date();
    let (first, last) = call.query(|fields| {
        let days = fields.int("days", 30, 1, 365);
        let mut day = |name: &str| {
            let text = fields
                .optional_string(name)
                .filter(|text| !text.is_empty())?;
            let date = text.get(..10).unwrap_or(&text).parse::<Date>();
            if date.is_err() {
                fields.value_error(&[name], "a date is written as 2026-01-31");
            }
            date.ok()
        };
        let (start, end) = (day("start_date"), day("end_date"));
        let last = end.unwrap_or(today).min(today);
        let first = start.or_else(|| last.checked_sub((days - 1).days()).ok());
        (first.unwrap_or(last).min(last), last)
    })?;
    // A year at most, whatever the dates.
    let first = first.max(last.checked_sub(364.days()).unwrap_or(first));
    let mut days: BTreeMap<Date, (f64, f64)> = BTreeMap::new();
    let mut day = first;
    while day <= last {
        days.insert(day, (0.0, 0.0));
        match day.tomorrow() {
            Ok(next) => day = next,
            Err(_) => break,
        }
    }
    for record in call.app.control.vms.list(&caller.tenant, false) {
        spread(&record, &mut days);
    }
    let shown: Vec<Value> = days
        .iter()
        .map(|(date, (hours, gib_hours))| {
            json!({
                "date": date.to_string(), "vm_hours": hours, "ram_gib_hours": gib_hours,
                "cpu_hours": null, "cost_dollars": null,
            })
        })
        .collect();
    let sum = |of: fn(&(f64, f64)) -> f64| days.values().map(of).sum::<f64>();
    let said = json!({
        "period_start": first.to_string(),
        "period_end": last.to_string(),
        "total_days": days.len(),
        "totals": {
            "vm_hours": sum(|day| day.0), "ram_gib_hours": sum(|day| day.1), "cpu_hours": null, "cost_dollars": null,
        },
        "daily_breakdown": shown,
    });
    Ok(reply::json(StatusCode::OK, &said))
}

/// Adds the hours that a VM ran to the days that it ran on.
fn spread(record: &VmRecord, days: &mut BTreeMap<Date, (f64, f64)>) {
    let Some(start) = record.started_ms else {
        return;
    };
    let end = record.ended_ms.unwrap_or_else(now_ms);
    let gib = f64::from(record.memory_mib) / 1024.0;
    for (date, sums) in days.iter_mut() {
        let bounds = date
            .to_zoned(TimeZone::UTC)
            .and_then(|zoned| Ok((zoned.timestamp(), zoned.tomorrow()?.timestamp())));
        let Ok((from, to)) = bounds else { continue };
        let ran = end.min(to.as_millisecond()) - start.max(from.as_millisecond());
        if ran > 0 {
            let hours = ran as f64 / 3_600_000.0;
            sums.0 += hours;
            sums.1 += hours * gib;
        }
    }
}
