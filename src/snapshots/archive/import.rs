//! Reading the file, which may come from anywhere: nothing of it is used before it has been compared with its digest, and
//! no length, number or name is believed.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use thaw_vmm::snapshot::{MAX_FILES, PageMap, ZERO};

use super::stage::Stage;
use super::{BASE, FILE, MAP, NUMBERED, STATE, chunk_entry};
use crate::image::manifest::Part;
use crate::image::scratch::Scratch;
use crate::layers::{Base, Digest, PAGE, Shelf, chunk_pages};
use crate::snapshots::make::{MIB, MOST_STATE, free_mib, publish, write};
use crate::snapshots::manifest::{FORMAT, Ground, Kind, Manifest};
use crate::snapshots::snapshots_dir;
use crate::template::memory;

/// Largest manifest: a snapshot with the most chunks has less than 100 KiB.
const MOST_MANIFEST: u64 = 1 << 20;

/// Largest memory of a VM, MiB, as the API bounds it.
const MOST_MEMORY_MIB: u32 = 8192;

/// Most that a machine has besides its guest's memory, bytes: the same GiB that page maps allow for.
const MOST_BESIDES: u64 = 1 << 30;

/// Bytes that may follow the last entry: zeroes of the archive's end. They are read for the checksum behind them, and so that
/// a pipe's other side ends in peace.
const MOST_AFTER: u64 = 1 << 20;

/// Longest text in a manifest.
const MOST_TEXT: usize = 256;

/// How a snapshot is to be imported.
#[derive(Clone, Debug)]
pub struct Import<'a> {
    /// Where to.
    pub data_dir: &'a Path,
    /// Id of the user who is to own it.
    pub tenant: &'a str,
    /// Disk space that stays free, MiB.
    pub disk_floor_mib: u64,
}

/// What became of it.
#[derive(Clone, Debug)]
pub enum Imported {
    /// It is here now.
    New(Manifest),
    /// It was here already.
    Known(Manifest),
}

