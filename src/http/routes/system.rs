//! `GET /health`, `GET /metrics`, `GET /openapi.json`.

use hyper::StatusCode;
use serde_json::json;

use super::{Access, Endpoint, Group, Takes};
use crate::http::app::Call;
use crate::http::error::ApiError;
use crate::http::openapi;
use crate::http::openapi::{object, text};
use crate::http::reply::{self, Reply};

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "GET",
            path: "/health",
            name: "health",
            summary: "Whether the server takes requests",
            access: Access::Open,
            query: &[],
            takes: Takes::Nothing,
            gives: "Health",
            refuses: &[503],
            handler: |call| Box::pin(health(call)),
        },
        Endpoint {
            method: "GET",
            path: "/metrics",
            name: "metrics",
            summary: "Metrics in OpenMetrics text",
            access: Access::Open,
            query: &[],
            takes: Takes::Nothing,
            gives: "application/openmetrics-text",
            refuses: &[],
            handler: |call| Box::pin(metrics(call)),
        },
        Endpoint {
            method: "GET",
            path: "/openapi.json",
            name: "openapi",
            summary: "This document",
            access: Access::Open,
            query: &[],
            takes: Takes::Nothing,
            gives: "application/json",
            refuses: &[],
            handler: |call| Box::pin(openapi(call)),
        },
    ],
    schemas: || {
        vec![(
            "Health",
            object(
                &["status", "version", "machine"],
                json!({ "status": text(), "version": text(), "machine": text() }),
            ),
        )]
    },
};

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) async fn health(call: Call) -> Result<Reply, ApiError> {
    let (status, word) = if call.is_draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining")
    } else {
        (StatusCode::OK, "ok")
    };
    let shown = json!({
        "status": word,
        "version": env!("CARGO_PKG_VERSION"),
        "machine": call.app.machine,
    });
    Ok(reply::json(status, &shown))
}

pub(super) async fn metrics(call: Call) -> Result<Reply, ApiError> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &call.app.registry)
        .map_err(|error| ApiError::internal(&error))?;
    Ok(reply::raw(StatusCode::OK, OPENMETRICS, text.into()))
}

pub(super) async fn openapi(_call: Call) -> Result<Reply, ApiError> {
    Ok(reply::raw(
        StatusCode::OK,
        "application/json",
        openapi::document(),
    ))
}
