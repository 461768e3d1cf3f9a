//! `GET /v1/users/me` and `POST /token`.

use hyper::StatusCode;
use serde_json::json;

use super::{Access, Endpoint, Group, Takes};
use crate::audit::Event;
use crate::http::app::Call;
use crate::http::auth::Refusal;
use crate::http::body::password_form;
use crate::http::error::ApiError;
use crate::http::openapi::{nullable, object, text, truth, uuid};
use crate::http::reply::{self, Reply};

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "GET",
            path: "/v1/users/me",
            name: "get_current_user",
            summary: "Whose key this is",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "User",
            refuses: &[],
            handler: |call| Box::pin(me(call)),
        },
        Endpoint {
            method: "POST",
            path: "/token",
            name: "login_for_access_token",
            summary: "A bearer token for a user name and password (or one of the user's API keys)",
            access: Access::Open,
            query: &[],
            takes: Takes::Form("PasswordForm"),
            gives: "Token",
            refuses: &[401, 429],
            handler: |call| Box::pin(token(call)),
        },
    ],
    schemas: || {
        vec![
            (
                "User",
                object(
                    &["id", "name"],
                    json!({
                        "id": uuid(), "name": text(), "email": nullable("string"), "is_verified": truth(), "plan": text(),
                    }),
                ),
            ),
            (
                "PasswordForm",
                object(
                    &["username", "password"],
                    json!({
                        "grant_type": { "anyOf": [{ "type": "string", "pattern": "^password$" }, { "type": "null" }] },
                        "username": text(), "password": { "type": "string", "format": "password" }, "scope": text(),
                    }),
                ),
            ),
            (
                "Token",
                object(
                    &["access_token", "token_type"],
                    json!({
                        "access_token": text(), "token_type": text(), "expires_in": { "type": "integer" },
                    }),
                ),
            ),
        ]
    },
};

pub(super) async fn me(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let user = &caller.user;
    let shown = json!({
        "id": user.id,
        "name": user.name,
        "email": user.email,
        "is_verified": true,
        "plan": user.plan,
    });
    Ok(reply::json(StatusCode::OK, &shown))
}

pub(super) async fn token(mut call: Call) -> Result<Reply, ApiError> {
    let (name, password) = password_form(&call.strangers_bytes().await?)?;
    let token = call.app.auth.log_in(&name, &password).await;
    // Only of users that there are: others' names are whatever somebody typed.
    if let Some(known) = call.app.auth.directory().by_user_name(&name) {
        let event = Event {
            kind: "login.token",
            failed: token.is_err(),
            ..Event::default()
        };
        call.app.control.vms.audit().note(&known.tenant, event);
    }
    let token = token.map_err(|refusal| {
        call.app.metrics.refused.inc();
        match refusal {
            Refusal::TooManyLogins => refusal.into(),
            _ => ApiError::new(StatusCode::UNAUTHORIZED, "Incorrect username or password"),
        }
    })?;
    let shown = json!({
        "access_token": token,
        "token_type": "bearer",
        "expires_in": call.app.auth.token_lifetime_s(),
    });
    let mut reply = reply::json(StatusCode::OK, &shown);
    let no_store = hyper::header::HeaderValue::from_static("no-store");
    reply
        .headers_mut()
        .insert(hyper::header::CACHE_CONTROL, no_store);
    Ok(reply)
}
