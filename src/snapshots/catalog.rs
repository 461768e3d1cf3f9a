//! Snapshots as files: looked at, checked and compared by whoever may read the data directory, whether or not a server
//! runs. Nothing here changes a snapshot; [`Catalog::sweep`] removes what none needs.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use thaw_vmm::snapshot::PageMap;

use super::files::{directories, manifest_in, named, open};
use super::manifest::{MAP, Manifest};
use super::{archive, snapshots_dir};
use crate::image::manifest::Part;
use crate::image::scratch;
use crate::layers::{Damage, Layers, PAGE, Shelf, Swept};
use crate::template::manifest::STATE;

/// The snapshots of a data directory.
#[derive(Debug)]
pub struct Catalog {
    pub(super) dir: PathBuf,
    pub(super) shelf: Shelf,
    /// Those that can be read, oldest first.
    pub snapshots: Vec<Manifest>,
    /// Those that cannot: where, and why.
    pub unreadable: Vec<(PathBuf, String)>,
}

/// Something that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// One of the snapshot's own files.
    File(&'static str),
    /// A page of the VM, by its number; it lies in this chunk.
    Page(u64, String),
    /// A chunk that is missing or none, and how many of the VM's pages lie in it.
    Chunk(String, u64, String),
    /// The base.
    Base(String),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(name) => write!(f, "file {name} is not what was written"),
            Self::Page(page, chunk) => {
                let address = page * PAGE as u64;
                write!(
                    f,
                    "page {page} (guest address {address:#x}) is corrupt, in chunk {chunk}"
                )
            }
            Self::Chunk(chunk, pages, why) => {
                write!(f, "chunk {chunk}, which has {pages} of its pages: {why}")
            }
            Self::Base(why) => write!(f, "its base: {why}"),
        }
    }
}

/// A file that snapshots share, and those that need it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Reached {
    /// Its digest, and name.
    pub name: String,
    /// `base` or `chunk`.
    pub kind: &'static str,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// Ids of the snapshots, oldest first.
    pub snapshots: Vec<String>,
}

/// How the memory of two VMs differs.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// Pages that differ.
    pub pages: u64,
    /// Of these, pages that are zeroes in the second.
    pub zeroed: u64,
    /// Of these, pages that are zeroes in the first.
    pub filled: u64,
    /// Pages that were compared; the others lie in the same place.
    pub compared: u64,
    /// Which pages differ: runs of them, as the first one's number and how many.
    pub runs: Vec<(u64, u64)>,
}

impl Catalog {
    /// Reads what is there.
    ///
    /// # Errors
    /// There is nothing, or it cannot be read.
    pub fn open(data_dir: &Path) -> anyhow::Result<Self> {
        let dir = snapshots_dir(data_dir);
        if !dir.is_dir() {
            bail!(
                "there are no snapshots in {}; give --data-dir if the server's is another",
                data_dir.display()
            );
        }
        let mut snapshots = Vec::new();
        let mut unreadable = Vec::new();
        for path in directories(&dir)? {
            match manifest_in(&path) {
                Ok(manifest) => snapshots.push(manifest),
                Err(error) => unreadable.push((path, format!("{error:#}"))),
            }
        }
        snapshots.sort_by(|a, b| (a.created_ms, &a.id).cmp(&(b.created_ms, &b.id)));
        Ok(Self {
            shelf: Shelf::open(&dir)?,
            dir,
            snapshots,
            unreadable,
        })
    }

    /// The one snapshot whose id begins so, or that has this name.
    ///
    /// # Errors
    /// There is none, or there are several.
    pub fn find(&self, wanted: &str) -> anyhow::Result<&Manifest> {
        let exact = self.snapshots.iter().find(|one| one.id == wanted);
        if let Some(found) = exact {
            return Ok(found);
        }
        let fits = |one: &&Manifest| one.name == wanted || one.id.starts_with(wanted);
        let mut fitting = self.snapshots.iter().filter(fits);
        match (fitting.next(), fitting.next()) {
            (Some(found), None) => Ok(found),
            (None, _) => bail!("there is no snapshot {wanted}; `thaw snapshot list` shows them"),
            _ => bail!("several snapshots are called {wanted}; give more of the id"),
        }
    }

    /// Bytes that nothing else needs: what its deletion would give back.
    pub fn own_bytes(&self, snapshot: &Manifest) -> u64 {
        let others = self.snapshots.iter().filter(|one| one.id != snapshot.id);
        let shared: HashSet<_> = others
            .flat_map(|one| one.memory.chunks.iter().map(|chunk| &chunk.sha256))
            .collect();
        let chunks = snapshot.memory.chunks.iter();
        let own = chunks.filter(|chunk| !shared.contains(&chunk.sha256));
        let chunks: u64 = own.map(|chunk| chunk.bytes).sum();
        chunks + snapshot.state.bytes + snapshot.memory.map.bytes
    }

