//! Bodies: read, validated, and judged in FastAPI's words.

pub mod fields;
mod json;
mod requests;

pub use requests::{Body, CommandRequest, SessionRequest, form, missing, password_form};
