//! Bodies: read, validated, and judged in FastAPI's words.

pub mod fields;
mod json;
mod requests;

pub use requests::{
    Body, CommandRequest, SessionRequest, check_env, form, metadata, missing, password_form,
    session_id, session_spec,
};
