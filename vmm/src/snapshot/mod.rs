//! Freezing a VM into files and reading them back.
//!
//! | file | what it holds |
//! |---|---|
//! | `state` | [`State`]: the machine's registers and devices, and where the wire is |
//! | `memory` | guest memory, byte for byte at its guest-physical address, sparse |
//! | `map` | [`PageMap`]: which pages lie in which files over a base |
//! | `working_set` | pages that a first command writes ([`working_set`]) |
//!
//! A worker gets them as open descriptors and knows no names; the directory that they make up,
//! its manifest and the digests are the business of whoever keeps snapshots.

mod memory;
mod page_map;
mod state;
pub mod working_set;

pub use memory::{FrozenMemory, SavedMemory, save as save_memory, save_private};
pub use page_map::{Extent, MAX_FILES, PageMap, ZERO};
pub use state::State;

/// Why a snapshot cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file system refused.
    #[error("snapshot: {what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The refusal.
        source: std::io::Error,
    },
    /// The bytes are no state file of this version.
    #[error("the snapshot is damaged: {0}; remove it, and thaw makes another")]
    Damaged(String),
    /// Guest memory could not be read.
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> SnapshotError {
    move |source| SnapshotError::Io { what, source }
}
