//! Lists, facts and changes of a guest's files.

use hyper::StatusCode;
use serde_json::json;
use thaw_wire::message::{FileInfo, FileWork};

use super::MOST_LISTED;
use super::run::{Work, path, session_id};
use crate::http::app::Call;
use crate::http::error::ApiError;
use crate::http::reply::{self, Reply};

/// Bytes of a list: the longest that is allowed, with paths of ordinary length.
const MOST_LIST_BYTES: usize = 8 << 20;

/// Bytes of an answer that says little.
const MOST_ANSWER_BYTES: usize = 64 << 10;

/// Does a piece of work that gives nothing but its end.
async fn plain(call: Call, work: FileWork) -> Result<Reply, ApiError> {
    answer(call, work, MOST_ANSWER_BYTES).await?;
    Ok(reply::json(StatusCode::OK, &json!({ "success": true })))
}

async fn answer(call: Call, work: FileWork, most: usize) -> Result<Vec<u8>, ApiError> {
    let caller = call.caller()?;
    let session = session_id(call.path("session_id"))?;
    let app = call.app;
    let work = Work::start(&app, &caller, &session, work).await?;
    work.all(most).await
}

/// The lines of a list. A guest that sends something else is told of as broken.
fn lines(bytes: &[u8]) -> Result<Vec<FileInfo>, ApiError> {
    let lines = bytes.split(|byte| *byte == b'\n');
    let lines = lines.filter(|line| !line.is_empty());
    lines
        .map(serde_json::from_slice)
        .collect::<Result<_, _>>()
        .map_err(|_| ApiError::new(StatusCode::CONFLICT, "The VM gave an answer without sense"))
}

pub(super) async fn list(call: Call) -> Result<Reply, ApiError> {
    call.caller()?;
    let (wanted, recursive, limit) = call.query(|fields| {
        (
            fields.required_string("path").unwrap_or_default(),
            fields.flag("recursive", false),
            fields.int("limit", 1000, 1, MOST_LISTED),
        )
    })?;
    // One more than wanted tells whether there is more.
    let work = FileWork::List {
        path: path(&wanted)?,
        recursive,
        limit: limit.unsigned_abs() + 1,
    };
    let mut entries = lines(&answer(call, work, MOST_LIST_BYTES).await?)?;
    let truncated = entries.len() as u64 > limit.unsigned_abs();
    entries.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let shown = json!({ "entries": entries, "truncated": truncated });
    Ok(reply::json(StatusCode::OK, &shown))
}

pub(super) async fn stat(call: Call) -> Result<Reply, ApiError> {
    call.caller()?;
    let wanted = call.query(|fields| fields.required_string("path").unwrap_or_default())?;
    let work = FileWork::Stat {
        path: path(&wanted)?,
    };
    let found = lines(&answer(call, work, MOST_ANSWER_BYTES).await?)?;
    match found.first() {
        Some(info) => Ok(reply::json(StatusCode::OK, info)),
        None => Err(ApiError::new(StatusCode::CONFLICT, "The VM gave no answer")),
    }
}

pub(super) async fn mkdir(mut call: Call) -> Result<Reply, ApiError> {
    let (_, body) = call.caller_and_body().await?;
    let (wanted, parents) = body.fields(|fields| {
        (
            fields.required_string("path").unwrap_or_default(),
            fields.flag("parents", false),
        )
    })?;
    let work = FileWork::Mkdir {
        path: path(&wanted)?,
        parents,
    };
    plain(call, work).await
}

pub(super) async fn rename(mut call: Call) -> Result<Reply, ApiError> {
    let (_, body) = call.caller_and_body().await?;
    let (from, to) = body.fields(|fields| {
        (
            fields.required_string("from").unwrap_or_default(),
            fields.required_string("to").unwrap_or_default(),
        )
    })?;
    let work = FileWork::Rename {
        from: path(&from)?,
        to: path(&to)?,
    };
    plain(call, work).await
}

pub(super) async fn remove(call: Call) -> Result<Reply, ApiError> {
    call.caller()?;
    let (wanted, recursive) = call.query(|fields| {
        (
            fields.required_string("path").unwrap_or_default(),
            fields.flag("recursive", false),
        )
    })?;
    let work = FileWork::Remove {
        path: path(&wanted)?,
        recursive,
    };
    plain(call, work).await
}
