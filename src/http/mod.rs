//! The front end.
//!
//! A request's way: `server` (connections, limits, drain) → `app` (ids, metrics) → `router` → one of
//! `routes`, which asks `auth` who it is, `body` what is wanted, `retry` whether it was sent before,
//! and then the sessions or the task queue. What goes wrong anywhere is an `error`.

pub mod app;
pub mod auth;
pub mod body;
pub mod error;
pub mod metrics;
pub mod openapi;
mod pulse;
pub mod reply;
pub mod retry;
pub mod router;
pub mod routes;
pub mod server;
pub mod sse;
#[cfg(test)]
mod tests;
pub mod tls;
