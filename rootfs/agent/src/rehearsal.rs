//! A link over an inherited socket: the engine without a VM, for tests and development.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use thaw_wire::frame::{Frame, HEADER, Header};
use thaw_wire::message::Renew;

use crate::identity::{Proof, RenewError};
use crate::link::{Link, LinkError};

/// Bytes taken off the socket at once.
const AT_ONCE: usize = 256 << 10;

/// Stands in for the kernel's part of a renewal, which is none of a rehearsal's business.
///
/// # Errors
/// A malformed seed, as the real one.
pub fn renew(order: &Renew) -> Result<Proof, RenewError> {
    crate::identity::from_hex::<32>(&order.seed).ok_or(RenewError::Malformed("seed"))?;
    Ok(Proof {
        wall_ns: order.wall_ns,
        sample: "00".repeat(16),
    })
}

/// Frames over a stream socket.
#[derive(Debug)]
pub struct Rehearsal {
    socket: UnixStream,
    incoming: Vec<u8>,
    /// Bytes of it that were taken.
    taken: usize,
}

impl Rehearsal {
    /// A link over the socket that is this process's standard input.
    ///
    /// # Errors
    /// It is none, or cannot be made non-blocking.
    pub fn over_stdin() -> io::Result<Self> {
        let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            incoming: Vec::new(),
            taken: 0,
        })
    }
}

impl Link for Rehearsal {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn shake_hands(&mut self) -> Result<(), LinkError> {
        Ok(())
    }

    fn generation(&self) -> u64 {
        0
    }

    fn acknowledge(&mut self) -> Result<(), LinkError> {
        self.incoming.drain(..std::mem::take(&mut self.taken));
        let have = self.incoming.len();
        self.incoming.resize(have + AT_ONCE, 0);
        let read = self.socket.read(&mut self.incoming[have..]);
        self.incoming.truncate(have + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => Err(LinkError::Closed),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn receive(&mut self) -> Result<Option<Frame>, LinkError> {
        let Some((bytes, rest)) = self.incoming[self.taken..].split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let header = Header::decode(*bytes)?;
        let Some(payload) = rest.get(..header.len as usize) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.taken += HEADER + payload.len();
        Ok(Some(Frame {
            stream: header.stream,
            kind: header.kind,
            payload,
        }))
    }

    fn send(&mut self, frame: &Frame) -> Result<bool, LinkError> {
        let mut bytes = frame.header().encode().to_vec();
        bytes.extend(&frame.payload);
        // A rehearsal's host always reads on, so waiting for room is simple and cannot deadlock.
        self.socket.set_nonblocking(false)?;
        self.socket.write_all(&bytes)?;
        self.socket.set_nonblocking(true)?;
        Ok(true)
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        Ok(())
    }
}
