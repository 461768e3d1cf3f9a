//! Writing the file.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};

use anyhow::Context;

use super::{BASE, BLOCK, END, FILE, MAP, NUMBERED, STATE, chunk_entry};
use crate::snapshots::{Catalog, Kind, Manifest};
use crate::template::memory;

/// Bytes that are copied at a time.
const BUFFER: usize = 1 << 20;

/// A snapshot that is about to be written as one file.
#[derive(Debug)]
pub struct Export {
    entries: Vec<Entry>,
    /// Seconds since the Unix epoch that all entries carry.
    made: u64,
}

#[derive(Debug)]
struct Entry {
    name: String,
    bytes: u64,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Bytes(Vec<u8>),
    File(File),
    /// Memory, of which only pages that are not zeroes are written, each with its number.
    Pages(File),
}

impl Export {
    /// Opens everything that a snapshot needs. All of it is read and compared with its digests first: what is
    /// damaged here should not be found on another host.
    ///
    /// # Errors
    /// Something is missing or damaged.
    pub fn open(catalog: &Catalog, snapshot: &Manifest) -> anyhow::Result<Self> {
        let (state, layers) = catalog.layers(snapshot)?;
        let mut manifest = snapshot.clone();
        // On another host there is no VM that it could be the suspended half of.
        manifest.kind = Kind::User;
        let map = layers.map.encode();
        let base = layers.base.file.try_clone().context("cannot open a base")?;
        let pages = memory::measure(&base)?.pages;
        let mut entries = vec![
            Entry::bytes(FILE, serde_json::to_vec_pretty(&manifest)?),
            Entry::file(STATE.to_owned(), state)?,
            Entry::bytes(MAP, map),
            Entry {
                name: BASE.to_owned(),
                bytes: pages * NUMBERED,
                source: Source::Pages(base),
            },
        ];
        for (chunk, pages) in manifest.memory.chunks.iter().zip(&layers.files) {
            let file = pages.file.try_clone().context("cannot open a chunk")?;
            entries.push(Entry::file(chunk_entry(&chunk.sha256), file)?);
        }
        let made = u64::try_from(manifest.created_ms / 1000).unwrap_or(0);
        Ok(Self { entries, made })
    }

    /// Bytes that are read and packed.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }

    /// Writes all of it. `level` is zstd's, 1 to 19. `each` hears of the bytes that were packed.
    ///
    /// # Errors
    /// Something cannot be read or written.
    pub fn write(&self, to: impl Write, level: i32, each: impl FnMut(u64)) -> anyhow::Result<()> {
        self.write_from(0, to, level, each)
    }

    /// Writes all of it into a file that may hold the beginning of it already, and flushes that. `each` hears of
    /// the bytes that were packed or found.
    ///
    /// # Errors
    /// Something cannot be read or written.
    pub fn resume(
        &self,
        file: &mut File,
        level: i32,
        mut each: impl FnMut(u64),
    ) -> anyhow::Result<()> {
        let (found, bytes) = self.whole_frames(file)?;
        each(self.entries[..found].iter().map(|entry| entry.bytes).sum());
        // What follows the last whole frame goes first: the file never holds a frame with rubbish behind it.
        file.set_len(bytes).context("cannot cut the file")?;
        file.seek(SeekFrom::Start(bytes))
            .context("cannot seek in the file")?;
        self.write_from(found, &mut *file, level, each)?;
        file.sync_all().context("cannot flush the file")
    }

    fn write_from(
        &self,
        first: usize,
        mut to: impl Write,
        level: i32,
        mut each: impl FnMut(u64),
    ) -> anyhow::Result<()> {
        for entry in &self.entries[first..] {
            let mut frame = frame(&mut to, level)?;
            let written = entry
                .header(self.made)
                .and_then(|header| Ok(frame.write_all(header.as_bytes())?))
                .and_then(|()| entry.content(&mut frame, &mut each))
                .and_then(|()| Ok(frame.write_all(&END[..entry.padding()])?));
            written.with_context(|| format!("cannot write {}", entry.name))?;
            frame.finish().context("cannot write")?;
        }
        let mut last = frame(&mut to, level)?;
        last.write_all(&END).context("cannot write")?;
        last.finish().context("cannot write")?;
        to.flush().context("cannot write")
    }

