//! Replies: whole ones, whose head and body leave in one write, and streams.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use tokio::sync::mpsc;

use super::pulse::Busy;

/// A reply.
///
/// An error of its body breaks the connection off: the only way to tell a client that what has
/// begun well did not end so.
pub type Reply = Response<UnsyncBoxBody<Bytes, io::Error>>;

/// A JSON reply.
pub fn json(status: StatusCode, value: &impl Serialize) -> Reply {
    match serde_json::to_vec(value) {
        Ok(body) => raw(status, "application/json", body.into()),
        Err(error) => {
            tracing::error!(%error, "a reply cannot be written as JSON");
            let body = Bytes::from_static(b"{\"detail\":\"Internal Server Error\"}");
            raw(StatusCode::INTERNAL_SERVER_ERROR, "application/json", body)
        }
    }
}

/// A reply of any type.
pub fn raw(status: StatusCode, content_type: &'static str, body: Bytes) -> Reply {
    let mut reply = Response::new(
        Full::new(body)
            .map_err(|never| match never {})
            .boxed_unsync(),
    );
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
}

/// Pieces of a streamed body that may wait for the client: enough to keep the connection busy.
const WAITING: usize = 8;

/// The writing end of a streamed body. Dropping it ends the body.
#[derive(Clone, Debug)]
pub struct Sink(mpsc::Sender<io::Result<Bytes>>);

impl Sink {
    /// Sends a piece; waits while the client is slow. False: the client is gone.
    pub async fn send(&self, bytes: impl Into<Bytes>) -> bool {
        self.0.send(Ok(bytes.into())).await.is_ok()
    }

    /// Breaks the body off.
    pub async fn fail(self, why: impl Into<String>) {
        // A client that is gone needs no telling.
        drop(self.0.send(Err(io::Error::other(why.into()))).await);
    }

    /// Resolves when the client is gone.
    pub async fn closed(&self) {
        self.0.closed().await;
    }
}

/// A 200 reply whose body comes bit by bit.
pub fn stream(content_type: &'static str) -> (Sink, Reply) {
    let (sender, pieces) = mpsc::channel(WAITING);
    let frames = futures_util::stream::unfold(pieces, |mut pieces| async move {
        let piece: io::Result<Bytes> = pieces.recv().await?;
        Some((piece.map(Frame::data), pieces))
    });
    let mut reply = Response::new(StreamBody::new(frames).boxed_unsync());
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    (Sink(sender), reply)
}

/// Keeps the connection busy while the reply's body has more to come, until it has left or is given up.
pub(super) fn guarded(reply: Reply, busy: Busy) -> Reply {
    // Whole bodies leave with their heads; only streams outlive the handler.
    if reply.body().size_hint().exact().is_some() {
        return reply;
    }
    reply.map(|body| Guarded { body, busy }.boxed_unsync())
}

struct Guarded {
    body: UnsyncBoxBody<Bytes, io::Error>,
    busy: Busy,
}

impl Body for Guarded {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        // It is asked for more when the peer has room for it: until then it is the peer's turn.
        self.busy.owes(frame.is_pending());
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A time as clients of this API read it: ISO 8601 in UTC, microseconds, with offset.
pub fn iso(time: jiff::Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%6f+00:00").to_string()
}

/// As [`iso`], from milliseconds since the Unix epoch.
pub fn iso_ms(ms: i64) -> String {
    iso(jiff::Timestamp::from_millisecond(ms).unwrap_or(jiff::Timestamp::UNIX_EPOCH))
}

/// As [`iso`], from the standard library's clock.
pub fn iso_system(time: std::time::SystemTime) -> String {
    iso(jiff::Timestamp::try_from(time).unwrap_or(jiff::Timestamp::UNIX_EPOCH))
}

#[cfg(test)]
mod tests {
    #[test]
    fn times_are_what_python_s_fromisoformat_reads() {
        assert_eq!(
            super::iso_ms(1_768_048_496_789),
            "2026-01-10T12:34:56.789000+00:00"
        );
    }
}
