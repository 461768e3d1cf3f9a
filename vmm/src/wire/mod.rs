//! The host's end of the wire.
//!
//! [`Wire`] owns both rings' host ends and the table of open streams. It checks every frame of
//! the guest before anybody else sees it: whoever breaks the protocol gets a [`GuestFault`],
//! which ends that VM and nothing else. Nothing is allocated on the guest's word beyond one
//! frame's payload, which [`thaw_wire::frame::MAX_PAYLOAD`] bounds.

mod header;
mod shared;
mod streams;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Instant;

use thaw_wire::frame::{CONTROL, Frame, Kind};
use thaw_wire::layout::{KICK, PAGE};
use thaw_wire::message;
use thaw_wire::ring::{Consumer, Producer, RingError};

pub use header::HeaderError;
pub use streams::{MAX_STREAMS, Misuse, Overdue};

use crate::memory::{GuestMemory, MemoryError};
use header::Header;
use shared::PagedRing;
use streams::Streams;

/// Doorbells in a row that may bring nothing. An honest agent rings in vain at most once per
/// frame taken late; at about 25 us each this much nonsense costs its own vCPU a tenth of a second.
pub const MAX_EMPTY_RINGS: u32 = 4096;

/// Handshakes of one generation. An honest agent needs one, and another when it is restored midway.
pub const MAX_HANDSHAKES: u32 = 16;

