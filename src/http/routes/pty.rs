//! `/v1/sessions/{id}/pty/…` and `/v1/vms/{id}/pty/…`: terminals, and the WebSocket that they are looked at through.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hyper::StatusCode;
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::{Value, json};
use thaw_wire::message::Size;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::files::session_id;
use super::{Access, Endpoint, Group, Query, QueryKind, Takes};
use crate::http::app::{App, Call};
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::openapi::{nullable, object, text, time, truth};
use crate::http::reply::{self, Reply, iso_system};
use crate::session::SessionId;
use crate::terminal::{Seen, Terminal, TerminalId, Viewer, Wish};

/// Largest side of a terminal: no screen has more, and programs allocate by it.
const MOST_SIDE: i64 = 1000;

/// Longest command line of a terminal: what fits a frame to the VM with room to spare.
const MOST_COMMAND: usize = 32 << 10;

/// Largest message that a viewer may send: a paste.
const MOST_MESSAGE: usize = 1 << 20;

/// A viewer that does not take a message for this long is gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// Close code for a viewer who may not look; the official client knows it.
const UNAUTHORISED: u16 = 4401;

/// Close code for a terminal that is not there: the client makes another.
const NO_TERMINAL: u16 = 4502;

const REFUSES: &[u16] = &[400, 404, 409, 503];

const SCHEMAS: fn() -> Vec<(&'static str, Value)> = || {
    let side = || json!({ "type": "integer", "minimum": 1, "maximum": MOST_SIDE });
    vec![
        (
            "PtyRequest",
            object(
                &[],
                json!({
                    "cols": side(), "rows": side(), "shell": nullable("string"),
                    "command": nullable("string"), "id": nullable("string"),
                }),
            ),
        ),
        (
            "Pty",
            object(
                &["session_id", "id", "alive"],
                json!({
                    "session_id": text(), "id": text(), "alive": truth(),
                    "exit_code": nullable("integer"), "cols": { "type": "integer" },
                    "rows": { "type": "integer" }, "created_at": time(),
                }),
            ),
        ),
        (
            "PtyList",
            object(
                &["sessions"],
                json!({ "sessions": crate::http::openapi::array("Pty") }),
            ),
        ),
        (
            "PtySize",
            object(&["cols", "rows"], json!({ "cols": side(), "rows": side() })),
        ),
    ]
};

/// The endpoints below one path: terminals are reached by their session, or by its VM.
macro_rules! endpoints {
    ($base:literal, $of:literal) => {
        &[
        Endpoint {
            method: "POST",
            path: concat!($base, "/pty/sessions"),
            name: concat!("create_", $of, "pty"),
            summary: "Start a terminal in a VM",
            access: Access::Key,
            query: &[],
            takes: Takes::OptionalJson("PtyRequest"),
            gives: "Pty",
            refuses: REFUSES,
            handler: |call| Box::pin(create(call)),
        },
        Endpoint {
            method: "GET",
            path: concat!($base, "/pty/sessions"),
            name: concat!("list_", $of, "ptys"),
            summary: "A VM's terminals, ended ones included",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "PtyList",
            refuses: &[404],
            handler: |call| Box::pin(list(call)),
        },
        Endpoint {
            method: "GET",
            path: concat!($base, "/pty/sessions/{pty_id}"),
            name: concat!("get_", $of, "pty"),
            summary: "One terminal",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Pty",
            refuses: &[404],
            handler: |call| Box::pin(get(call)),
        },
        Endpoint {
            method: "DELETE",
            path: concat!($base, "/pty/sessions/{pty_id}"),
            name: concat!("kill_", $of, "pty"),
            summary: "Hang a terminal up and forget it",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Pty",
            refuses: &[404],
            handler: |call| Box::pin(remove(call)),
        },
        Endpoint {
            method: "POST",
            path: concat!($base, "/pty/sessions/{pty_id}/resize"),
            name: concat!("resize_", $of, "pty"),
            summary: "Give a terminal another size",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("PtySize"),
            gives: "Pty",
            refuses: REFUSES,
            handler: |call| Box::pin(resize(call)),
        },
        Endpoint {
            method: "GET",
            path: concat!($base, "/pty/{pty_id}/connect"),
            name: concat!("connect_", $of, "pty"),
            summary: "A WebSocket to a terminal: binary messages are its bytes, text messages JSON (`resize`, `exit`)",
            access: Access::Open,
            query: &[Query {
                name: "api_key",
                kind: QueryKind::Text,
                help: "The key, where a client cannot send headers",
            }],
            takes: Takes::Nothing,
            gives: "application/octet-stream",
            refuses: &[400, 426],
            handler: |call| Box::pin(connect(call)),
        },
        ]
    };
}

