//! The OpenAPI document, made from [`ENDPOINTS`] and the schemas here.

use std::sync::OnceLock;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::routes::{Access, ENDPOINTS, Endpoint, Takes};

/// The document, made on first use.
pub fn document() -> Bytes {
    static DOCUMENT: OnceLock<Bytes> = OnceLock::new();
    DOCUMENT.get_or_init(|| build().to_string().into()).clone()
}

fn build() -> Value {
    let mut paths = Map::new();
    for endpoint in ENDPOINTS {
        let methods = paths.entry(endpoint.path).or_insert_with(|| json!({}));
        methods[endpoint.method.to_lowercase()] = operation(endpoint);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "thaw",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Short commands on warm microVMs.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "paths": paths,
        "components": {
            "schemas": schemas(),
            "securitySchemes": {
                "APIKeyHeader": { "type": "apiKey", "in": "header", "name": "X-API-Key" },
                "OAuth2PasswordBearer": {
                    "type": "oauth2",
                    "flows": { "password": { "scopes": {}, "tokenUrl": "token" } },
                },
            },
        },
    })
}

fn operation(endpoint: &Endpoint) -> Value {
    let mut responses = Map::new();
    let good = if endpoint.gives.contains('/') {
        json!({ "description": "Successful Response", "content": { endpoint.gives: {} } })
    } else {
        reply("Successful Response", endpoint.gives)
    };
    responses.insert("200".into(), good);
    if endpoint.access == Access::Key {
        responses.insert("401".into(), reply("No valid key or token", "Error"));
        responses.insert(
            "429".into(),
            reply(
                "Over the plan's or the host's limits; see Retry-After",
                "Error",
            ),
        );
    }
    if endpoint.path.contains('{')
        || endpoint.path.starts_with("/execute")
        || endpoint.path == "/kill"
    {
        responses.insert("404".into(), reply("Not there, or not yours", "Error"));
    }
    if endpoint.takes != Takes::Nothing {
        responses.insert(
            "422".into(),
            reply("Validation Error", "HTTPValidationError"),
        );
    }
    let mut operation = json!({
        "summary": endpoint.summary,
        "operationId": endpoint.name,
        "responses": responses,
    });
    let body = match endpoint.takes {
        Takes::Nothing => None,
        Takes::Json(schema) => Some(("application/json", schema)),
        Takes::Form(schema) => Some(("application/x-www-form-urlencoded", schema)),
    };
    if let Some((media, schema)) = body {
        operation["requestBody"] = json!({
            "required": true,
            "content": { media: { "schema": reference(schema) } },
        });
    }
    if endpoint.access == Access::Key {
        operation["security"] = json!([{ "APIKeyHeader": [] }, { "OAuth2PasswordBearer": [] }]);
    }
    let mut parameters = Vec::new();
    for part in endpoint.path.split('/') {
        if let Some(name) = part
            .strip_prefix('{')
            .and_then(|part| part.strip_suffix('}'))
        {
            parameters.push(json!({
                "name": name, "in": "path", "required": true,
                "schema": { "type": "string", "format": "uuid" },
            }));
        }
    }
    if endpoint.path.starts_with("/execute") {
        parameters.push(json!({
            "name": "Idempotency-Key", "in": "header", "required": false,
            "description": "The same key with the same body never runs twice",
            "schema": { "type": "string", "maxLength": 255 },
        }));
    }
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    operation
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

fn reply(description: &str, schema: &str) -> Value {
    json!({
        "description": description,
        "content": { "application/json": { "schema": reference(schema) } },
    })
}

fn nullable(kind: &str) -> Value {
    json!({ "anyOf": [{ "type": kind }, { "type": "null" }] })
}

fn object(required: &[&str], properties: Value) -> Value {
    json!({ "type": "object", "required": required, "properties": properties })
}

fn schemas() -> Value {
    let text = json!({ "type": "string" });
    let truth = json!({ "type": "boolean" });
    let seconds = json!({ "type": "number", "description": "Seconds" });
    let uuid = json!({ "type": "string", "format": "uuid" });
    let time = json!({ "type": "string", "format": "date-time" });
    let language = json!({ "type": "string", "enum": ["python", "bash", "javascript"] });
    let mut wanted_language = language.clone();
    wanted_language["default"] = json!("python");
    json!({
        "CommandRequest": object(&[], json!({
            "command": nullable("string"),
            "code": nullable("string"),
            "api_key": nullable("string"),
            "session_id": { "anyOf": [uuid, { "type": "null" }] },
            "language": wanted_language,
            "timeout": { "type": "integer", "minimum": 1, "maximum": 600, "default": 60 },
            "vault_ids": { "anyOf": [{ "type": "array", "items": text }, { "type": "null" }] },
        })),
        "CommandResult": object(&["stdout", "stderr", "exit_code", "session_id"], json!({
            "stdout": text, "stderr": text, "exit_code": { "type": "integer" },
            "execution_time": seconds, "cpu_time": seconds, "session_id": uuid,
            "language": language, "created_at": time, "timed_out": truth, "truncated": truth,
            "truncated_bytes": { "type": "integer" }, "vm_restarted": truth,
        })),
        "TaskAccepted": object(&["task_id", "session_id"], json!({
            "task_id": uuid, "session_id": uuid, "status": text, "created_at": time,
        })),
        "Task": object(&["task_id", "is_complete"], json!({
            "task_id": uuid, "session_id": uuid,
            "status": { "type": "string", "enum": ["queued", "running", "done", "interrupted"] },
            "is_complete": truth, "serialized_stdout": text, "serialized_stderr": text,
            "exit_code": nullable("integer"), "execution_time": nullable("number"),
            "cpu_time": nullable("number"), "created_at": time, "language": language,
            "truncated": truth, "vm_restarted": truth,
        })),
        "SessionRequest": object(&["api_key"], json!({
            "api_key": { "type": "string", "description": "May be absent when a header has a key" },
            "vm_lifetime_seconds": { "type": "integer", "minimum": 20, "maximum": 86400, "default": 300 },
            "memory_mb": { "type": "integer", "minimum": 128, "maximum": 8192, "default": 512 },
            "vcpu_count": { "type": "integer", "enum": [1, 2, 4, 6, 8] },
            "metadata": { "type": "object" },
            "env": { "type": "object", "additionalProperties": text },
        })),
        "SessionCreated": object(&["session_id"], json!({ "session_id": uuid })),
        "Session": object(&["session_id"], json!({
            "session_id": uuid, "created_at": time, "vm_lifetime_seconds": { "type": "integer" },
            "memory_mb": { "type": "integer" }, "vcpu_count": { "type": "integer" },
            "metadata": { "type": "object" }, "env": { "type": "array", "items": text },
            "vm_id": nullable("string"), "vm_status": nullable("string"),
        })),
        "SessionStatus": object(&["session_id", "exists"], json!({
            "session_id": uuid, "exists": truth, "vm_assigned": truth, "vm_alive": truth,
            "vm_status": nullable("string"), "vm_id": nullable("string"),
            "uptime_seconds": nullable("number"), "expires_in_seconds": nullable("number"),
            "created_at": time,
        })),
        "KillRequest": object(&["session_id"], json!({ "session_id": uuid, "api_key": nullable("string") })),
        "Killed": object(&["success"], json!({
            "success": truth, "message": text, "vm_id": text, "session_id": uuid,
        })),
        "User": object(&["id", "name"], json!({
            "id": uuid, "name": text, "email": nullable("string"), "is_verified": truth, "plan": text,
        })),
        "PasswordForm": object(&["username", "password"], json!({
            "grant_type": { "anyOf": [{ "type": "string", "pattern": "^password$" }, { "type": "null" }] },
            "username": text, "password": { "type": "string", "format": "password" }, "scope": text,
        })),
        "Token": object(&["access_token", "token_type"], json!({
            "access_token": text, "token_type": text, "expires_in": { "type": "integer" },
        })),
        "Health": object(&["status"], json!({ "status": text, "version": text })),
        "Error": object(&["detail"], json!({ "detail": text })),
        "HTTPValidationError": {
            "title": "HTTPValidationError", "type": "object",
            "properties": { "detail": { "type": "array", "items": reference("ValidationError") } },
        },
        "ValidationError": {
            "title": "ValidationError", "type": "object", "required": ["loc", "msg", "type"],
            "properties": {
                "loc": { "type": "array", "items": { "anyOf": [{ "type": "string" }, { "type": "integer" }] } },
                "msg": text, "type": text, "input": {}, "ctx": { "type": "object" },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_leads_somewhere() {
        let document = build();
        let text = document.to_string();
        for part in text.split("#/components/schemas/").skip(1) {
            let name = part.split('"').next().unwrap();
            assert!(
                document["components"]["schemas"][name].is_object(),
                "{name}"
            );
        }
        let operations: usize = document["paths"]
            .as_object()
            .unwrap()
            .values()
            .map(|p| p.as_object().unwrap().len())
            .sum();
        assert_eq!(operations, ENDPOINTS.len());
    }
}