/// What no correct guest does. The VM must end.
#[derive(Debug, thiserror::Error)]
pub enum GuestFault {
    /// The header page makes no sense.
    #[error("the agent's handshake is invalid: {0}")]
    Handshake(#[from] HeaderError),
    /// Too many handshakes, or one while commands run.
    #[error("the agent shook hands again: {0}")]
    Again(&'static str),
    /// A ring's positions or bytes are impossible.
    #[error("the wire's ring is broken: {0}")]
    Ring(#[from] RingError),
    /// A frame that the host must never get.
    #[error("the guest sent a frame of kind {kind:?} on stream {stream}: {why}")]
    Frame {
        /// The frame's stream.
        stream: u32,
        /// The frame's kind.
        kind: Kind,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The doorbell rang too often for nothing.
    #[error("the guest rang the doorbell {MAX_EMPTY_RINGS} times for nothing")]
    Doorbell,
    /// The header page cannot be accessed any more.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What came out of the guest's ring.
#[derive(Debug)]
pub enum Heard {
    /// A report of the agent.
    Report(message::Report),
    /// A frame of an open stream, to be passed on as it is.
    Relay(Frame),
}

#[derive(Debug)]
struct Rings {
    from_guest: Consumer<PagedRing>,
    to_guest: Producer<PagedRing>,
}

/// One VM's wire.
#[derive(Debug)]
pub struct Wire {
    memory: Arc<GuestMemory>,
    generation: u64,
    /// Guest-physical address of the header page, once one is known.
    header: Option<u64>,
    rings: Option<Rings>,
    streams: Streams,
    /// Orders that the agent has not answered yet.
    unanswered: u32,
    /// The handshake's `Ready` is still to come.
    ready_due: bool,
    empty_rings: u32,
    handshakes: u32,
}

impl Wire {
    /// The wire of a VM that boots: generation 0, no header page yet.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory,
            generation: 0,
            header: None,
            rings: None,
            streams: Streams::default(),
            unanswered: 0,
            ready_due: false,
            empty_rings: 0,
            handshakes: 0,
        }
    }

    /// The wire of a VM that was restored: writes the new generation into the header page that
    /// the snapshot names. Nothing is exchanged before the agent has shaken hands anew.
    ///
    /// # Errors
    /// The page lies outside the memory.
    pub fn restored(
        memory: Arc<GuestMemory>,
        generation: u64,
        header: u64,
    ) -> Result<Self, MemoryError> {
        header::write_generation(&memory, header, generation)?;
        let mut wire = Self::new(memory);
        wire.generation = generation;
        wire.header = Some(header);
        Ok(wire)
    }

    /// Guest-physical address of the header page, for the snapshot.
    #[must_use]
    pub fn header(&self) -> Option<u64> {
        self.header
    }

    /// Whether frames can be exchanged.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.rings.is_some()
    }

    /// Commands that run.
    #[must_use]
    pub fn open_streams(&self) -> usize {
        self.streams.len()
    }

    /// The agent rang with this word. `Ok(true)` asks for the wire's interrupt: the agent shook
    /// hands under another generation and must look again.
    ///
    /// # Errors
    /// See [`GuestFault`].
    pub fn rung(&mut self, word: u32) -> Result<bool, GuestFault> {
        self.empty_rings += 1;
        if self.empty_rings > MAX_EMPTY_RINGS {
            return Err(GuestFault::Doorbell);
        }
        if word == KICK {
            return Ok(false);
        }
        self.shake_hands(u64::from(word) * PAGE as u64)
    }

    fn shake_hands(&mut self, address: u64) -> Result<bool, GuestFault> {
        self.handshakes += 1;
        if self.handshakes > MAX_HANDSHAKES {
            return Err(GuestFault::Again("too often in one generation"));
        }
        if self.streams.len() > 0 {
            return Err(GuestFault::Again("while a command runs"));
        }
        self.rings = None;
        let header = Header::read(&self.memory, address)?;
        self.header = Some(address);
        if header.generation != self.generation {
            header::write_generation(&self.memory, address, self.generation)?;
            return Ok(true);
        }
        let (from_guest, to_guest) = header.rings(&self.memory, address);
        self.rings = Some(Rings {
            from_guest: Consumer::new(from_guest),
            to_guest: Producer::new(to_guest),
        });
        self.ready_due = true;
        Ok(false)
    }

    /// The next thing that the guest said, checked; `None` when there is none.
    ///
    /// # Errors
    /// See [`GuestFault`].
    pub fn hear(&mut self) -> Result<Option<Heard>, GuestFault> {
        loop {
            let Some(rings) = &mut self.rings else {
                return Ok(None);
            };
            let Some(frame) = rings.from_guest.take()? else {
                return Ok(None);
            };
            self.empty_rings = 0;
            if frame.stream == CONTROL {
                return Ok(Some(Heard::Report(self.report(&frame)?)));
            }
            if self.streams.check_guest(&frame)? {
                return Ok(Some(Heard::Relay(frame)));
            }
        }
    }

    fn report(&mut self, frame: &Frame) -> Result<message::Report, GuestFault> {
        let fault = |why| GuestFault::Frame {
            stream: frame.stream,
            kind: frame.kind,
            why,
        };
        if frame.kind != Kind::Report {
            return Err(fault("the control stream carries reports alone"));
        }
        let report: message::Report = serde_json::from_slice(&frame.payload)
            .map_err(|_| fault("it is not a report that this version knows"))?;
        if let message::Report::Ready(ready) = &report {
            if !std::mem::take(&mut self.ready_due) {
                return Err(fault("nobody shook hands"));
            }
            if ready.generation != self.generation {
                return Err(fault("it is of another generation"));
            }
        } else if self.ready_due {
            return Err(fault("the first frame must say ready"));
        } else {
            self.unanswered = self
                .unanswered
                .checked_sub(1)
                .ok_or_else(|| fault("nobody asked"))?;
        }
        Ok(report)
    }

    /// Checks a frame that `serve` wants the guest to have, and takes note of it. `Ok(false)`: the
    /// frame is late (its stream has ended) and must be dropped.
    ///
    /// # Errors
    /// What `serve` must not send.
    pub fn admit(&mut self, frame: &Frame, now: Instant) -> Result<bool, Misuse> {
        self.streams.check_host(frame, now)
    }

    /// Takes note of an order that is about to be put: the agent owes an answer.
    pub fn expect_answer(&mut self) {
        self.unanswered = self.unanswered.saturating_add(1);
    }

    /// Puts a frame into the guest's ring; `Ok(false)` when there is no room now.
    ///
    /// # Errors
    /// See [`GuestFault`].
    pub fn put(&mut self, frame: &Frame) -> Result<bool, GuestFault> {
        let Some(rings) = &mut self.rings else {
            return Ok(false);
        };
        let put = rings.to_guest.put(frame)?;
        if put {
            self.empty_rings = 0;
        }
        Ok(put)
    }

    /// When the next command overruns even the worker's patience.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.streams.next_deadline()
    }

    /// A command that has overrun; ask again until there is none.
    pub fn overdue(&mut self, now: Instant) -> Option<Overdue> {
        self.streams.overdue(now)
    }
}