/// Terminals by their session.
pub(super) const GROUP: Group = Group {
    endpoints: endpoints!("/v1/sessions/{session_id}", ""),
    schemas: SCHEMAS,
};

/// Terminals by the VM of their session.
pub(super) const VM_GROUP: Group = Group {
    endpoints: endpoints!("/v1/vms/{vm_id}", "vm_"),
    schemas: Vec::new,
};

/// What a new terminal is asked to be.
struct Asked {
    size: Size,
    id: Option<String>,
    shell: Option<String>,
    command: Option<String>,
}

fn side(number: i64) -> u16 {
    u16::try_from(number).unwrap_or(80)
}

async fn create(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_optional_body().await?;
    let session = session_of(&call, &caller)?;
    let asked = body.fields(|fields| {
        let size = Size {
            cols: side(fields.int("cols", 80, 1, MOST_SIDE)),
            rows: side(fields.int("rows", 24, 1, MOST_SIDE)),
        };
        let asked = Asked {
            size,
            id: fields.optional_string("id"),
            shell: fields.optional_string("shell"),
            command: fields.optional_string("command"),
        };
        for (name, text) in [("shell", &asked.shell), ("command", &asked.command)] {
            let Some(text) = text else { continue };
            if text.is_empty() || text.contains('\0') || text.len() > MOST_COMMAND {
                let why = "a command has 1 to 32768 bytes and no NUL characters";
                fields.value_error(&[name], why);
            }
        }
        let named = asked.id.as_deref().map(TerminalId::parse);
        if named == Some(None) {
            let why = "a terminal's id is 1 to 64 of A-Z a-z 0-9 . _ -";
            fields.value_error(&["id"], why);
        }
        (asked, named.flatten())
    })?;
    let (asked, named) = asked;
    let argv = match (&asked.command, &asked.shell) {
        (Some(line), _) => vec!["/bin/bash".into(), "-lc".into(), line.clone()],
        (None, Some(shell)) => vec![shell.clone(), "-il".into()],
        (None, None) => vec!["/bin/bash".into(), "-il".into()],
    };
    let id = named.unwrap_or_else(TerminalId::mint);
    let wish = Wish {
        id: id.clone(),
        argv,
        size: asked.size,
    };
    let app = &call.app;
    let process = app
        .backend
        .open(&caller.tenant, caller.limits, &session, wish.process());
    let process = process.await?;
    let inserted = app
        .terminals
        .insert(&caller.tenant, &session, id, asked.size, process);
    let terminal = inserted.map_err(|why| ApiError::new(StatusCode::CONFLICT, why.to_string()))?;
    Ok(reply::json(StatusCode::OK, &shown(&terminal)))
}

/// The official client reads a terminal's name as `session_id`.
fn shown(terminal: &Terminal) -> Value {
    let (size, exit) = (terminal.size(), terminal.exit_code());
    json!({
        "session_id": terminal.id.as_str(),
        "id": terminal.id.as_str(),
        "alive": exit.is_none(),
        "exit_code": exit,
        "cols": size.cols,
        "rows": size.rows,
        "created_at": iso_system(terminal.created_at),
    })
}

/// The caller, and the session, which must be the caller's.
fn place(call: &Call) -> Result<(Caller, SessionId), ApiError> {
    let caller = call.caller()?;
    let session = session_of(call, &caller)?;
    call.app.backend.view(&caller.tenant, &session)?;
    Ok((caller, session))
}

