//! The `state` file: what the worker and the machine must know besides memory.
//!
//! `THAWSTAT`, `u32` version, `u32` length of a JSON head, the head, the machine's own blob to the
//! end of the file. All little-endian. The whole file is capped before anything is decoded.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::{SnapshotError, io};
use crate::machine::MachineKind;

const MAGIC: &[u8; 8] = b"THAWSTAT";
const VERSION: u32 = 1;

/// Largest state file: a machine's blob is some KiB (registers, one XSAVE area of at most 11 KiB,
/// event channels), so this is a hundredfold.
const MAX_BYTES: u64 = 4 * 1024 * 1024;

/// A VM without its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// How the VM runs its kernel.
    pub machine: MachineKind,
    /// Size of its memory file, bytes.
    pub memory_bytes: u64,
    /// Guest-physical address of the wire's header page.
    pub wire_header: u64,
    /// The machine's own state.
    pub blob: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    machine: MachineKind,
    memory_bytes: u64,
    wire_header: u64,
}

impl State {
    /// Writes an empty file; returns its length in bytes.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, file: &File) -> Result<u64, SnapshotError> {
        let head = serde_json::to_vec(&Head {
            machine: self.machine,
            memory_bytes: self.memory_bytes,
            wire_header: self.wire_header,
        })
        .map_err(|error| io("encoding the state")(error.into()))?;
        let mut bytes = Vec::with_capacity(16 + head.len() + self.blob.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(head.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(&self.blob);
        file.write_all_at(&bytes, 0)
            .map_err(io("writing the state"))?;
        Ok(bytes.len() as u64)
    }

    /// Reads the file.
    ///
    /// # Errors
    /// [`SnapshotError::Damaged`] for anything but a state file of this version.
    pub fn read(file: &File) -> Result<Self, SnapshotError> {
        let length = file.metadata().map_err(io("reading the state"))?.len();
        if length > MAX_BYTES {
            return Err(SnapshotError::Damaged("its state file is too long".into()));
        }
        // Workers that are restored at the same time share the descriptor's position: never use it.
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0)
            .map_err(io("reading the state"))?;
        Self::decode(&bytes)
    }

    /// Decodes a file's bytes.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn decode(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let damaged = |why: &str| SnapshotError::Damaged(format!("its state file {why}"));
        let rest = bytes
            .strip_prefix(MAGIC)
            .ok_or_else(|| damaged("does not begin as one"))?;
        let (version, rest) = rest
            .split_first_chunk::<4>()
            .ok_or_else(|| damaged("is cut off"))?;
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(damaged(&format!(
                "has version {version}, this thaw reads {VERSION}"
            )));
        }
        let (length, rest) = rest
            .split_first_chunk::<4>()
            .ok_or_else(|| damaged("is cut off"))?;
        let (head, blob) = rest
            .split_at_checked(u32::from_le_bytes(*length) as usize)
            .ok_or_else(|| damaged("is cut off"))?;
        let head: Head = serde_json::from_slice(head)
            .map_err(|error| damaged(&format!("has no head: {error}")))?;
        Ok(Self {
            machine: head.machine,
            memory_bytes: head.memory_bytes,
            wire_header: head.wire_header,
            blob: blob.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            machine: MachineKind::Pv,
            memory_bytes: 1 << 28,
            wire_header: 0x1234000,
            blob: vec![7; 3000],
        }
    }

    #[test]
    fn a_state_survives_its_file() {
        let file = tempfile();
        let length = state().write(&file).unwrap();
        assert_eq!(length, file.metadata().unwrap().len());
        assert_eq!(State::read(&file).unwrap(), state());
    }

    #[test]
    fn a_cut_or_foreign_file_is_refused() {
        let file = tempfile();
        state().write(&file).unwrap();
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        for cut in 0..60 {
            assert!(State::decode(&bytes[..cut]).is_err(), "{cut}");
        }
        bytes[8] = 99;
        let error = State::decode(&bytes).unwrap_err().to_string();
        assert!(error.contains("version 99"), "{error}");
    }

    fn tempfile() -> File {
        let fd =
            nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::empty()).unwrap();
        File::from(fd)
    }
}
