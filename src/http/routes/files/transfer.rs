//! Bytes into and out of a guest's files, never more of them in memory than a few pieces.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::StatusCode;
use serde_json::json;
use thaw_wire::message::FileWork;

use super::run::{Step, Work, path, session_id};
use crate::http::app::{App, Call};
use crate::http::auth::Caller;
use crate::http::body::form;
use crate::http::error::ApiError;
use crate::http::reply::{self, Reply, Sink};
use crate::session::SessionId;

/// Bytes that are encoded at once: a multiple of three, so that the pieces join.
const PIECE: usize = 48 << 10;

/// Starts to read a file; its first bytes, if it has any, are waited for, so that what is wrong with
/// it shows in the answer's status.
async fn open(
    app: &App,
    caller: &Caller,
    session: &SessionId,
    path: String,
) -> Result<(Work, Option<Vec<u8>>), ApiError> {
    let mut work = Work::start(app, caller, session, FileWork::Read { path }).await?;
    match work.next().await? {
        Step::Bytes(first) => Ok((work, Some(first))),
        Step::Done => Ok((work, None)),
    }
}

pub(super) async fn read(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let wanted = call.query(|fields| fields.required_string("path").unwrap_or_default())?;
    let (path, session) = (path(&wanted)?, session_id(call.path("session_id"))?);
    let app = call.app;
    let (work, first) = open(&app, &caller, &session, path).await?;
    let (sink, reply) = reply::stream("application/octet-stream");
    tokio::spawn(async move {
        let Some(first) = first else { return };
        if sink.send(first).await {
            forward(work, sink).await;
        }
    });
    Ok(reply)
}

/// Passes the rest of a file on. A file that cannot be read to its end breaks the answer off.
async fn forward(mut work: Work, sink: Sink) {
    loop {
        match work.next().await {
            Ok(Step::Bytes(bytes)) => {
                if !sink.send(bytes).await {
                    return;
                }
            }
            Ok(Step::Done) => return,
            Err(error) => return sink.fail(error.detail()).await,
        }
    }
}

/// `POST /download`: the file in base64 in JSON.
pub(super) async fn download(mut call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let bytes = call.bytes().await?;
    let (filename, session) = form(&bytes, |fields| {
        (
            fields.required_string("filename").unwrap_or_default(),
            fields.required_string("session_id").unwrap_or_default(),
        )
    })?;
    let (path, session) = (path(&filename)?, session_id(&session)?);
    let app = call.app;
    let (work, first) = open(&app, &caller, &session, path).await?;
    let (sink, reply) = reply::stream("application/json");
    tokio::spawn(encode(work, first, filename, sink));
    Ok(reply)
}

/// Writes the answer's JSON around the file as it comes. The size is told last, when it is known.
async fn encode(mut work: Work, first: Option<Vec<u8>>, filename: String, sink: Sink) {
    let name = serde_json::Value::from(filename);
    if !sink
        .send(format!("{{\"filename\":{name},\"content\":\""))
        .await
    {
        return;
    }
    let mut size = 0_usize;
    let mut rest: Vec<u8> = Vec::with_capacity(2 * PIECE);
    let mut next = first;
    while let Some(bytes) = next {
        size += bytes.len();
        rest.extend_from_slice(&bytes);
        if rest.len() >= PIECE {
            let whole = rest.len() - rest.len() % 3;
            let text = STANDARD.encode(&rest[..whole]);
            rest.drain(..whole);
            if !sink.send(text).await {
                return;
            }
        }
        next = match work.next().await {
            Ok(Step::Bytes(bytes)) => Some(bytes),
            Ok(Step::Done) => None,
            Err(error) => return sink.fail(error.detail()).await,
        };
    }
    // The official client takes an empty text for "no content here" and would save this JSON;
    // a line break decodes to nothing.
    let last = if size == 0 {
        "\\n".to_owned()
    } else {
        STANDARD.encode(&rest)
    };
    sink.send(format!("{last}\",\"size\":{size}}}")).await;
}

pub(super) async fn write(mut call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let (wanted, mode, parents) = call.query(|fields| {
        let mode = fields.optional_string("mode");
        let bits = mode.as_deref().map(|text| {
            u32::from_str_radix(text, 8)
                .ok()
                .filter(|bits| *bits <= 0o7777)
        });
        if bits == Some(None) {
            fields.value_error(&["mode"], "mode is permission bits in octal, such as 755");
        }
        (
            fields.required_string("path").unwrap_or_default(),
            bits.flatten(),
            fields.flag("parents", false),
        )
    })?;
    let (path, session) = (path(&wanted)?, session_id(call.path("session_id"))?);
    let incoming = call.incoming();
    let app = call.app;
    let mut target = Target::open(&app, &caller, &session, path, mode, parents).await?;
    if let Some(mut incoming) = incoming {
        let patience = Duration::from_secs(app.config.server.body_timeout_s);
        loop {
            let frame = tokio::time::timeout(patience, incoming.frame()).await;
            let frame = frame.map_err(|_| {
                let detail = "The request body took too long";
                ApiError::new(StatusCode::REQUEST_TIMEOUT, detail)
            })?;
            match frame {
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        target.write(bytes).await?;
                    }
                }
                Some(Err(_)) => {
                    let detail = "The request body broke off";
                    return Err(ApiError::new(StatusCode::BAD_REQUEST, detail));
                }
                None => break,
            }
        }
    }
    target.finish().await
}

/// A file that is being written. Dropped before its end it leaves nothing behind.
pub(super) struct Target {
    work: Work,
    path: String,
    size: u64,
    most: u64,
}

impl Target {
    pub(super) async fn open(
        app: &App,
        caller: &Caller,
        session: &SessionId,
        path: String,
        mode: Option<u32>,
        parents: bool,
    ) -> Result<Self, ApiError> {
        let work = FileWork::Write {
            path: path.clone(),
            mode,
            parents,
        };
        Ok(Self {
            work: Work::start(app, caller, session, work).await?,
            path,
            size: 0,
            most: app.config.server.max_upload_bytes,
        })
    }

    /// Adds bytes; waits while the guest is slow.
    pub(super) async fn write(&mut self, bytes: Bytes) -> Result<(), ApiError> {
        self.size += bytes.len() as u64;
        if self.size > self.most {
            let detail = format!("The file is larger than {} bytes", self.most);
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, detail));
        }
        let input = self.work.process.input();
        let writing = input.write(bytes);
        tokio::select! {
            biased;
            written = writing => match written {
                Ok(()) => Ok(()),
                // It ended before its input did: its end says why.
                Err(_) => Err(self.why().await),
            },
            // A guest that has nowhere to put the bytes says so while we wait for room.
            step = self.work.next() => Err(match step {
                Ok(_) => ended_early(),
                Err(error) => error,
            }),
        }
    }

    async fn why(&mut self) -> ApiError {
        match self.work.next().await {
            Ok(_) => ended_early(),
            Err(error) => error,
        }
    }

    /// All bytes are there: puts the file in its place.
    pub(super) async fn finish(mut self) -> Result<Reply, ApiError> {
        if let Err(error) = self.work.process.input().finish() {
            tracing::debug!("a file's end could not be told: {error:#}");
        }
        while let Step::Bytes(_) = self.work.next().await? {}
        let shown = json!({ "success": true, "path": self.path, "size": self.size });
        Ok(reply::json(StatusCode::OK, &shown))
    }
}

fn ended_early() -> ApiError {
    ApiError::new(
        StatusCode::CONFLICT,
        "The VM stopped writing before the file was whole",
    )
}
