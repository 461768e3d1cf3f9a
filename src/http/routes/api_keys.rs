//! `/v1/api-keys/`: a user's own keys.

use hyper::StatusCode;
use serde_json::{Value, json};

use super::{Access, Endpoint, Group, Takes};
use crate::audit::Event;
use crate::http::app::Call;
use crate::http::auth::{Caller, key};
use crate::http::error::ApiError;
use crate::http::openapi::{array, nullable, object, or_null, text, time, truth};
use crate::http::reply::{self, Reply, iso_ms};
use crate::store::KeyRow;

/// Most keys in force that one user may have by this way; the operator's `thaw key` has no limit.
const MOST_KEYS: usize = 100;

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "GET",
            path: "/v1/api-keys/",
            name: "list_api_keys",
            summary: "Your keys in force; the keys themselves are not known",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "ApiKeys",
            refuses: &[],
            handler: |call| Box::pin(list(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/api-keys/",
            name: "create_api_key",
            summary: "Make a key; it is shown in this reply and never again",
            access: Access::Key,
            query: &[],
            takes: Takes::OptionalJson("ApiKeyRequest"),
            gives: "ApiKeyCreated",
            refuses: &[],
            handler: |call| Box::pin(create(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/api-keys/{key_id}",
            name: "get_api_key",
            summary: "One of your keys",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "ApiKey",
            refuses: &[404],
            handler: |call| Box::pin(get(call)),
        },
        Endpoint {
            method: "PATCH",
            path: "/v1/api-keys/{key_id}",
            name: "update_api_key",
            summary: "Rename a key, or revoke it by is_active false",
            access: Access::Key,
            query: &[],
            takes: Takes::OptionalJson("ApiKeyChange"),
            gives: "ApiKey",
            refuses: &[404],
            handler: |call| Box::pin(update(call)),
        },
        Endpoint {
            method: "DELETE",
            path: "/v1/api-keys/{key_id}",
            name: "revoke_api_key",
            summary: "Revoke a key, at once and for good",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "ApiKeyRevoked",
            refuses: &[404],
            handler: |call| Box::pin(revoke(call)),
        },
    ],
    schemas,
};

fn schemas() -> Vec<(&'static str, Value)> {
    let name = || or_null(json!({ "type": "string", "maxLength": 200 }));
    let shown = || {
        json!({
            "id": text(), "name": text(), "prefix": text(), "created_at": time(),
            "last_used_at": or_null(time()), "is_active": truth(), "plan": nullable("string"),
        })
    };
    let mut created = shown();
    created["key"] = text();
    created["api_key"] = text();
    vec![
        ("ApiKeyRequest", object(&[], json!({ "name": name() }))),
        (
            "ApiKeyChange",
            object(
                &[],
                json!({ "name": name(), "is_active": nullable("boolean") }),
            ),
        ),
        ("ApiKey", object(&["id", "name", "is_active"], shown())),
        ("ApiKeys", array("ApiKey")),
        ("ApiKeyCreated", object(&["id", "name", "key"], created)),
        (
            "ApiKeyRevoked",
            object(
                &["success", "id"],
                json!({ "success": truth(), "id": text(), "status": text() }),
            ),
        ),
    ]
}

fn shown(call: &Call, row: &KeyRow) -> Value {
    let last_used = call.app.auth.directory().last_used(&row.id);
    json!({
        "id": row.id,
        "name": row.name,
        "prefix": row.lookup,
        "created_at": iso_ms(row.created_ms),
        "last_used_at": last_used.or(row.last_used_ms).map(iso_ms),
        "is_active": row.revoked_ms.is_none(),
        "plan": row.plan,
    })
}

async fn list(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let user = caller.user.id.clone();
    let rows = call
        .app
        .control
        .store
        .call(move |c| KeyRow::of_user(c, &user));
    let all: Vec<Value> = rows.await?.iter().map(|row| shown(&call, row)).collect();
    Ok(reply::json(StatusCode::OK, &all))
}

async fn create(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_optional_body().await?;
    let name = body.fields(|fields| super::name_field(fields, "name"))?;
    let secret = key::mint();
    let name = name.unwrap_or_else(|| "key".to_owned());
    // A key with a plan of its own begets keys of that plan: none leads out of it.
    let new = key::row(&secret, &caller.user.id, &name, caller.key_plan.as_deref());
    let user = caller.user.id.clone();
    let stored = call.app.control.store.call(move |c| {
        let transaction = c.transaction()?;
        if KeyRow::of_user(&transaction, &user)?.len() >= MOST_KEYS {
            return Ok(None);
        }
        let id = new.insert(&transaction)?;
        let row = KeyRow::get(&transaction, &user, &id)?;
        transaction.commit()?;
        Ok(row)
    });
    let Some(row) = stored.await? else {
        let detail = format!("{MOST_KEYS} keys are the most one user may have; revoke one first");
        return Err(ApiError::too_many(detail, 60));
    };
    reload(&call).await?;
    note(&call, &caller, "api_key.created", &row.id);
    let mut said = shown(&call, &row);
    said["key"] = secret.clone().into();
    said["api_key"] = secret.into();
    let mut reply = reply::json(StatusCode::OK, &said);
    let no_store = hyper::header::HeaderValue::from_static("no-store");
    reply
        .headers_mut()
        .insert(hyper::header::CACHE_CONTROL, no_store);
    Ok(reply)
}

async fn get(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let row = find(&call, &caller).await?;
    Ok(reply::json(StatusCode::OK, &shown(&call, &row)))
}

async fn update(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_optional_body().await?;
    let (name, active) = body.fields(|fields| {
        let name = super::name_field(fields, "name");
        (name, fields.optional_truth("is_active"))
    })?;
    let mut row = find(&call, &caller).await?;
    if let Some(name) = name {
        let (user, id, new) = (caller.user.id.clone(), row.id.clone(), name.clone());
        let renamed = call
            .app
            .control
            .store
            .call(move |c| KeyRow::rename(c, &user, &id, &new));
        if renamed.await? {
            row.name = name;
            note(&call, &caller, "api_key.updated", &row.id);
        }
    }
    if active == Some(false) {
        end(&call, &caller, &row.id).await?;
        row.revoked_ms = Some(crate::store::now_ms());
    }
    Ok(reply::json(StatusCode::OK, &shown(&call, &row)))
}

async fn revoke(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let id = call.path("key_id").to_owned();
    end(&call, &caller, &id).await?;
    let said = json!({ "success": true, "id": id, "status": "revoked" });
    Ok(reply::json(StatusCode::OK, &said))
}

/// Revokes a key; it is refused from the moment that this returns.
async fn end(call: &Call, caller: &Caller, id: &str) -> Result<(), ApiError> {
    let (user, key_id) = (caller.user.id.clone(), id.to_owned());
    let revoked = call
        .app
        .control
        .store
        .call(move |c| KeyRow::revoke_of(c, &user, &key_id));
    if !revoked.await? {
        return Err(unknown(id));
    }
    reload(call).await?;
    note(call, caller, "api_key.revoked", id);
    Ok(())
}

async fn find(call: &Call, caller: &Caller) -> Result<KeyRow, ApiError> {
    let (user, id) = (caller.user.id.clone(), call.path("key_id").to_owned());
    let found = call
        .app
        .control
        .store
        .call(move |c| KeyRow::get(c, &user, &id));
    found.await?.ok_or_else(|| unknown(call.path("key_id")))
}

fn unknown(id: &str) -> ApiError {
    ApiError::not_found(format!("no API key {id}; GET /v1/api-keys/ lists yours"))
}

/// Lets the change take effect: what this process writes, it is not told of.
async fn reload(call: &Call) -> Result<(), ApiError> {
    let reloaded = call.app.auth.reload().await;
    reloaded.map_err(|error| ApiError::internal(&format!("{error:#}")))
}

fn note(call: &Call, caller: &Caller, kind: &'static str, id: &str) {
    call.app.control.vms.audit().note(
        &caller.tenant,
        Event {
            kind,
            resource: Some(("api_key", id.to_owned())),
            ..Event::default()
        },
    );
}
