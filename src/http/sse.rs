//! Server-sent events: replies that tell what happens while it happens.
//!
//! Format: the HTML standard's "event stream"; every event has a name and one line of JSON.

use std::time::Duration;

use serde::Serialize;

use super::reply::{self, Reply, Sink};

const CONTENT_TYPE: &str = "text/event-stream; charset=utf-8";

/// A comment is sent after this long without an event, so that proxies keep the connection and a
/// client that went away is noticed.
const PAUSE: Duration = Duration::from_secs(15);

/// Where events go.
#[derive(Debug)]
pub struct Events(Sink);

/// A reply and the way to fill it.
pub fn events() -> (Events, Reply) {
    let (sink, reply) = reply::stream(CONTENT_TYPE);
    (Events(sink), reply)
}

impl Events {
    /// Sends an event. False: the client is gone.
    pub async fn send(&self, name: &str, data: &impl Serialize) -> bool {
        match serde_json::to_string(data) {
            Ok(data) => {
                self.0
                    .send(format!("event: {name}\ndata: {data}\n\n"))
                    .await
            }
            Err(error) => {
                tracing::error!(%error, "an event cannot be written as JSON");
                false
            }
        }
    }

    /// Waits for something without letting the connection fall silent; `None` when the client went
    /// away meanwhile. `future` is polled to its end or dropped, never restarted.
    pub async fn wait<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = std::pin::pin!(future);
        loop {
            tokio::select! {
                biased;
                done = &mut future => return Some(done),
                () = self.0.closed() => return None,
                () = tokio::time::sleep(PAUSE) => {
                    if !self.0.send(": still here\n\n").await {
                        return None;
                    }
                }
            }
        }
    }
}
