//! Frames: `{stream u32, kind u16, flags u16, len u32}` and `len` bytes of payload.

/// Bytes of a frame header on the wire.
pub const HEADER: usize = 12;

/// Longest payload of one frame in bytes. A quarter of the ring, so that a sender can always
/// put a whole frame in a ring that its peer keeps draining; longer data is split.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// Bytes that a sender may have in flight on a new stream before it is granted
/// [`Kind::Credit`]. Applies to [`Kind::Stdin`], [`Kind::Stdout`], [`Kind::Stderr`],
/// [`Kind::Rich`] and [`Kind::Data`] payloads.
pub const INITIAL_CREDIT: u32 = 128 * 1024;

/// The stream of orders and reports about the VM itself.
pub const CONTROL: u32 = 0;

/// What a frame means. The number is the wire's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// JSON [`crate::message::Order`] on [`CONTROL`], host to guest.
    Order = 1,
    /// JSON [`crate::message::Report`] on [`CONTROL`], guest to host.
    Report = 2,
    /// JSON [`crate::message::Open`], host to guest: starts the stream.
    Open = 3,
    /// Bytes for a command's standard input, host to guest; an empty payload is end of file.
    Stdin = 4,
    /// Bytes a command wrote to its standard output, guest to host.
    Stdout = 5,
    /// Bytes a command wrote to its standard error, guest to host.
    Stderr = 6,
    /// A piece of the JSON array of a command's [`crate::message::RichResult`]s, guest to host.
    Rich = 7,
    /// JSON [`crate::message::Exit`], guest to host: the stream's last frame.
    Exit = 8,
    /// `u32` little-endian, either way: that many more payload bytes may be sent.
    Credit = 9,
    /// JSON [`crate::message::Signal`], host to guest.
    Signal = 10,
    /// Raw bytes of a stream that is neither input nor output of a command, either way.
    Data = 11,
}

impl Kind {
    /// The kind with this number, if there is one.
    pub fn from_wire(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Order,
            2 => Self::Report,
            3 => Self::Open,
            4 => Self::Stdin,
            5 => Self::Stdout,
            6 => Self::Stderr,
            7 => Self::Rich,
            8 => Self::Exit,
            9 => Self::Credit,
            10 => Self::Signal,
            11 => Self::Data,
            _ => return None,
        })
    }

    /// Whether payload bytes of this kind spend credit.
    pub fn spends_credit(self) -> bool {
        matches!(
            self,
            Self::Stdin | Self::Stdout | Self::Stderr | Self::Rich | Self::Data
        )
    }
}

/// A decoded frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The stream that the frame belongs to.
    pub stream: u32,
    /// What the payload is.
    pub kind: Kind,
    /// Payload length in bytes, at most [`MAX_PAYLOAD`].
    pub len: u32,
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The kind is not one this version knows.
    #[error("frame of unknown kind {0}")]
    UnknownKind(u16),
    /// The payload length is over [`MAX_PAYLOAD`].
    #[error("frame announces {0} bytes, more than the {MAX_PAYLOAD} allowed")]
    TooLong(u32),
}

impl Header {
    /// The header's bytes.
    pub fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..4].copy_from_slice(&self.stream.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// Reads a header. Flags are reserved: written as zero, ignored when read.
    pub fn decode(bytes: [u8; HEADER]) -> Result<Self, FrameError> {
        let [s0, s1, s2, s3, k0, k1, _, _, l0, l1, l2, l3] = bytes;
        let number = u16::from_le_bytes([k0, k1]);
        let kind = Kind::from_wire(number).ok_or(FrameError::UnknownKind(number))?;
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        if len as usize > MAX_PAYLOAD {
            return Err(FrameError::TooLong(len));
        }
        Ok(Self {
            stream: u32::from_le_bytes([s0, s1, s2, s3]),
            kind,
            len,
        })
    }
}

/// One whole frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The stream that the frame belongs to.
    pub stream: u32,
    /// What the payload is.
    pub kind: Kind,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame of these parts.
    ///
    /// # Panics
    /// If the payload is over [`MAX_PAYLOAD`]: splitting is the caller's work.
    pub fn new(stream: u32, kind: Kind, payload: Vec<u8>) -> Self {
        assert!(
            payload.len() <= MAX_PAYLOAD,
            "a frame's payload is at most {MAX_PAYLOAD} bytes"
        );
        Self {
            stream,
            kind,
            payload,
        }
    }

    /// A frame whose payload is `body` as JSON.
    ///
    /// # Errors
    /// If the JSON is over [`MAX_PAYLOAD`] bytes.
    pub fn json<T: serde::Serialize>(
        stream: u32,
        kind: Kind,
        body: &T,
    ) -> Result<Self, serde_json::Error> {
        let payload = serde_json::to_vec(body)?;
        if payload.len() > MAX_PAYLOAD {
            return Err(<serde_json::Error as serde::ser::Error>::custom(
                "message is longer than a frame",
            ));
        }
        Ok(Self {
            stream,
            kind,
            payload,
        })
    }

    /// A grant of `bytes` more on `stream`.
    pub fn credit(stream: u32, bytes: u32) -> Self {
        Self {
            stream,
            kind: Kind::Credit,
            payload: bytes.to_le_bytes().to_vec(),
        }
    }

    /// The frame's header.
    pub fn header(&self) -> Header {
        // Construction keeps payloads within MAX_PAYLOAD, far below u32::MAX.
        Header {
            stream: self.stream,
            kind: self.kind,
            len: self.payload.len() as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic_and_what_decodes_encodes_back(bytes: [u8; HEADER]) {
            if let Ok(header) = Header::decode(bytes) {
                prop_assert!(header.len as usize <= MAX_PAYLOAD);
                let mut canonical = bytes;
                canonical[6..8].fill(0);
                prop_assert_eq!(header.encode(), canonical);
            }
        }
    }

    #[test]
    fn every_kind_survives_the_wire() {
        for number in 0..=u16::MAX {
            if let Some(kind) = Kind::from_wire(number) {
                assert_eq!(kind as u16, number);
            }
        }
        assert_eq!(Kind::from_wire(0), None);
    }
}
