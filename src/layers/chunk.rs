//! Chunks: files of pages, named by what is in them.
//!
//! A chunk is its pages, then the SHA-256 of each page, then 16 bytes: `THAWPAGE`, `u32` version, `u32` number
//! of pages, little-endian. Its name is the SHA-256 of everything after the pages. So a chunk is checked against
//! its name, and a page that is damaged is known by its number.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, bail};
use sha2::{Digest as _, Sha256};

use super::PAGE;

const MAGIC: &[u8; 8] = b"THAWPAGE";
const VERSION: u32 = 1;
const FOOT: usize = 16;
const HASH: usize = 32;

/// Pages that are read at a time: 1 MiB.
const BATCH: usize = 256;

/// A chunk's name: 64 hexadecimal digits.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() == 2 * HASH && text.bytes().all(hex) {
            return Ok(Self(text));
        }
        Err(format!("{text:?} is not a digest of 64 hexadecimal digits"))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

/// What is wrong with a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// These pages of it, by their places, are not what was written.
    Pages(Vec<u64>),
    /// It is no chunk, or another one.
    Whole(String),
}

/// Writes a chunk, page by page, into an empty file.
#[derive(Debug)]
pub(super) struct Writer {
    file: File,
    buffer: Vec<u8>,
    written: u64,
    hashes: Vec<u8>,
}

impl Writer {
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            buffer: Vec::with_capacity(BATCH * PAGE),
            written: 0,
            hashes: Vec::new(),
        }
    }

    /// Adds a page; gives its place.
    pub(super) fn add(&mut self, page: &[u8; PAGE]) -> anyhow::Result<u64> {
        let slot = (self.hashes.len() / HASH) as u64;
        self.buffer.extend_from_slice(page);
        self.hashes.extend_from_slice(&Sha256::digest(page));
        if self.buffer.len() >= BATCH * PAGE {
            self.flush()?;
        }
        Ok(slot)
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        self.file
            .write_all_at(&self.buffer, self.written)
            .context("cannot write a chunk")?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Writes what is left; gives the file, its name and its length.
    pub(super) fn finish(mut self) -> anyhow::Result<(File, Digest, u64)> {
        self.flush()?;
        let mut tail = std::mem::take(&mut self.hashes);
        let pages = u32::try_from(tail.len() / HASH).context("a chunk is too long")?;
        tail.extend_from_slice(MAGIC);
        tail.extend_from_slice(&VERSION.to_le_bytes());
        tail.extend_from_slice(&pages.to_le_bytes());
        self.buffer = tail;
        let name = Digest(hex::encode(Sha256::digest(&self.buffer)));
        self.flush()?;
        Ok((self.file, name, self.written))
    }
}

/// How many pages a chunk of this length has; `None`: no chunk has it.
pub fn chunk_pages(bytes: u64) -> Option<u64> {
    let pages = bytes.checked_sub(FOOT as u64)?;
    let each = (PAGE + HASH) as u64;
    (pages % each == 0).then_some(pages / each)
}

/// The hashes of a chunk's pages, checked against its name.
fn hashes(file: &File, name: &Digest) -> anyhow::Result<Vec<u8>> {
    let length = file.metadata().context("cannot look at it")?.len();
    let mut foot = [0; FOOT];
    let at = length.checked_sub(FOOT as u64).context("it is too short")?;
    file.read_exact_at(&mut foot, at)
        .context("cannot read it")?;
    let number =
        |at: usize| u32::from_le_bytes([foot[at], foot[at + 1], foot[at + 2], foot[at + 3]]);
    if &foot[..8] != MAGIC || number(8) != VERSION {
        bail!("it does not end as one");
    }
    let pages = u64::from(number(12));
    if chunk_pages(length) != Some(pages) {
        bail!("it has another length than it says");
    }
    let mut tail = vec![0; usize::try_from(length - pages * PAGE as u64)?];
    file.read_exact_at(&mut tail, pages * PAGE as u64)
        .context("cannot read it")?;
    if hex::encode(Sha256::digest(&tail)) != name.0 {
        bail!("it is not what its name says");
    }
    tail.truncate(tail.len() - FOOT);
    Ok(tail)
}

/// Reads all of a chunk and compares it with its name. `Ok(None)`: it is sound. `each` hears of the bytes read.
pub(super) fn verify(
    file: &File,
    name: &Digest,
    mut each: impl FnMut(u64),
) -> anyhow::Result<Option<Damage>> {
    let hashes = match hashes(file, name) {
        Ok(hashes) => hashes,
        Err(error) => return Ok(Some(Damage::Whole(format!("{error:#}")))),
    };
    let mut buffer = vec![0; BATCH * PAGE];
    let mut damaged = Vec::new();
    for (batch, hashes) in (0_u64..).zip(hashes.chunks(BATCH * HASH)) {
        let pages = &mut buffer[..hashes.len() / HASH * PAGE];
        file.read_exact_at(pages, batch * (BATCH * PAGE) as u64)
            .context("cannot read a chunk")?;
        let pairs = pages.chunks_exact(PAGE).zip(hashes.chunks_exact(HASH));
        for (place, (page, hash)) in (batch * BATCH as u64..).zip(pairs) {
            if Sha256::digest(page)[..] != *hash {
                damaged.push(place);
            }
        }
        each(pages.len() as u64);
    }
    Ok((!damaged.is_empty()).then_some(Damage::Pages(damaged)))
}

#[cfg(test)]
mod tests {
    use super::super::memory_file;
    use super::*;

    fn chunk(pages: u8) -> (File, Digest) {
        let mut writer = Writer::new(memory_file("chunk").unwrap());
        for page in 0..pages {
            assert_eq!(writer.add(&[page; PAGE]).unwrap(), u64::from(page));
        }
        let (file, name, bytes) = writer.finish().unwrap();
        assert_eq!(file.metadata().unwrap().len(), bytes);
        (file, name)
    }

    #[test]
    fn a_chunk_is_known_by_what_is_in_it_and_a_damaged_page_by_its_place() {
        let (file, name) = chunk(200);
        let (_, same) = chunk(200);
        let (_, other) = chunk(199);
        assert!(name == same && name != other);
        assert_eq!(verify(&file, &name, |_| {}).unwrap(), None);
        assert!(matches!(
            verify(&file, &other, |_| {}).unwrap(),
            Some(Damage::Whole(_))
        ));
        file.write_all_at(b"x", 7 * PAGE as u64 + 9).unwrap();
        file.write_all_at(b"x", 199 * PAGE as u64).unwrap();
        let damage = verify(&file, &name, |_| {}).unwrap();
        assert_eq!(damage, Some(Damage::Pages(vec![7, 199])));
        let length = file.metadata().unwrap().len();
        for cut in [0, 1, FOOT as u64, length - 1] {
            file.set_len(cut).unwrap();
            assert!(matches!(
                verify(&file, &name, |_| {}).unwrap(),
                Some(Damage::Whole(_))
            ));
        }
    }

    #[test]
    fn a_name_is_hexadecimal_and_nothing_else() {
        let name = "a0".repeat(32);
        assert_eq!(Digest::try_from(name.clone()).unwrap().as_str(), name);
        for wrong in [
            "",
            "../../../etc/passwd",
            &"A0".repeat(32),
            &"a0".repeat(33),
        ] {
            assert!(Digest::try_from(wrong.to_owned()).is_err());
        }
    }
}
