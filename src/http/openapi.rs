//! The OpenAPI document, made from the [`GROUPS`] of endpoints.

use std::sync::OnceLock;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::routes::{Access, Endpoint, GROUPS, QueryKind, Takes, endpoints};

/// The document, made on first use.
pub fn document() -> Bytes {
    static DOCUMENT: OnceLock<Bytes> = OnceLock::new();
    DOCUMENT.get_or_init(|| build().to_string().into()).clone()
}

fn build() -> Value {
    let mut paths = Map::new();
    for endpoint in endpoints() {
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
    let mut operation = json!({
        "summary": endpoint.summary,
        "operationId": endpoint.name,
        "responses": responses(endpoint),
    });
    let body = match endpoint.takes {
        Takes::Nothing | Takes::Bytes => None,
        Takes::Json(schema) => Some(("application/json", schema, true)),
        Takes::OptionalJson(schema) => Some(("application/json", schema, false)),
        Takes::Form(schema) => Some(("application/x-www-form-urlencoded", schema, true)),
        Takes::Multipart(schema) => Some(("multipart/form-data", schema, true)),
    };
    if endpoint.takes == Takes::Bytes {
        operation["requestBody"] = json!({
            "required": false,
            "content": { "application/octet-stream": {} },
        });
    }
    if let Some((media, schema, required)) = body {
        operation["requestBody"] = json!({
            "required": required,
            "content": { media: { "schema": reference(schema) } },
        });
    }
    let by_head = [
        json!({ "APIKeyHeader": [] }),
        json!({ "OAuth2PasswordBearer": [] }),
    ];
    match endpoint.access {
        Access::Open => {}
        Access::Key => operation["security"] = json!(by_head),
        // An empty requirement says that none of them may do.
        Access::KeyOrBody => operation["security"] = json!([by_head[0], by_head[1], {}]),
    }
    let parameters = parameters(endpoint);
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    operation
}

/// Every status that the endpoint may answer with: those that follow from what it is, and its own.
fn responses(endpoint: &Endpoint) -> Map<String, Value> {
    let mut responses = Map::new();
    let good = match endpoint.gives {
        "" => None,
        media if media.contains('/') => {
            Some(json!({ "description": "Successful Response", "content": { media: {} } }))
        }
        schema => Some(reply("Successful Response", schema)),
    };
    responses.extend(good.map(|good| ("200".to_owned(), good)));
    let mut statuses = endpoint.refuses.to_vec();
    if endpoint.access != Access::Open {
        statuses.extend([401, 429]);
    }
    if endpoint.takes != Takes::Nothing {
        statuses.extend([400, 408, 413, 422]);
    }
    if !endpoint.query.is_empty() {
        statuses.push(422);
    }
    for status in statuses {
        let schema = if status == 422 {
            "HTTPValidationError"
        } else {
            "Error"
        };
        responses.insert(status.to_string(), reply(meaning(status), schema));
    }
    responses
}

/// What a status says here.
fn meaning(status: u16) -> &'static str {
    match status {
        400 => "The request is broken",
        401 => "No valid key or token",
        403 => "Not allowed",
        404 => "Not there, or not yours",
        408 => "The body took too long",
        409 => "Not in this state",
        413 => "The body is too large",
        422 => "Validation Error",
        426 => "Not a WebSocket client",
        429 => "Over the plan's or the host's limits; see Retry-After",
        501 => "This image or server cannot",
        503 => "The server is shutting down, or no VM can be started",
        _ => "Refused",
    }
}

fn parameters(endpoint: &Endpoint) -> Vec<Value> {
    let mut parameters = Vec::new();
    for part in endpoint.path.split('/') {
        if let Some(name) = part
            .strip_prefix('{')
            .and_then(|part| part.strip_suffix('}'))
        {
            parameters.push(json!({
                "name": name, "in": "path", "required": true, "schema": text(),
            }));
        }
    }
    for query in endpoint.query {
        let schema = match query.kind {
            QueryKind::Text | QueryKind::Required => text(),
            QueryKind::Flag(default) => json!({ "type": "boolean", "default": default }),
            QueryKind::Int(default, least, most) => json!({
                "type": "integer", "default": default, "minimum": least, "maximum": most,
            }),
        };
        parameters.push(json!({
            "name": query.name, "in": "query",
            "required": matches!(query.kind, QueryKind::Required),
            "description": query.help, "schema": schema,
        }));
    }
    if endpoint.path.starts_with("/execute") {
        parameters.push(json!({
            "name": "Idempotency-Key", "in": "header", "required": false,
            "description": "The same key with the same body never runs twice",
            "schema": { "type": "string", "maxLength": 255 },
        }));
    }
    parameters
}

fn reply(description: &str, schema: &str) -> Value {
    json!({
        "description": description,
        "content": { "application/json": { "schema": reference(schema) } },
    })
}

/// A schema of another name.
pub(super) fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

/// A type, or null.
pub(super) fn nullable(kind: &str) -> Value {
    json!({ "anyOf": [{ "type": kind }, { "type": "null" }] })
}

/// Values in several representations.
pub(super) fn results() -> Value {
    json!({
        "type": "array",
        "description": "Each value's representations by MIME type; images in base64",
        "items": { "type": "object" },
    })
}

/// A schema, or null.
pub(super) fn or_null(schema: Value) -> Value {
    json!({ "anyOf": [schema, { "type": "null" }] })
}

/// An object.
pub(super) fn object(required: &[&str], properties: Value) -> Value {
    json!({ "type": "object", "required": required, "properties": properties })
}

/// An array of a schema of another name.
pub(super) fn array(schema: &str) -> Value {
    json!({ "type": "array", "items": reference(schema) })
}

/// Any text.
pub(super) fn text() -> Value {
    json!({ "type": "string" })
}

/// True or false.
pub(super) fn truth() -> Value {
    json!({ "type": "boolean" })
}

/// A time span.
pub(super) fn seconds() -> Value {
    json!({ "type": "number", "description": "Seconds" })
}

/// An id.
pub(super) fn uuid() -> Value {
    json!({ "type": "string", "format": "uuid" })
}

/// A point in time.
pub(super) fn time() -> Value {
    json!({ "type": "string", "format": "date-time" })
}

/// A command's language.
pub(super) fn language() -> Value {
    json!({ "type": "string", "enum": ["python", "bash", "javascript"] })
}

/// A command's language with a default.
pub(super) fn language_or(default: &str) -> Value {
    let mut schema = language();
    schema["default"] = json!(default);
    schema
}

fn schemas() -> Map<String, Value> {
    let mut all: Map<String, Value> = GROUPS
        .iter()
        .flat_map(|group| (group.schemas)())
        .map(|(name, schema)| (name.to_owned(), schema))
        .collect();
    all.insert(
        "Error".into(),
        object(&["detail"], json!({ "detail": text() })),
    );
    all.insert(
        "HTTPValidationError".into(),
        json!({
            "title": "HTTPValidationError", "type": "object",
            "properties": { "detail": array("ValidationError") },
        }),
    );
    all.insert(
        "ValidationError".into(),
        json!({
            "title": "ValidationError", "type": "object", "required": ["loc", "msg", "type"],
            "properties": {
                "loc": { "type": "array", "items": { "anyOf": [{ "type": "string" }, { "type": "integer" }] } },
                "msg": text(), "type": text(), "input": {}, "ctx": { "type": "object" },
            },
        }),
    );
    all
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
        assert_eq!(operations, endpoints().count());
    }
}