/// The session that the path names, by itself or by its VM.
fn session_of(call: &Call, caller: &Caller) -> Result<SessionId, ApiError> {
    let vm_id = call.path("vm_id");
    if vm_id.is_empty() {
        return session_id(call.path("session_id"));
    }
    let record = call.app.control.vms.get(&caller.tenant, vm_id)?;
    record
        .session()
        .ok_or_else(|| ApiError::not_found("The VM has no session"))
}

fn terminal_of(
    app: &App,
    caller: &Caller,
    session: &SessionId,
    id: &str,
) -> Result<Arc<Terminal>, ApiError> {
    TerminalId::parse(id)
        .and_then(|id| app.terminals.get(&caller.tenant, session, &id))
        .ok_or_else(|| ApiError::not_found("No such terminal"))
}

async fn list(call: Call) -> Result<Reply, ApiError> {
    let (caller, session) = place(&call)?;
    let all = call.app.terminals.list(&caller.tenant, &session);
    let sessions: Vec<Value> = all.iter().map(|terminal| shown(terminal)).collect();
    Ok(reply::json(
        StatusCode::OK,
        &json!({ "sessions": sessions }),
    ))
}

async fn get(call: Call) -> Result<Reply, ApiError> {
    let (caller, session) = place(&call)?;
    let terminal = terminal_of(&call.app, &caller, &session, call.path("pty_id"))?;
    Ok(reply::json(StatusCode::OK, &shown(&terminal)))
}

async fn remove(call: Call) -> Result<Reply, ApiError> {
    let (caller, session) = place(&call)?;
    let terminal = terminal_of(&call.app, &caller, &session, call.path("pty_id"))?;
    call.app
        .terminals
        .remove(&caller.tenant, &session, &terminal.id);
    Ok(reply::json(StatusCode::OK, &shown(&terminal)))
}

async fn resize(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_body().await?;
    let session = session_of(&call, &caller)?;
    let size = body.fields(|fields| {
        for name in ["cols", "rows"] {
            fields.must_be_given(name);
        }
        Size {
            cols: side(fields.int("cols", 80, 1, MOST_SIDE)),
            rows: side(fields.int("rows", 24, 1, MOST_SIDE)),
        }
    })?;
    call.app.backend.view(&caller.tenant, &session)?;
    let terminal = terminal_of(&call.app, &caller, &session, call.path("pty_id"))?;
    if terminal.exit_code().is_some() || terminal.resize(size).is_err() {
        let detail = "The terminal has ended";
        return Err(ApiError::new(StatusCode::CONFLICT, detail));
    }
    Ok(reply::json(StatusCode::OK, &shown(&terminal)))
}

/// Answers the handshake whatever the credentials say: a client of this API learns of a refusal by a
/// close code, not by a status.
async fn connect(mut call: Call) -> Result<Reply, ApiError> {
    let key = call
        .parts
        .headers
        .get("sec-websocket-key")
        .map(|key| derive_accept_key(key.as_bytes()));
    let (Some(accept), Some(upgrade)) = (key, call.parts.extensions.remove::<OnUpgrade>()) else {
        let detail = "This is a WebSocket: connect with a WebSocket client";
        return Err(ApiError::new(StatusCode::UPGRADE_REQUIRED, detail));
    };
    let accept = HeaderValue::from_str(&accept).map_err(|error| ApiError::internal(&error))?;
    let viewed = viewed(&call).await.map(|terminal| terminal.view());
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                let config = WebSocketConfig::default()
                    .max_message_size(Some(MOST_MESSAGE))
                    .max_frame_size(Some(MOST_MESSAGE));
                let io = TokioIo::new(upgraded);
                let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
                relay(socket, viewed).await;
            }
            Err(error) => tracing::debug!(%error, "a WebSocket did not come about"),
        }
    });
    let mut reply = reply::raw(StatusCode::SWITCHING_PROTOCOLS, "", bytes::Bytes::new());
    let headers = reply.headers_mut();
    headers.remove(hyper::header::CONTENT_TYPE);
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert("sec-websocket-accept", accept);
    Ok(reply)
}

