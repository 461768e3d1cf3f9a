//! The agent's end of the wire, seen from the engine.

use std::os::fd::BorrowedFd;

use thaw_wire::frame::{Frame, FrameError};
use thaw_wire::ring::RingError;

/// Why frames cannot be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The VM was restored; [`Link::shake_hands`] must come next, and every stream is gone.
    #[error("the VM has a new generation")]
    NewGeneration,
    /// The host broke the ring protocol.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The host broke the frame protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A device or socket failed.
    #[error("the wire failed: {0}")]
    Io(#[from] std::io::Error),
    /// The other end is gone for good (only in rehearsal).
    #[error("the other end closed the wire")]
    Closed,
}

/// A way to exchange frames with the host.
pub trait Link {
    /// Readable when the host has something to say.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Tells the host where the wire is and empties both directions.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    fn shake_hands(&mut self) -> Result<(), LinkError>;

    /// The generation that the last handshake was under.
    fn generation(&self) -> u64;

    /// Takes note that [`Self::fd`] was readable, so that it is not any more.
    ///
    /// # Errors
    /// [`LinkError::Io`] or [`LinkError::Closed`].
    fn acknowledge(&mut self) -> Result<(), LinkError>;

    /// The next frame, if one is whole.
    ///
    /// # Errors
    /// See [`LinkError`].
    fn receive(&mut self) -> Result<Option<Frame>, LinkError>;

    /// Sends a frame, or nothing when there is no room now (`Ok(false)`).
    ///
    /// # Errors
    /// See [`LinkError`].
    fn send(&mut self, frame: &Frame) -> Result<bool, LinkError>;

    /// Makes the host look at what was sent or taken since the last flush, if anything was.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    fn flush(&mut self) -> Result<(), LinkError>;
}
