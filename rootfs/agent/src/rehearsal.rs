//! A link over an inherited socket: the engine without a VM, for tests and development.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use thaw_wire::frame::{Frame, HEADER, Header};
use thaw_wire::message::Renew;

use crate::identity::{Proof, RenewError};
use crate::link::{Link, LinkError};

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
    incoming: VecDeque<u8>,
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
            incoming: VecDeque::new(),
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
        let mut bytes = vec![0; 64 * 1024];
        match self.socket.read(&mut bytes) {
            Ok(0) => Err(LinkError::Closed),
            Ok(n) => {
                self.incoming.extend(&bytes[..n]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn receive(&mut self) -> Result<Option<Frame>, LinkError> {
        let mut bytes = [0; HEADER];
        if self.incoming.len() < HEADER {
            return Ok(None);
        }
        for (to, from) in bytes.iter_mut().zip(&self.incoming) {
            *to = *from;
        }
        let header = Header::decode(bytes)?;
        let whole = HEADER + header.len as usize;
        if self.incoming.len() < whole {
            return Ok(None);
        }
        let payload = self.incoming.drain(..whole).skip(HEADER).collect();
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
