//! A stopped machine as bytes: which machine's, a version, then the state itself.

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How one machine's states are written.
#[derive(Debug)]
pub(super) struct Format {
    /// First bytes of every blob.
    pub magic: [u8; 8],
    /// Version of what follows, counted up when its meaning changes.
    pub version: u32,
    /// Longest blob that is written or read, bytes.
    pub most: usize,
    /// The machine's name.
    pub machine: &'static str,
}

impl Format {
    /// The blob of a state.
    pub(super) fn encode(&self, state: &impl Serialize) -> anyhow::Result<Vec<u8>> {
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        let bytes = postcard::to_extend(state, bytes).context("encoding the VM's state")?;
        ensure!(
            bytes.len() <= self.most,
            "the VM's state has {} bytes, more than the {} that a restore would take",
            bytes.len(),
            self.most
        );
        Ok(bytes)
    }

    /// The state in a blob; what it says is the machine's to check.
    pub(super) fn decode<State: DeserializeOwned>(&self, bytes: &[u8]) -> anyhow::Result<State> {
        ensure!(
            bytes.len() <= self.most,
            "the VM's state has {} bytes, no state has more than {}",
            bytes.len(),
            self.most
        );
        let rest = bytes
            .strip_prefix(&self.magic)
            .with_context(|| format!("this is not the state of a machine {}", self.machine))?;
        let (version, rest) = rest
            .split_first_chunk::<4>()
            .context("the VM's state is truncated")?;
        let version = u32::from_le_bytes(*version);
        if version != self.version {
            bail!(
                "the VM's state has version {version}, this thaw reads {}: build the template anew",
                self.version
            );
        }
        postcard::from_bytes(rest).context("the VM's state is damaged")
    }
}