    /// Reads every byte of a snapshot and compares it with what was written. `each` hears of the bytes read.
    ///
    /// # Errors
    /// Something cannot be read at all.
    pub fn verify(
        &self,
        snapshot: &Manifest,
        mut each: impl FnMut(u64),
    ) -> anyhow::Result<Vec<Fault>> {
        let dir = self.dir.join(&snapshot.id);
        let mut faults = Vec::new();
        let mut own = |name, part: &Part| -> bool {
            let sound = Part::of_file(&dir.join(name)).is_ok_and(|found| found == *part);
            if !sound {
                faults.push(Fault::File(name));
            }
            sound
        };
        own(STATE, &snapshot.state);
        let map = match own(MAP, &snapshot.memory.map) {
            true => {
                let file = File::open(dir.join(MAP)).context("cannot open its map")?;
                PageMap::read(&file).ok()
            }
            false => None,
        };
        if let Err(error) = self.shelf.open_base(&snapshot.memory.base) {
            faults.push(Fault::Base(format!("{error:#}")));
        }
        each(snapshot.memory.map.bytes + snapshot.state.bytes);
        for (number, chunk) in (0_u32..).zip(&snapshot.memory.chunks) {
            let Some(damage) = self.shelf.verify(&chunk.sha256, &mut each)? else {
                continue;
            };
            let name = chunk.sha256.as_str().to_owned();
            let entries = map.iter().flat_map(PageMap::entries);
            let mut mine = entries.filter(|(_, file, _)| *file == number);
            match damage {
                Damage::Whole(why) => {
                    faults.push(Fault::Chunk(name, mine.count() as u64, why));
                }
                Damage::Pages(places) => {
                    let before = faults.len();
                    faults.extend(
                        mine.by_ref()
                            .filter(|(_, _, slot)| places.binary_search(slot).is_ok())
                            .map(|(page, _, _)| Fault::Page(page, name.clone())),
                    );
                    // Damaged, but where only other snapshots look.
                    if faults.len() == before {
                        let why = format!("{} pages of others are corrupt", places.len());
                        faults.push(Fault::Chunk(name, 0, why));
                    }
                }
            }
        }
        Ok(faults)
    }

    /// Opens a snapshot's state and memory; all of it is compared with its digests.
    ///
    /// # Errors
    /// Something is missing or damaged.
    pub fn layers(&self, snapshot: &Manifest) -> anyhow::Result<(File, Layers)> {
        open(&self.dir.join(&snapshot.id), snapshot, &self.shelf)
            .with_context(|| format!("snapshot {}", snapshot.id))
    }

    /// Compares the memory of two snapshots, page by page.
    ///
    /// # Errors
    /// They are of different sizes, or damaged.
    pub fn diff(&self, a: &Manifest, b: &Manifest) -> anyhow::Result<Difference> {
        let ((_, first), (_, second)) = (self.layers(a)?, self.layers(b)?);
        if first.map.pages() != second.map.pages() {
            bail!(
                "one has {} MiB and the other {}",
                a.memory_mib,
                b.memory_mib
            );
        }
        let same_base = first.base.sha256 == second.base.sha256;
        let pages: Vec<u64> = match same_base {
            true => {
                let entries = first.map.entries().chain(second.map.entries());
                let mut pages: Vec<u64> = entries.map(|(page, _, _)| page).collect();
                pages.sort_unstable();
                pages.dedup();
                pages
            }
            false => (0..first.map.pages()).collect(),
        };
        let mut found = Difference::default();
        let (mut one, mut other) = ([0; PAGE], [0; PAGE]);
        for page in pages {
            if same_base && place(&first, page) == place(&second, page) {
                continue;
            }
            found.compared += 1;
            first.read(page, &mut one)?;
            second.read(page, &mut other)?;
            if one != other {
                found.pages += 1;
                match found.runs.last_mut() {
                    Some((first, count)) if *first + *count == page => *count += 1,
                    _ => found.runs.push((page, 1)),
                }
                found.zeroed += u64::from(other == [0; PAGE]);
                found.filled += u64::from(one == [0; PAGE]);
            }
        }
        Ok(found)
    }

    /// Every base and chunk that some snapshot needs, by name, and which do.
    pub fn reached(&self) -> Vec<Reached> {
        let mut reached: BTreeMap<(&'static str, &str), Vec<String>> = BTreeMap::new();
        for one in &self.snapshots {
            let chunks = one.memory.chunks.iter();
            let chunks = chunks.map(|chunk| ("chunk", chunk.sha256.as_str()));
            for file in chunks.chain([("base", one.memory.base.as_str())]) {
                reached.entry(file).or_default().push(one.id.clone());
            }
        }
        let told = reached
            .into_iter()
            .map(|((kind, name), snapshots)| Reached {
                name: name.to_owned(),
                kind,
                bytes: self.shelf.bytes_of(kind == "base", name),
                snapshots,
            });
        told.collect()
    }

    /// Removes what no snapshot needs, or only says what that would be. `None`: a snapshot is being made just now.
    ///
    /// # Errors
    /// The directories cannot be read.
    pub fn sweep(&self, dry_run: bool) -> anyhow::Result<Option<Swept>> {
        if let Some(data_dir) = self.dir.parent().filter(|_| !dry_run) {
            scratch::sweep(data_dir)?;
        }
        let mut swept = archive::sweep(&self.dir, dry_run)?;
        let chunks = self.shelf.sweep(dry_run, || named(&self.dir))?;
        Ok(chunks.map(|chunks| {
            swept += chunks;
            swept
        }))
    }
}

/// Where a page lies, by names that mean the same in every snapshot.
fn place(layers: &Layers, page: u64) -> Option<(Option<&str>, u64)> {
    let (file, slot) = layers.map.find(page)?;
    let digest = layers.files.get(file as usize)?.digest.as_ref();
    Some((digest.map(crate::layers::Digest::as_str), slot))
}
