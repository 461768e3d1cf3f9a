//! A command that runs in a VM, seen from `serve`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use thaw_vmm::protocol::{Cause, Death};
use thaw_wire::frame::{Frame, INITIAL_CREDIT, Kind, MAX_PAYLOAD};
use thaw_wire::message::{Execute, Exit, Open, Signal};
use tokio::sync::{Notify, mpsc};

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

/// Input of one process that may wait here for credit: enough to keep the guest busy while its
/// writer fetches more.
const MOST_WAITING: usize = 2 * INITIAL_CREDIT as usize;

/// The link's side of a stream.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) events: mpsc::UnboundedSender<Event>,
    input: VecDeque<Bytes>,
    waiting: usize,
    /// The end of the input is to be told once everything before it has been sent.
    ending: bool,
    credit: u32,
    /// Tells writers that there is room again.
    room: Arc<Notify>,
}

impl Inbox {
    pub(super) fn new(events: mpsc::UnboundedSender<Event>) -> Self {
        Self {
            events,
            input: VecDeque::new(),
            waiting: 0,
            ending: false,
            credit: INITIAL_CREDIT,
            room: Arc::default(),
        }
    }

    /// Tells writers that there is room again.
    pub(super) fn room(&self) -> Arc<Notify> {
        self.room.clone()
    }

    /// Bytes that wait for credit.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Nothing is added any more.
    pub(super) fn end(&mut self) {
        self.ending = true;
    }

    /// The stream is over: whoever waits for room finds out.
    pub(super) fn close(&self) {
        self.room.notify_waiters();
    }

    /// Adds input.
    pub(super) fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.waiting += bytes.len();
            self.input.push_back(bytes);
        }
    }

    /// The next piece of input that credit allows after a grant, if there is any. An empty one is
    /// the input's end.
    pub(super) fn next_chunk(&mut self, grant: u32) -> Option<Vec<u8>> {
        self.credit = self.credit.saturating_add(grant);
        let Some(piece) = self.input.front_mut() else {
            return std::mem::take(&mut self.ending).then(Vec::new);
        };
        let len = piece.len().min(self.credit as usize).min(MAX_PAYLOAD);
        if len == 0 {
            return None;
        }
        let chunk = piece.split_to(len).to_vec();
        if piece.is_empty() {
            self.input.pop_front();
        }
        self.waiting -= len;
        self.credit -= len as u32;
        if self.waiting < MOST_WAITING {
            self.room.notify_waiters();
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
        let (running, _) = Self::open(link, &Open::Execute(command))?;
        link.feed(running.stream, input.into())?;
        Ok(running)
    }

    /// Starts a process, or goes on with one; the second value is the way to it.
    pub(super) fn process(link: &Arc<Link>, order: &Open) -> Result<(Self, Feeder), WorkerError> {
        let (running, room) = Self::open(link, order)?;
        let feeder = Feeder {
            link: link.clone(),
            stream: running.stream,
            room,
        };
        Ok((running, feeder))
    }

    fn open(link: &Arc<Link>, order: &Open) -> Result<(Self, Arc<Notify>), WorkerError> {
        let (stream, events, room) = link.open_stream()?;
        let running = Self {
            link: link.clone(),
            stream,
            events,
            owed: 0,
        };
        link.send(&Frame::json(stream, Kind::Open, order)?, Vec::new())?;
        Ok((running, room))
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

/// The way to a process: its input and its signals.
#[derive(Debug)]
pub struct Feeder {
    link: Arc<Link>,
    stream: u32,
    room: Arc<Notify>,
}

impl Feeder {
    /// Hands bytes to the process; waits while it does not take what it was given before.
    ///
    /// # Errors
    /// The process or its VM is gone.
    pub async fn write(&self, bytes: Bytes) -> Result<(), WorkerError> {
        loop {
            // Before the look, so that room made in between is not missed.
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            match self.link.waiting_input(self.stream) {
                Some(waiting) if waiting < MOST_WAITING => break,
                Some(_) => room.await,
                None => return Err(WorkerError::Died(self.link.why_closed())),
            }
        }
        self.link.feed(self.stream, bytes)
    }

    /// No more input will come.
    ///
    /// # Errors
    /// The VM is gone.
    pub fn finish(&self) -> Result<(), WorkerError> {
        self.link.finish_input(self.stream)
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// The VM is gone.
    pub fn signal(&self, signal: Signal) -> Result<(), WorkerError> {
        let frame = Frame::json(self.stream, Kind::Signal, &signal)?;
        self.link.send(&frame, Vec::new())
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
        live: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_flows_only_as_far_as_credit_goes() {
        let (events, _receiver) = mpsc::unbounded_channel();
        let total = INITIAL_CREDIT as usize + 100;
        let mut inbox = Inbox::new(events);
        inbox.push(vec![7; total].into());
        inbox.end();
        let mut sent = 0;
        while let Some(chunk) = inbox.next_chunk(0) {
            sent += chunk.len();
        }
        assert_eq!(sent, INITIAL_CREDIT as usize);
        assert_eq!(inbox.next_chunk(60).map(|chunk| chunk.len()), Some(60));
        assert_eq!(inbox.next_chunk(1000).map(|chunk| chunk.len()), Some(40));
        // The end comes last and once.
        assert_eq!(inbox.next_chunk(1000), Some(Vec::new()));
        assert_eq!(inbox.next_chunk(1000), None);
    }
}
