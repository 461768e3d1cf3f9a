//! Messages to and from an interpreter's helper: `<u32 json length><u32 blob length>`, JSON, blob.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use serde_json::Value;

/// Longest message taken from a helper, which the user's code may impersonate: a command's rich results
/// (8 MiB at most) and the unflushed end of its output.
const MAX_MESSAGE: usize = 16 << 20;

/// One end of a message socket. Never blocks.
#[derive(Debug)]
pub struct Channel {
    socket: UnixStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Channel {
    /// A channel and the descriptor for its other end.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let channel = Self {
            socket: ours,
            incoming: Vec::new(),
            outgoing: Vec::new(),
        };
        Ok((channel, theirs.into()))
    }

    /// To poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether [`Self::write_on`] has something left to write.
    pub fn is_blocked(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Sends a message, as far as the socket takes it now.
    ///
    /// # Errors
    /// The helper is gone.
    pub fn send(&mut self, body: &impl Serialize, blob: &[u8]) -> io::Result<()> {
        let text = serde_json::to_vec(body)?;
        self.outgoing.extend((text.len() as u32).to_le_bytes());
        self.outgoing.extend((blob.len() as u32).to_le_bytes());
        self.outgoing.extend(text);
        self.outgoing.extend(blob);
        self.write_on()
    }

    /// Goes on writing what did not fit before.
    ///
    /// # Errors
    /// The helper is gone.
    pub fn write_on(&mut self) -> io::Result<()> {
        let mut written = 0;
        while written < self.outgoing.len() {
            match self.socket.write(&self.outgoing[written..]) {
                Ok(n) => written += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.outgoing.drain(..written);
        if self.outgoing.is_empty() && self.outgoing.capacity() > 64 * 1024 {
            self.outgoing = Vec::new();
        }
        Ok(())
    }

    /// Reads what is there; false at the end of the stream.
    ///
    /// # Errors
    /// The socket's failure, or a message longer than allowed.
    pub fn fill(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 8192];
        loop {
            let n = match self.socket.read(&mut bytes) {
                Ok(0) => return Ok(false),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.incoming.extend(&bytes[..n]);
            if self.incoming.len() > 2 * MAX_MESSAGE {
                return Err(io::Error::other("a helper's message is too long"));
            }
            // A short read emptied the socket: asking again would cost a system call to hear so.
            if n < bytes.len() {
                return Ok(true);
            }
        }
    }

    /// The next message that [`Self::fill`] completed.
    ///
    /// # Errors
    /// Not a message.
    pub fn take(&mut self) -> io::Result<Option<(Value, Vec<u8>)>> {
        let [j0, j1, j2, j3, b0, b1, b2, b3, ..] = self.incoming[..] else {
            return Ok(None);
        };
        let json = u32::from_le_bytes([j0, j1, j2, j3]) as usize;
        let blob = u32::from_le_bytes([b0, b1, b2, b3]) as usize;
        if json.saturating_add(blob) > MAX_MESSAGE {
            return Err(io::Error::other("a helper's message is too long"));
        }
        let whole = 8 + json + blob;
        if self.incoming.len() < whole {
            return Ok(None);
        }
        let body = serde_json::from_slice(&self.incoming[8..8 + json])?;
        let bytes = self.incoming[8 + json..whole].to_vec();
        self.incoming.drain(..whole);
        if self.incoming.is_empty() && self.incoming.capacity() > 64 * 1024 {
            self.incoming = Vec::new();
        }
        Ok(Some((body, bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_as_they_went_in_however_they_are_cut() {
        let (mut ours, theirs) = Channel::pair().unwrap();
        let mut theirs = UnixStream::from(theirs);
        let blob = vec![7; 300_000];
        ours.send(&serde_json::json!({"op": "x"}), &blob).unwrap();
        let mut seen = vec![0; 8 + 10 + blob.len()];
        let mut at = 0;
        while at < seen.len() {
            at += theirs.read(&mut seen[at..]).unwrap();
            ours.write_on().unwrap();
        }
        for byte in &seen[..200] {
            theirs.write_all(&[*byte]).unwrap();
            ours.fill().unwrap();
        }
        assert!(ours.take().unwrap().is_none());
        for rest in seen[200..].chunks(8192) {
            theirs.write_all(rest).unwrap();
            ours.fill().unwrap();
        }
        let (body, bytes) = ours.take().unwrap().unwrap();
        assert_eq!(body["op"], "x");
        assert_eq!(bytes, blob);
    }

    #[test]
    fn a_monstrous_message_is_refused() {
        let (mut ours, theirs) = Channel::pair().unwrap();
        UnixStream::from(theirs).write_all(&[0xff; 16]).unwrap();
        ours.fill().unwrap();
        assert!(ours.take().is_err());
    }
}