impl Import<'_> {
    /// Reads a file and puts the snapshot among the others, under its own id. `ground` says what VMs run here that
    /// are of the snapshot's image. Can be repeated when it breaks off; entries that had been checked are not written again.
    ///
    /// # Errors
    /// The file is none, cut off or damaged; the snapshot does not run here; the disk is too full.
    pub fn run(
        &self,
        file: impl Read,
        ground: impl FnOnce(&Manifest) -> anyhow::Result<Ground>,
    ) -> anyhow::Result<Imported> {
        let snapshots = snapshots_dir(self.data_dir);
        let shelf = Shelf::open(&snapshots)?;
        let unpacked = zstd::Decoder::new(file).context("the file cannot be unpacked")?;
        let mut archive = tar::Archive::new(unpacked);
        // Raw: long names are extensions with lengths of their own, and no entry of ours needs one.
        let entries = archive
            .entries()
            .context("the file cannot be read")?
            .raw(true);
        let mut parts = Parts { entries };

        let manifest = parts.bytes(FILE, MOST_MANIFEST)?;
        let mut manifest = parse(&manifest)?;
        manifest.check(&ground(&manifest)?)?;
        let dir = snapshots.join(&manifest.id);
        if dir.exists() {
            return known(&dir, &manifest);
        }
        let stage = Stage::open(&snapshots, &manifest.id)?;
        // What the shelf has already is not to be swept before it is named.
        let hold = shelf.hold()?;

        let state = parts.part(STATE, &manifest.state, MOST_STATE)?;
        let map = parts.part(MAP, &manifest.memory.map, PageMap::MAX_BYTES)?;
        let pages = PageMap::decode(&map)?;
        let mut added = self.base(&mut parts, &manifest, &stage, &shelf)?;
        let mut lengths = Vec::new();
        for chunk in &manifest.memory.chunks {
            let (pages, new) = self.chunk(&mut parts, &chunk.sha256, &manifest, &stage, &shelf)?;
            lengths.push(pages);
            added += new;
        }
        parts.end()?;
        let mut rest = archive.into_inner().take(MOST_AFTER);
        std::io::copy(&mut rest, &mut std::io::sink()).context(BROKE_OFF)?;
        check_map(&pages, &manifest, &lengths)?;

        // Order: chunks and base get their names, then the snapshot that names them, then the stage goes. Killed in
        // between, the next attempt finds everything in one of the places.
        for chunk in &mut manifest.memory.chunks {
            shelf.admit(&chunk.sha256, &stage.chunk(&chunk.sha256))?;
            chunk.bytes = shelf.chunk_bytes(&chunk.sha256);
        }
        shelf.flush()?;
        self.tenant.clone_into(&mut manifest.tenant);
        manifest.kind = Kind::User;
        manifest.disk_bytes = added + (state.len() + map.len()) as u64;
        let scratch = Scratch::new(self.data_dir)?;
        let out = write(scratch.path(), &state, &map, &manifest)?;
        publish(&out, &dir)?;
        drop((hold, scratch));
        stage.remove()?;
        Ok(Imported::New(manifest))
    }

    /// Takes the base from the file, unless it is here. Gives the bytes that it adds.
    fn base<R: Read>(
        &self,
        parts: &mut Parts<'_, R>,
        manifest: &Manifest,
        stage: &Stage,
        shelf: &Shelf,
    ) -> anyhow::Result<u64> {
        let (mut entry, bytes) = parts.next(BASE)?;
        let pages = manifest.memory.bytes / PAGE as u64;
        ensure!(
            bytes % NUMBERED == 0 && bytes / NUMBERED <= pages,
            "entry {BASE} has {bytes} bytes, which no base of {pages} pages has"
        );
        let name = &manifest.memory.base;
        if shelf.open_base(name).is_ok() {
            drain(&mut entry)?;
            return Ok(0);
        }
        let to = stage.dir.join(BASE);
        if to.exists() {
            drain(&mut entry)?;
        } else {
            self.room_for(bytes)?;
            let file = stage.begin()?;
            file.set_len(manifest.memory.bytes)
                .context("cannot size a base")?;
            let (mut number, mut page) = ([0; 8], [0; PAGE]);
            for _ in 0..bytes / NUMBERED {
                let read = entry
                    .read_exact(&mut number)
                    .and_then(|()| entry.read_exact(&mut page));
                read.context(BROKE_OFF)?;
                let number = u64::from_le_bytes(number);
                ensure!(number < pages, "entry {BASE} has page {number} of {pages}");
                file.write_all_at(&page, number * PAGE as u64)
                    .context("cannot write a base")?;
            }
            let found = memory::measure(&file)?;
            ensure!(
                found.sha256 == *name,
                "entry {BASE} is damaged: its digest is {}, not {name}",
                found.sha256
            );
            stage.finish(&file, &to)?;
        }
        let base = Base {
            file: File::open(&to).context("cannot open a base")?.into(),
            sha256: name.clone(),
            path: Some(to),
        };
        shelf.adopt(&base)?;
        Ok(bytes)
    }

    /// Takes a chunk from the file, unless it is here. Gives the number of its pages and the bytes that it adds.
    fn chunk<R: Read>(
        &self,
        parts: &mut Parts<'_, R>,
        name: &Digest,
        manifest: &Manifest,
        stage: &Stage,
        shelf: &Shelf,
    ) -> anyhow::Result<(u64, u64)> {
        let entry_name = chunk_entry(name);
        let (mut entry, bytes) = parts.next(&entry_name)?;
        let pages = chunk_pages(bytes).filter(|n| n * PAGE as u64 <= manifest.memory.bytes);
        let pages = pages
            .with_context(|| format!("entry {entry_name} has {bytes} bytes, which no chunk has"))?;
        let to = stage.chunk(name);
        if shelf.open_chunk(name).is_ok() {
            drain(&mut entry)?;
            return Ok((pages, 0));
        }
        if !to.exists() {
            self.room_for(bytes)?;
            let mut file = stage.begin()?;
            let read = std::io::copy(&mut entry, &mut file).context(BROKE_OFF)?;
            ensure!(read == bytes, BROKE_OFF);
            if let Some(damage) = Shelf::check(&file, name)? {
                bail!("entry {entry_name} is damaged: {damage:?}");
            }
            stage.finish(&file, &to)?;
        }
        drain(&mut entry)?;
        Ok((pages, bytes))
    }

    fn room_for(&self, bytes: u64) -> anyhow::Result<()> {
        let (need, free) = (bytes.div_ceil(MIB), free_mib(self.data_dir)?);
        let wanted = need.saturating_add(self.disk_floor_mib);
        ensure!(
            wanted <= free,
            "the disk is {} MiB short: the next part takes {need} MiB, {free} MiB are free and {} MiB stay free; make \
             room and import the file again, it goes on where it stopped",
            wanted.saturating_sub(free),
            self.disk_floor_mib
        );
        Ok(())
    }
}

const BROKE_OFF: &str = "the file breaks off or is damaged; import it again when it is whole";

/// The file's entries, one after the other.
struct Parts<'a, R: Read> {
    entries: tar::Entries<'a, R>,
}

impl<'a, R: Read> Parts<'a, R> {
    /// The next entry, which must have this name, and its length.
    fn next(&mut self, name: &str) -> anyhow::Result<(tar::Entry<'a, R>, u64)> {
        let entry = self.entries.next();
        let entry = entry
            .with_context(|| format!("the file ends where entry {name} belongs"))?
            .context("the file breaks off, is damaged, or is no snapshot")?;
        let found = entry.path_bytes();
        ensure!(
            *found == *name.as_bytes() && entry.header().entry_type() == tar::EntryType::Regular,
            "the file has entry {:?} where {name} belongs",
            String::from_utf8_lossy(&found)
        );
        drop(found);
        let bytes = entry.size();
        Ok((entry, bytes))
    }

