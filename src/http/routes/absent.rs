//! What the official client can ask for and this server does not have: lists are empty, everything
//! else is 404 with a reason. Nothing here is 5xx, which the client would take for an outage.

use hyper::StatusCode;
use serde_json::{Value, json};

use super::{Access, Endpoint, Group, Takes};
use crate::http::app::Call;
use crate::http::error::ApiError;
use crate::http::openapi::{nullable, object};
use crate::http::reply::{self, Reply};

/// Beginnings of paths, and why there is nothing behind them.
const ABSENT: &[(&str, &str)] = &[
    ("/v1/volumes", "this server has no volumes yet"),
    ("/v1/vaults", "this server has no vaults yet"),
    (
        "/v1/shares",
        "guests of this server have no network yet, so nothing of theirs can be shared",
    ),
    (
        "/v1/custom-domains",
        "guests of this server have no network yet, so no domain can lead to them",
    ),
    (
        "/v1/browser",
        "this server has no browsers; run one in a VM",
    ),
    ("/v1/computeruse", "this server has no desktops"),
    ("/v1/recordings", "this server does not record desktops"),
    (
        "/v1/webhooks",
        "this server sends no webhooks; GET /v1/audit/events tells what happened",
    ),
    ("/v1/credits", "this server bills nobody"),
    (
        "/v1/templates",
        "this server has no devbox templates; its operator builds images with `thaw image build`",
    ),
    (
        "/api/cli-auth",
        "this server has no log-in by browser; use `instavm auth set-key` with an API key",
    ),
];

/// Why there is nothing at this path, if it is one that the client knows.
pub(in crate::http) fn why(path: &str) -> Option<&'static str> {
    if path.starts_with("/v1/vms/") && path.contains("/volumes/") {
        return Some("this server has no volumes yet");
    }
    let found = ABSENT.iter().find(|(start, _)| {
        path.strip_prefix(start)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    });
    found.map(|(_, why)| *why)
}

const fn empty(path: &'static str, name: &'static str, gives: &'static str) -> Endpoint {
    Endpoint {
        method: "GET",
        path,
        name,
        summary: "An empty list: this server has none",
        access: Access::Key,
        query: &[],
        takes: Takes::Nothing,
        gives,
        refuses: &[],
        handler: |call| Box::pin(nothing(call)),
    }
}

/// A call at a path that has an empty list.
const fn refused(path: &'static str, name: &'static str) -> Endpoint {
    Endpoint {
        method: "POST",
        path,
        name,
        summary: "Not on this server: always 404, with the reason",
        access: Access::Key,
        query: &[],
        takes: Takes::OptionalJson("Anything"),
        gives: "",
        refuses: &[404],
        handler: |call| Box::pin(refuse(call)),
    }
}

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        empty("/v1/volumes", "list_volumes", "Objects"),
        refused("/v1/volumes", "create_volume"),
        empty("/v1/vaults", "list_vaults", "NoVaults"),
        refused("/v1/vaults", "create_vault"),
        empty("/v1/vaults/catalog", "vault_catalog", "NoTemplates"),
        empty("/v1/recordings", "list_recordings", "Objects"),
        empty("/v1/webhooks/endpoints", "list_webhooks", "Objects"),
        refused("/v1/webhooks/endpoints", "create_webhook"),
        empty(
            "/v1/webhooks/deliveries",
            "list_webhook_deliveries",
            "NoItems",
        ),
        empty("/v1/credits/usage", "list_credit_usage", "Objects"),
        empty("/v1/custom-domains", "list_custom_domains", "NoDomains"),
        refused("/v1/custom-domains", "create_custom_domain"),
        empty(
            "/v1/browser/sessions/",
            "list_browser_sessions",
            "NoSessions",
        ),
        refused("/v1/browser/sessions/", "create_browser_session"),
        refused("/v1/templates", "create_template"),
        refused("/v1/vms/{vm_id}/volumes", "mount_volume"),
        Endpoint {
            access: Access::Open,
            handler: |call| Box::pin(templates(call)),
            ..empty("/v1/templates", "list_templates", "NoTemplates")
        },
    ],
    schemas: || {
        let none = |name: &str| {
            let mut list = serde_json::Map::new();
            list.insert(name.to_owned(), json!({ "type": "array", "maxItems": 0 }));
            object(&[name], list.into())
        };
        let mut items = none("items");
        items["properties"]["next_cursor"] = nullable("string");
        vec![
            ("Anything", json!({})),
            (
                "Objects",
                json!({ "type": "array", "items": { "type": "object" } }),
            ),
            ("NoVaults", none("vaults")),
            ("NoTemplates", none("templates")),
            ("NoDomains", none("domains")),
            ("NoSessions", none("sessions")),
            ("NoItems", items),
        ]
    },
};

async fn nothing(call: Call) -> Result<Reply, ApiError> {
    call.caller()?;
    let path = call.parts.uri.path();
    let of = |end: &str| path.ends_with(end);
    let said: Value = if of("/vaults") {
        json!({ "vaults": [] })
    } else if of("/catalog") {
        json!({ "templates": [] })
    } else if of("/deliveries") {
        json!({ "items": [], "next_cursor": null })
    } else if of("/custom-domains") {
        json!({ "domains": [] })
    } else if of("/sessions/") {
        json!({ "sessions": [] })
    } else {
        json!([])
    };
    Ok(reply::json(StatusCode::OK, &said))
}

async fn templates(_call: Call) -> Result<Reply, ApiError> {
    Ok(reply::json(StatusCode::OK, &json!({ "templates": [] })))
}

async fn refuse(mut call: Call) -> Result<Reply, ApiError> {
    call.caller_and_optional_body().await?;
    let why = why(call.parts.uri.path()).unwrap_or("this server has no volumes yet");
    Err(ApiError::not_found(why))
}

#[cfg(test)]
mod tests {
    use super::why;

    #[test]
    fn the_reason_is_told_for_what_the_client_knows_and_for_nothing_else() {
        assert!(why("/v1/volumes/x/files").unwrap().contains("volumes"));
        assert!(why("/v1/volumesque").is_none());
        assert!(why("/v1/vms/x").is_none());
    }
}