    /// How many entries the file holds whole, and where the last of them ends.
    fn whole_frames(&self, file: &mut File) -> anyhow::Result<(usize, u64)> {
        file.rewind().context("cannot seek in the file")?;
        let mut reader = BufReader::new(&*file);
        let mut at = 0;
        for (number, entry) in self.entries.iter().enumerate() {
            let decoder = zstd::Decoder::with_buffer(reader).context("cannot unpack")?;
            let mut decoder = decoder.single_frame();
            if !entry.is_in(&mut decoder, self.made)? {
                return Ok((number, at));
            }
            reader = decoder.finish();
            at = reader
                .stream_position()
                .context("cannot seek in the file")?;
        }
        Ok((self.entries.len(), at))
    }
}

/// Begins a frame.
fn frame<W: Write>(to: W, level: i32) -> anyhow::Result<zstd::Encoder<'static, W>> {
    let mut frame = zstd::Encoder::new(to, level).context("cannot pack at this level")?;
    frame
        .include_checksum(true)
        .context("cannot pack with checksums")?;
    Ok(frame)
}

impl Entry {
    fn bytes(name: &str, bytes: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            bytes: bytes.len() as u64,
            source: Source::Bytes(bytes),
        }
    }

    fn file(name: String, file: File) -> anyhow::Result<Self> {
        let bytes = file.metadata().context("cannot look at a file")?.len();
        let source = Source::File(file);
        Ok(Self {
            name,
            bytes,
            source,
        })
    }

    fn header(&self, made: u64) -> anyhow::Result<tar::Header> {
        let mut header = tar::Header::new_ustar();
        header.set_path(&self.name).context("a name is too long")?;
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(self.bytes);
        header.set_mode(0o600);
        header.set_mtime(made);
        header.set_cksum();
        Ok(header)
    }

    /// Zeroes after the content, up to a whole block.
    fn padding(&self) -> usize {
        (self.bytes.next_multiple_of(BLOCK) - self.bytes) as usize
    }

    fn content(&self, to: &mut impl Write, each: &mut impl FnMut(u64)) -> anyhow::Result<()> {
        match &self.source {
            Source::Bytes(bytes) => {
                to.write_all(bytes)?;
                each(self.bytes);
            }
            Source::File(file) => {
                let mut file = file;
                file.rewind()?;
                let mut buffer = vec![0; BUFFER];
                let mut left = self.bytes;
                while left > 0 {
                    let part = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
                    file.read_exact(&mut buffer[..part])?;
                    to.write_all(&buffer[..part])?;
                    each(part as u64);
                    left -= part as u64;
                }
            }
            Source::Pages(file) => memory::for_each_page(file, |number, page| {
                to.write_all(&number.to_le_bytes())?;
                to.write_all(page)?;
                each(NUMBERED);
                Ok(())
            })?,
        }
        Ok(())
    }

    /// Whether a frame is this entry and whole. Of the manifest every byte is compared: it has the digests of the others, whose
    /// frames have checksums of their own.
    fn is_in(&self, frame: &mut impl Read, made: u64) -> anyhow::Result<bool> {
        let mut head = Vec::from(self.header(made)?.as_bytes());
        if let Source::Bytes(bytes) = &self.source {
            head.extend_from_slice(bytes);
        }
        let mut found = vec![0; head.len()];
        let same = frame.read_exact(&mut found).is_ok() && found == head;
        let rest = BLOCK + self.bytes + self.padding() as u64 - head.len() as u64;
        // What cannot be unpacked was cut off or damaged: it is written again.
        let whole =
            same && matches!(std::io::copy(frame, &mut std::io::sink()), Ok(read) if read == rest);
        Ok(whole)
    }
}
