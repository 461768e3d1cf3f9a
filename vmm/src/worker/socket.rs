//! The worker's end of the socket to `serve`: frames in with their descriptors, frames out in batches.
//!
//! Never blocks. What the socket does not take now stays in a bounded buffer, and a full buffer
//! is the sign to stop draining the guest's ring.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send};
use thaw_wire::frame::{Frame, FrameError, HEADER, Header, MAX_PAYLOAD};

/// Bytes that may wait for the socket before the guest's ring is left alone: one ring's worth.
const MAX_OUTGOING: usize = 256 * 1024;

/// Bytes read at once. Small, because most messages are and the buffer is this worker's own memory.
const READ: usize = 16 * 1024;

/// Descriptors that may come with one order. `Restore` has the most: state, memory, map, working set, and the files
/// that its memory lies in. The kernel's own limit is 253.
const MAX_FDS: usize = crate::snapshot::MAX_FILES + 4;

/// Why there is nothing more to say to `serve`.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// It closed its end: it is gone, or wants this worker gone.
    #[error("the other end is closed")]
    Closed,
    /// What it sent is no frame.
    #[error("the other end broke the protocol: {0}")]
    Frame(#[from] FrameError),
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
}

/// The socket and what waits at it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    incoming: Vec<u8>,
    /// Bytes at the front of `incoming` that are parsed already.
    parsed: usize,
    fds: VecDeque<OwnedFd>,
    outgoing: Vec<u8>,
    sent: usize,
}

impl Socket {
    /// Takes over a connected, non-blocking socket.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            incoming: Vec::new(),
            parsed: 0,
            fds: VecDeque::new(),
            outgoing: Vec::new(),
            sent: 0,
        }
    }

    /// The socket itself.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Reads what is there, at most one buffer of it. `Ok(false)` when there was nothing.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn fill(&mut self) -> Result<bool, SocketError> {
        self.incoming.drain(..std::mem::take(&mut self.parsed));
        let mut bytes = [0; READ];
        let mut space = cmsg_space!([i32; MAX_FDS]);
        let (count, received) = {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let message = match recvmsg::<()>(
                self.fd.as_raw_fd(),
                &mut parts,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(message) => message,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
                Err(Errno::ECONNRESET) => return Err(SocketError::Closed),
                Err(errno) => return Err(SocketError::Io(errno.into())),
            };
            let mut received = Vec::new();
            for part in message.cmsgs().map_err(io::Error::from)? {
                if let ControlMessageOwned::ScmRights(fds) = part {
                    received.extend(fds);
                }
            }
            (message.bytes, received)
        };
        for fd in received {
            // SAFETY: the kernel has just made this descriptor for this process, and nobody else knows its number.
            self.fds.push_back(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        if count == 0 {
            return Err(SocketError::Closed);
        }
        self.incoming.extend_from_slice(&bytes[..count]);
        Ok(true)
    }

    /// The next whole frame that was read.
    ///
    /// # Errors
    /// The bytes are no frame.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, SocketError> {
        let rest = &self.incoming[self.parsed..];
        let Some((header, rest)) = rest.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let header = Header::decode(*header)?;
        let Some(payload) = rest.get(..header.len as usize) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.parsed += HEADER + payload.len();
        Ok(Some(Frame {
            stream: header.stream,
            kind: header.kind,
            payload,
        }))
    }

    /// The next descriptor that came with an order.
    pub fn take_fd(&mut self) -> Option<OwnedFd> {
        self.fds.pop_front()
    }

    /// Closes descriptors that no order wanted.
    pub fn forget_fds(&mut self) {
        self.fds.clear();
    }

    /// Whether another frame of the guest may be queued.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.outgoing.len() - self.sent <= MAX_OUTGOING - HEADER - MAX_PAYLOAD
    }

    /// Whether bytes wait for the socket to take them.
    #[must_use]
    pub fn is_clogged(&self) -> bool {
        self.sent < self.outgoing.len()
    }

    /// Queues a frame; [`Self::flush`] sends it.
    pub fn queue(&mut self, frame: &Frame) {
        self.outgoing.extend_from_slice(&frame.header().encode());
        self.outgoing.extend_from_slice(&frame.payload);
    }

    /// Sends as much as the socket takes now.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn flush(&mut self) -> Result<(), SocketError> {
        while self.sent < self.outgoing.len() {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match send(self.fd.as_raw_fd(), &self.outgoing[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(SocketError::Closed),
                Err(errno) => return Err(SocketError::Io(errno.into())),
            }
        }
        self.sent = 0;
        self.outgoing.clear();
        // A burst's buffer would count as this session's memory for ever.
        self.outgoing.shrink_to(READ);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use thaw_wire::frame::Kind;

    fn pair() -> (Socket, Socket) {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        (Socket::new(a), Socket::new(b))
    }

    #[test]
    fn frames_pass_whole_even_when_they_do_not_fit_the_socket_at_once() {
        let (mut a, mut b) = pair();
        let sent: Vec<Frame> = (0..40)
            .map(|n| {
                Frame::new(
                    n,
                    Kind::Stdout,
                    vec![n as u8; (n as usize * 1999) % MAX_PAYLOAD],
                )
            })
            .collect();
        let mut queue = sent.iter();
        let mut got = Vec::new();
        while got.len() < sent.len() {
            while a.has_room() {
                match queue.next() {
                    Some(frame) => a.queue(frame),
                    None => break,
                }
            }
            a.flush().unwrap();
            b.fill().unwrap();
            while let Some(frame) = b.next_frame().unwrap() {
                got.push(frame);
            }
        }
        assert_eq!(got, sent);
        assert!(!a.is_clogged());
    }

    #[test]
    fn a_closed_end_is_noticed_and_rubbish_is_refused() {
        let (mut a, b) = pair();
        drop(b);
        assert!(matches!(a.fill(), Err(SocketError::Closed)));
        let (mut a, b) = pair();
        nix::unistd::write(b.fd(), &[0xff; 64]).unwrap();
        assert!(a.fill().unwrap());
        assert!(matches!(a.next_frame(), Err(SocketError::Frame(_))));
    }
}
