//! A command that runs in a VM, seen from `serve`.

use std::collections::BTreeMap;
use std::sync::Arc;

use thaw_vmm::protocol::{Cause, Death};
use thaw_wire::frame::{Frame, INITIAL_CREDIT, Kind, MAX_PAYLOAD};
use thaw_wire::message::{Execute, Exit, Open, Signal};
use tokio::sync::mpsc;

use super::WorkerError;
use super::link::Link;

/// Source text up to this size travels in the opening frame, where JSON may make six bytes of
/// one; longer text follows as input.
const INLINE_CODE: usize = 8 * 1024;

/// Bytes taken before more are asked for: half of what may be in flight, so that a command
/// that writes fast never waits for a grant that is on its way.
const GRANT: u32 = INITIAL_CREDIT / 2;

/// What a running command does.
#[derive(Clone, Debug)]
pub enum Event {
    /// Bytes on standard output.
    Stdout(Vec<u8>),
    /// Bytes on standard error.
    Stderr(Vec<u8>),
    /// A piece of the command's rich results; see [`thaw_wire::message::RichResult`].
    Rich(Vec<u8>),
    /// It ended. The last event.
    Exit(Exit),
    /// The VM is gone. The last event.
    Died(Death),
}

impl Event {
    /// Bytes that spent credit.
    pub(super) fn bytes(&self) -> u32 {
        match self {
            // A frame's payload is far below 4 GiB.
            Self::Stdout(bytes) | Self::Stderr(bytes) | Self::Rich(bytes) => bytes.len() as u32,
            _ => 0,
        }
    }
}

/// The link's side of a stream.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) events: mpsc::UnboundedSender<Event>,
    input: Vec<u8>,
    sent: usize,
    credit: u32,
}

impl Inbox {
    pub(super) fn new(events: mpsc::UnboundedSender<Event>, input: Vec<u8>) -> Self {
        Self {
            events,
            input,
            sent: 0,
            credit: INITIAL_CREDIT,
        }
    }

    /// The next piece of input that credit allows after a grant, if there is any.
    pub(super) fn next_chunk(&mut self, grant: u32) -> Option<Vec<u8>> {
        self.credit = self.credit.saturating_add(grant);
        let rest = &self.input[self.sent..];
        let len = rest.len().min(self.credit as usize).min(MAX_PAYLOAD);
        if len == 0 {
            return None;
        }
        let chunk = rest[..len].to_vec();
        self.sent += len;
        self.credit -= len as u32;
        if self.sent == self.input.len() {
            self.input = Vec::new();
            self.sent = 0;
        }
        Some(chunk)
    }
}

/// One command. Dropping it leaves the command to itself; its output is thrown away then.
#[derive(Debug)]
pub struct Running {
    link: Arc<Link>,
    stream: u32,
    events: mpsc::UnboundedReceiver<Event>,
    /// Bytes taken and not granted again.
    owed: u32,
}

impl Running {
    pub(super) fn start(link: &Arc<Link>, mut command: Execute) -> Result<Self, WorkerError> {
        let mut input = Vec::new();
        if command
            .code
            .as_ref()
            .is_some_and(|code| code.len() > INLINE_CODE)
        {
            input = command.code.take().unwrap_or_default().into_bytes();
            command.code_len = input.len() as u64;
        }
        let (stream, events) = link.open_stream(input)?;
        let running = Self {
            link: link.clone(),
            stream,
            events,
            owed: 0,
        };
        link.send(
            &Frame::json(stream, Kind::Open, &Open::Execute(command))?,
            Vec::new(),
        )?;
        link.pump(stream, 0)?;
        Ok(running)
    }

    /// What happens next. Safe to drop and to call again: nothing is lost.
    pub async fn next(&mut self) -> Event {
        let Some(event) = self.events.recv().await else {
            return Event::Died(Death {
                cause: Cause::Worker,
                detail: "the command's stream is closed".to_owned(),
                console: String::new(),
            });
        };
        self.owed += event.bytes();
        if self.owed >= GRANT {
            self.grant();
        }
        event
    }

    /// Sends a signal to the command.
    ///
    /// # Errors
    /// The VM is gone.
    pub fn signal(&self, signal: Signal) -> Result<(), WorkerError> {
        self.link.send(
            &Frame::json(self.stream, Kind::Signal, &signal)?,
            Vec::new(),
        )
    }

    fn grant(&mut self) {
        let credit = Frame::credit(self.stream, std::mem::take(&mut self.owed));
        if let Err(error) = self.link.send(&credit, Vec::new()) {
            tracing::debug!(%error, "no credit for a VM that is gone");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // From here on the link grants what arrives by itself; what was left lying is granted now.
        self.events.close();
        let mut ended = false;
        while let Ok(event) = self.events.try_recv() {
            self.owed += event.bytes();
            ended |= matches!(event, Event::Exit(_) | Event::Died(_));
        }
        if self.owed > 0 && !ended {
            self.grant();
        }
    }
}

/// A command with nothing but its source and its deadline.
pub fn command(
    language: thaw_wire::message::Language,
    code: &str,
    timeout: std::time::Duration,
) -> Execute {
    Execute {
        language,
        code_len: 0,
        code: Some(code.to_owned()),
        timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        env: BTreeMap::new(),
        context: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_flows_only_as_far_as_credit_goes() {
        let (events, _receiver) = mpsc::unbounded_channel();
        let total = INITIAL_CREDIT as usize + 100;
        let mut inbox = Inbox::new(events, vec![7; total]);
        let mut sent = 0;
        while let Some(chunk) = inbox.next_chunk(0) {
            sent += chunk.len();
        }
        assert_eq!(sent, INITIAL_CREDIT as usize);
        assert_eq!(inbox.next_chunk(60).map(|chunk| chunk.len()), Some(60));
        assert_eq!(inbox.next_chunk(1000).map(|chunk| chunk.len()), Some(40));
        assert_eq!(inbox.next_chunk(1000), None);
    }
}
