//! Changes of a guest's files, as they happen.

use serde_json::{Value, json};
use thaw_wire::message::{FileChange, FileEvent, FileWork};

use super::run::{Step, Work, path, session_id};
use crate::http::app::Call;
use crate::http::error::ApiError;
use crate::http::reply::Reply;
use crate::http::sse::{self, Events};

/// Longest line that a guest may send: an event with the longest path.
const MOST_LINE: usize = 64 << 10;

pub(super) async fn watch(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let (wanted, recursive) = call.query(|fields| {
        (
            fields.required_string("path").unwrap_or_default(),
            fields.flag("recursive", false),
        )
    })?;
    let work = FileWork::Watch {
        path: path(&wanted)?,
        recursive,
    };
    let session = session_id(call.path("session_id"))?;
    let app = call.app;
    let mut work = Work::start(&app, &caller, &session, work).await?;
    // A path that is not there is an answer of its own, so the first line is waited for.
    let Step::Bytes(first) = work.next().await? else {
        return Err(ApiError::not_found("There is nothing to watch"));
    };
    let (events, reply) = sse::events();
    tokio::spawn(async move {
        let why = tell(&mut work, first, &events).await;
        events.send("end", &json!({ "detail": why })).await;
    });
    Ok(reply)
}

/// Passes events on until something ends; what that was.
async fn tell(work: &mut Work, first: Vec<u8>, events: &Events) -> String {
    let mut buffer = first;
    loop {
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let sent = match serde_json::from_slice::<FileEvent>(&line) {
                Ok(event) => {
                    events
                        .send(name(event.event), &json!({ "path": event.path }))
                        .await
                }
                // The first line.
                Err(_) if serde_json::from_slice::<Value>(&line).is_ok() => {
                    events.send("ready", &json!({})).await
                }
                Err(_) => return "the VM sent something without sense".into(),
            };
            if !sent {
                return "the client is gone".into();
            }
        }
        if buffer.len() > MOST_LINE {
            return "the VM sent something without end".into();
        }
        match events.wait(work.next()).await {
            Some(Ok(Step::Bytes(bytes))) => buffer.extend(bytes),
            Some(Ok(Step::Done)) => return "what was watched is gone".into(),
            Some(Err(error)) => return error.detail(),
            None => return "the client is gone".into(),
        }
    }
}

fn name(change: FileChange) -> &'static str {
    match change {
        FileChange::Created => "created",
        FileChange::Modified => "modified",
        FileChange::Removed => "removed",
        FileChange::Attributes => "attributes",
        FileChange::Overflow => "overflow",
    }
}