    /// All of an entry that has at most so many bytes.
    fn bytes(&mut self, name: &str, most: u64) -> anyhow::Result<Vec<u8>> {
        let (mut entry, bytes) = self.next(name)?;
        ensure!(
            bytes <= most,
            "entry {name} has {bytes} bytes, more than {most}"
        );
        let mut read = Vec::new();
        entry.read_to_end(&mut read).context(BROKE_OFF)?;
        ensure!(read.len() as u64 == bytes, BROKE_OFF);
        Ok(read)
    }

    /// All of an entry that has this digest.
    fn part(&mut self, name: &str, part: &Part, most: u64) -> anyhow::Result<Vec<u8>> {
        let read = self.bytes(name, part.bytes.min(most))?;
        ensure!(
            Part::of_bytes(&read) == *part,
            "entry {name} is damaged: its digest is not the manifest's"
        );
        Ok(read)
    }

    /// There must be nothing more.
    fn end(&mut self) -> anyhow::Result<()> {
        match self.entries.next() {
            None => Ok(()),
            Some(Ok(_)) => bail!("the file has more entries than its manifest says"),
            Some(Err(error)) => Err(error).context(BROKE_OFF),
        }
    }
}

fn drain(entry: &mut impl Read) -> anyhow::Result<()> {
    std::io::copy(entry, &mut std::io::sink()).context(BROKE_OFF)?;
    Ok(())
}

/// A manifest whose every number and text is within bounds.
fn parse(bytes: &[u8]) -> anyhow::Result<Manifest> {
    let said: serde_json::Value =
        serde_json::from_slice(bytes).context("its manifest is malformed")?;
    let format = said["format"].as_u64();
    ensure!(
        format == Some(FORMAT.into()),
        "it has format {}, this thaw reads {FORMAT}",
        said["format"]
    );
    let manifest: Manifest = serde_json::from_value(said).context("its manifest is malformed")?;
    let uuid = uuid::Uuid::parse_str(&manifest.id).context("its id is none")?;
    ensure!(uuid.to_string() == manifest.id, "its id is none");
    let texts = [
        &manifest.name,
        &manifest.vm_id,
        &manifest.session_id,
        &manifest.image,
        &manifest.image_name,
        &manifest.thaw,
        &manifest.sources,
        &manifest.cpu.vendor,
        &manifest.cpu.model,
        manifest.parent.as_ref().unwrap_or(&manifest.id),
    ];
    for text in texts {
        let fits = text.len() <= MOST_TEXT && !text.contains(char::is_control);
        ensure!(fits, "its manifest has a text that is too long or odd");
    }
    let memory = &manifest.memory;
    let size = u64::from(manifest.memory_mib) * MIB;
    ensure!(
        (1..=MOST_MEMORY_MIB).contains(&manifest.memory_mib)
            && (size..=size + MOST_BESIDES).contains(&memory.bytes)
            && memory.bytes.is_multiple_of(PAGE as u64)
            && (1..=256).contains(&manifest.vcpus)
            && (1..=256).contains(&manifest.cores),
        "its manifest has a VM of no size that there is"
    );
    Digest::try_from(memory.base.clone()).map_err(anyhow::Error::msg)?;
    let names: HashSet<_> = memory.chunks.iter().map(|chunk| &chunk.sha256).collect();
    ensure!(
        memory.chunks.len() <= MAX_FILES && names.len() == memory.chunks.len(),
        "its manifest has {} chunks, some twice or more than {MAX_FILES}",
        memory.chunks.len()
    );
    Ok(manifest)
}

/// Whether every page lies where there is something.
fn check_map(map: &PageMap, manifest: &Manifest, lengths: &[u64]) -> anyhow::Result<()> {
    ensure!(
        map.pages() * PAGE as u64 == manifest.memory.bytes && map.files() as usize == lengths.len(),
        "its map is of another memory"
    );
    for extent in map.extents() {
        if extent.file == ZERO {
            continue;
        }
        let length = lengths.get(extent.file as usize).copied().unwrap_or(0);
        let end = extent.slot.checked_add(extent.count.into());
        ensure!(
            end.is_some_and(|end| end <= length),
            "its map has page {} past the end of a chunk",
            extent.page
        );
    }
    Ok(())
}

/// A snapshot of this id is here.
fn known(dir: &Path, manifest: &Manifest) -> anyhow::Result<Imported> {
    let here = Manifest::read(&dir.join(FILE))?;
    ensure!(
        here.state == manifest.state && here.memory.map == manifest.memory.map,
        "another snapshot {} is here; delete it first",
        here.id
    );
    Ok(Imported::Known(here))
}
