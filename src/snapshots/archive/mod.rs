//! A snapshot as one file, to be carried to another host.
//!
//! It is a tar archive in zstd, which `tar --zstd -tvf FILE` lists. Its entries, in this order:
//!
//! | entry | what |
//! |---|---|
//! | `manifest.json` | the snapshot's manifest, with the digests of everything below |
//! | `state` | everything but memory |
//! | `map` | the page map |
//! | `base` | the base's pages that are not zeroes: `u64` number, little-endian, and 4096 bytes of each, ascending |
//! | `chunks/<name>` | each chunk, in the manifest's order |
//!
//! Every entry is a zstd frame of its own with a checksum, and so is the archive's end. An export that broke off goes
//! on after its last whole frame; an import that broke off has kept every entry that it had checked.

mod export;
mod import;
mod stage;
#[cfg(test)]
mod tests;

pub use export::Export;
pub use import::{Import, Imported};

pub(super) use stage::sweep;

use super::manifest::MAP;
use crate::layers::PAGE;
use crate::template::manifest::{FILE, STATE};

/// Name of the entry with the base.
const BASE: &str = "base";

/// Bytes of a page of the base: its number, and what is in it.
const NUMBERED: u64 = 8 + PAGE as u64;

/// Blocks of a tar archive, bytes.
const BLOCK: u64 = 512;

/// An archive ends with two blocks of zeroes.
const END: [u8; 2 * BLOCK as usize] = [0; 2 * BLOCK as usize];

/// Name of a chunk's entry.
fn chunk_entry(name: &crate::layers::Digest) -> String {
    format!("chunks/{}", name.as_str())
}
