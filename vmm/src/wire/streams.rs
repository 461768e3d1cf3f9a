//! The table of open streams: who may send what, how much, and for how long.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Deserialize;
use thaw_wire::frame::{CONTROL, Frame, INITIAL_CREDIT, Kind};

use super::GuestFault;

/// Streams open at once: one command at a time in each context, terminals, and work on files.
/// `serve` keeps to half of it; the rest is room for streams whose end is on its way.
pub const MAX_STREAMS: usize = 64;

/// How long after a command's own deadline the agent has, before the worker has the command
/// killed; and again, before the VM counts as unresponsive. Both are later than what `serve` does by itself.
const GRACE: Duration = Duration::from_secs(2);

/// Longest deadline that is believed; anything longer is a mistake of `serve`.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// What `serve` must not send: a fault of the host, not of the guest.
#[derive(Debug, thiserror::Error)]
pub enum Misuse {
    /// Too many streams.
    #[error("{MAX_STREAMS} streams are open already")]
    TooManyStreams,
    /// Any other breach.
    #[error("frame of kind {kind:?} on stream {stream}: {why}")]
    Frame {
        /// The frame's stream.
        stream: u32,
        /// The frame's kind.
        kind: Kind,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// What to do about a command that overran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overdue {
    /// Tell the agent to kill the command on this stream.
    Kill(u32),
    /// Not even that helped: the VM is of no use.
    Unresponsive(u32),
}

#[derive(Debug)]
struct Stream {
    /// Payload bytes that the guest may still send.
    guest_credit: u64,
    /// Payload bytes that the host may still send.
    host_credit: u64,
    /// When the next measure is due, and whether the first was taken.
    deadline: Option<Instant>,
    killed: bool,
}

#[derive(Debug, Default)]
pub(super) struct Streams {
    open: BTreeMap<u32, Stream>,
}

/// The one field of an order to open that the worker acts on.
#[derive(Deserialize)]
struct Timeout {
    timeout_ms: Option<u64>,
}

impl Streams {
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    /// Checks a frame of the guest; `Ok(false)`: drop it.
    pub(super) fn check_guest(&mut self, frame: &Frame) -> Result<bool, GuestFault> {
        let fault = |why| {
            Err(GuestFault::Frame {
                stream: frame.stream,
                kind: frame.kind,
                why,
            })
        };
        let Some(stream) = self.open.get_mut(&frame.stream) else {
            return fault("no such stream is open");
        };
        let len = frame.payload.len() as u64;
        match frame.kind {
            Kind::Stdout | Kind::Stderr | Kind::Rich | Kind::Data => {
                let Some(left) = stream.guest_credit.checked_sub(len) else {
                    return fault("it is more than was granted");
                };
                stream.guest_credit = left;
                // An empty one would cost serve work without costing credit.
                Ok(len > 0)
            }
            Kind::Credit => {
                let Some(granted) = credit(frame) else {
                    return fault("a grant is four bytes");
                };
                stream.host_credit = stream.host_credit.saturating_add(granted);
                Ok(granted > 0)
            }
            Kind::Exit => {
                self.open.remove(&frame.stream);
                Ok(true)
            }
            Kind::Order | Kind::Report | Kind::Open | Kind::Stdin | Kind::Signal => {
                fault("that is not for the guest to send")
            }
        }
    }

    /// Checks a frame for the guest; `Ok(false)`: drop it.
    pub(super) fn check_host(&mut self, frame: &Frame, now: Instant) -> Result<bool, Misuse> {
        let misuse = |why| {
            Err(Misuse::Frame {
                stream: frame.stream,
                kind: frame.kind,
                why,
            })
        };
        if frame.kind == Kind::Open {
            return self.open(frame, now);
        }
        let Some(stream) = self.open.get_mut(&frame.stream) else {
            // Its Exit and this frame crossed each other.
            return Ok(false);
        };
        match frame.kind {
            Kind::Stdin | Kind::Data => {
                let Some(left) = stream.host_credit.checked_sub(frame.payload.len() as u64) else {
                    return misuse("it is more than the guest granted");
                };
                stream.host_credit = left;
            }
            Kind::Credit => {
                let Some(granted) = credit(frame) else {
                    return misuse("a grant is four bytes");
                };
                stream.guest_credit = stream.guest_credit.saturating_add(granted);
            }
            Kind::Signal => {}
            _ => return misuse("that is not for the host to send on a stream"),
        }
        Ok(true)
    }

    fn open(&mut self, frame: &Frame, now: Instant) -> Result<bool, Misuse> {
        let misuse = |why| {
            Err(Misuse::Frame {
                stream: frame.stream,
                kind: frame.kind,
                why,
            })
        };
        if frame.stream == CONTROL || self.open.contains_key(&frame.stream) {
            return misuse("the stream is open already");
        }
        if self.open.len() >= MAX_STREAMS {
            return Err(Misuse::TooManyStreams);
        }
        let Ok(Timeout { timeout_ms }) = serde_json::from_slice(&frame.payload) else {
            return misuse("its body is not an order to open");
        };
        let deadline = timeout_ms
            .map(|ms| Duration::from_millis(ms).min(MAX_TIMEOUT))
            .and_then(|timeout| now.checked_add(timeout + GRACE));
        let credit = u64::from(INITIAL_CREDIT);
        self.open.insert(
            frame.stream,
            Stream {
                guest_credit: credit,
                host_credit: credit,
                deadline,
                killed: false,
            },
        );
        Ok(true)
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.open
            .values()
            .filter_map(|stream| stream.deadline)
            .min()
    }

    pub(super) fn overdue(&mut self, now: Instant) -> Option<Overdue> {
        let (&number, stream) = self
            .open
            .iter_mut()
            .find(|(_, stream)| stream.deadline.is_some_and(|deadline| deadline <= now))?;
        if stream.killed {
            stream.deadline = None;
            return Some(Overdue::Unresponsive(number));
        }
        stream.killed = true;
        stream.deadline = now.checked_add(GRACE);
        Some(Overdue::Kill(number))
    }
}

fn credit(frame: &Frame) -> Option<u64> {
    let bytes: [u8; 4] = frame.payload.as_slice().try_into().ok()?;
    Some(u64::from(u32::from_le_bytes(bytes)))
}