/// The terminal that may be looked at, or the close code that says why not.
async fn viewed(call: &Call) -> Result<Arc<Terminal>, (u16, String)> {
    let given = call.query(|fields| fields.optional_string("api_key"));
    let caller = match given.ok().flatten() {
        Some(key) => call.admit(&key),
        None => call.caller(),
    };
    let caller = caller.map_err(|error| (UNAUTHORISED, error.detail()))?;
    let no_terminal = |error: ApiError| (NO_TERMINAL, error.detail());
    let session = session_of(call, &caller).map_err(no_terminal)?;
    let found = terminal_of(&call.app, &caller, &session, call.path("pty_id"));
    let terminal = found.map_err(no_terminal)?;
    if terminal.exit_code().is_none() {
        // What it said before can be read all the same; what is typed waits until its owner resumes it.
        let woken = call
            .app
            .backend
            .wake(&caller.tenant, caller.limits, &session);
        if let Err(error) = woken.await {
            tracing::debug!("a terminal's VM stays suspended: {error}");
        }
    }
    Ok(terminal)
}

/// A text message of a viewer.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Said {
    Resize { cols: u16, rows: u16 },
}

type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// Passes bytes both ways until one side ends.
async fn relay(socket: Socket, viewed: Result<Viewer, (u16, String)>) {
    let (mut to_client, mut from_client) = socket.split();
    let mut viewer = match viewed {
        Ok(viewer) => viewer,
        Err((code, reason)) => {
            let bye = CloseFrame {
                code: CloseCode::from(code),
                reason: reason.into(),
            };
            drop(tokio::time::timeout(PATIENCE, to_client.send(Message::Close(Some(bye)))).await);
            return;
        }
    };
    let terminal = viewer.terminal().clone();
    // Reading and writing do not wait for each other: a terminal that does not read its input may
    // have much to say.
    let reading = async {
        while let Some(message) = from_client.next().await {
            match message {
                Ok(Message::Binary(bytes)) => {
                    if terminal.write(bytes).await.is_err() {
                        // Its end is on its way to the viewer.
                        std::future::pending::<()>().await;
                    }
                }
                Ok(Message::Text(text)) => on_text(&terminal, &text),
                Ok(Message::Close(_)) | Err(_) => return,
                // Pings are answered by the library.
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
            }
        }
    };
    let writing = async {
        loop {
            let message = match viewer.next().await {
                Seen::Bytes(bytes) => Message::binary(bytes),
                Seen::Exit(code) => {
                    let text = json!({ "type": "exit", "exit_code": code }).to_string();
                    send(&mut to_client, Message::text(text)).await?;
                    return send(&mut to_client, close(CloseCode::Normal, "")).await;
                }
                Seen::Replaced => {
                    let why = "this terminal is viewed elsewhere now";
                    return send(&mut to_client, close(CloseCode::Normal, why)).await;
                }
            };
            send(&mut to_client, message).await?;
        }
    };
    tokio::select! {
        () = reading => {}
        ended = writing => if let Err(error) = ended {
            tracing::debug!(%error, "a terminal's viewer is gone");
        },
    }
}

fn on_text(terminal: &Terminal, text: &str) {
    // What a later client may say is nothing to worry about.
    let Ok(Said::Resize { cols, rows }) = serde_json::from_str(text) else {
        return;
    };
    let fits = |side: u16| (1..=MOST_SIDE).contains(&i64::from(side));
    if fits(cols)
        && fits(rows)
        && let Err(error) = terminal.resize(Size { cols, rows })
    {
        tracing::debug!("a terminal was not resized: {error:#}");
    }
}

fn close(code: CloseCode, reason: &'static str) -> Message {
    Message::Close(Some(CloseFrame {
        code,
        reason: reason.into(),
    }))
}

/// Sends, but not to somebody who does not take it.
async fn send<S>(to: &mut S, message: Message) -> Result<(), Error>
where
    S: SinkExt<Message, Error = Error> + Unpin,
{
    match tokio::time::timeout(PATIENCE, to.send(message)).await {
        Ok(sent) => sent,
        Err(_) => Err(Error::ConnectionClosed),
    }
}
