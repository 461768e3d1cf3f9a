//! Putting a frozen VM's memory on the shelf: only what is in no chunk and not in its base.

use std::sync::Arc;

use thaw_vmm::snapshot::{MAX_FILES, PageMap, ZERO};

use super::{Frost, Layers, PAGE, Pages, Shelf};

/// Pages of a region, whose changes go into one chunk: 64 MiB. Larger ones would share less between snapshots,
/// smaller ones make more files.
const REGION: u64 = (64 << 20) / PAGE as u64;

/// Most regions of a VM: with larger memory, regions are larger.
const MOST_REGIONS: u64 = 16;

/// Chunks that a region's pages may lie in; beyond, all of it goes into a new one. Together with
/// [`MOST_REGIONS`] this stays below [`MAX_FILES`].
const MOST_CHUNKS: usize = 12;

const _: () = assert!(MOST_REGIONS as usize * (MOST_CHUNKS + 1) < MAX_FILES);

/// A frozen VM's memory on the shelf.
#[derive(Debug)]
pub struct Kept {
    /// The memory. All of its files are on the shelf.
    pub layers: Layers,
    /// Bytes that were added to the disk.
    pub added: u64,
    /// Pages that were added.
    pub pages: u64,
}

/// Where a page comes from while a snapshot is put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A file of the origin.
    File(u32, u64),
    /// The frost, at this place.
    Frost(u64),
    /// It is zeroes.
    Zero,
}

impl Frost {
    /// Writes to the shelf what is not there yet. The caller holds the shelf until the result is named by a snapshot.
    ///
    /// # Errors
    /// Something cannot be read or written.
    pub fn keep(&self, shelf: &Shelf) -> anyhow::Result<Kept> {
        let origin = &self.origin;
        shelf.adopt(&origin.base)?;
        let pages = origin.map.pages();
        let region = REGION.max(pages.div_ceil(MOST_REGIONS));
        // A chunk of a deleted snapshot may be gone although a VM still has it open.
        let kept: Vec<bool> = origin
            .files
            .iter()
            .map(|file| file.digest.as_ref().is_some_and(|name| shelf.has(name)))
            .collect();
        let mut sorted = Sorted {
            frost: self,
            shelf,
            kept,
            files: Vec::new(),
            numbers: vec![None; origin.files.len()],
            entries: Vec::new(),
            added: 0,
            new_pages: 0,
        };
        let mut all = self.merged()?.into_iter().peekable();
        while let Some((first, _)) = all.peek() {
            let end = (first / region + 1) * region;
            let mut part = Vec::new();
            while let Some(entry) = all.next_if(|(page, _)| *page < end) {
                part.push(entry);
            }
            sorted.region(&part)?;
        }
        let Sorted {
            files,
            entries,
            added,
            new_pages,
            ..
        } = sorted;
        shelf.flush()?;
        let map = PageMap::of_pages(pages, files.len() as u32, entries)?;
        Ok(Kept {
            layers: Layers::new(origin.base.clone(), files, map),
            added,
            pages: new_pages,
        })
    }

    /// Every page that is not as in the base, ascending, and where it is.
    fn merged(&self) -> anyhow::Result<Vec<(u64, Place)>> {
        let mut merged = Vec::new();
        let mut mine = (0_u64..).zip(&self.numbers).peekable();
        let origin = &self.origin;
        for (page, file, slot) in origin.map.entries() {
            while let Some((slot, number)) = mine.next_if(|(_, number)| **number < page) {
                self.changed(*number, slot, None, &mut merged)?;
            }
            let was = match file {
                ZERO => Place::Zero,
                file => Place::File(file, slot),
            };
            match mine.next_if(|(_, number)| **number == page) {
                Some((slot, _)) => self.changed(page, slot, Some(was), &mut merged)?,
                None => merged.push((page, was)),
            }
        }
        for (slot, number) in mine {
            self.changed(*number, slot, None, &mut merged)?;
        }
        Ok(merged)
    }

    /// A page that the VM has of its own: it may be what it was, or what the base has, all the same.
    fn changed(
        &self,
        page: u64,
        slot: u64,
        was: Option<Place>,
        merged: &mut Vec<(u64, Place)>,
    ) -> anyhow::Result<()> {
        let (mut now, mut before) = ([0; PAGE], [0; PAGE]);
        read(&self.pages, slot, &mut now)?;
        self.origin.read(page, &mut before)?;
        if now == before {
            merged.extend(was.map(|was| (page, was)));
            return Ok(());
        }
        if was.is_some() {
            read(&self.origin.base.file, page, &mut before)?;
            if now == before {
                return Ok(());
            }
        }
        let zero = now == [0; PAGE];
        merged.push((
            page,
            if zero {
                Place::Zero
            } else {
                Place::Frost(slot)
            },
        ));
        Ok(())
    }
}

struct Sorted<'a> {
    frost: &'a Frost,
    shelf: &'a Shelf,
    kept: Vec<bool>,
    files: Vec<Arc<Pages>>,
    /// The new number of each of the origin's files.
    numbers: Vec<Option<u32>>,
    entries: Vec<(u64, u32, u64)>,
    added: u64,
    new_pages: u64,
}

impl Sorted<'_> {
    fn region(&mut self, part: &[(u64, Place)]) -> anyhow::Result<()> {
        let mut chunks: Vec<u32> = part
            .iter()
            .filter_map(|(_, from)| match from {
                Place::File(file, _) => Some(*file),
                _ => None,
            })
            .collect();
        chunks.sort_unstable();
        chunks.dedup();
        let gather = chunks.len() > MOST_CHUNKS;
        let first = self.entries.len();
        let mut page = [0; PAGE];
        let mut writing = None;
        let mut written = Vec::new();
        for (number, from) in part {
            match *from {
                Place::Zero => {
                    self.entries.push((*number, ZERO, 0));
                    continue;
                }
                Place::File(file, slot) if self.kept[file as usize] && !gather => {
                    let file = self.number(file);
                    self.entries.push((*number, file, slot));
                    continue;
                }
                Place::File(file, slot) => {
                    read(
                        &self.frost.origin.files[file as usize].file,
                        slot,
                        &mut page,
                    )?;
                }
                Place::Frost(slot) => {
                    read(&self.frost.pages, slot, &mut page)?;
                }
            }
            let (writer, _) = match &mut writing {
                Some(writing) => writing,
                none => none.insert(self.shelf.begin()?),
            };
            written.push((*number, writer.add(&page)?));
        }
        let Some((writer, path)) = writing else {
            return Ok(());
        };
        let (chunk, bytes) = self.shelf.finish(writer, path)?;
        self.added += bytes;
        self.new_pages += written.len() as u64;
        let number = self.files.len() as u32;
        self.files.push(chunk);
        self.entries
            .extend(written.into_iter().map(|(page, slot)| (page, number, slot)));
        // Regions come in order, and so must the pages of each.
        self.entries[first..].sort_unstable();
        Ok(())
    }

    fn number(&mut self, old: u32) -> u32 {
        let files = &mut self.files;
        let origin = &self.frost.origin.files;
        *self.numbers[old as usize].get_or_insert_with(|| {
            files.push(origin[old as usize].clone());
            files.len() as u32 - 1
        })
    }
}

fn read(file: &std::fs::File, slot: u64, into: &mut [u8; PAGE]) -> anyhow::Result<()> {
    use std::os::unix::fs::FileExt;
    Ok(file.read_exact_at(into, slot * PAGE as u64)?)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::tests::{base, bytes, frost};
    use super::*;

    fn names(layers: &Layers) -> HashSet<String> {
        let chunks = layers.files.iter().filter_map(|file| file.digest.clone());
        chunks
            .map(String::from)
            .chain([layers.base.sha256.clone()])
            .collect()
    }

    #[test]
    fn only_what_differs_is_written_and_generations_share_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = Shelf::open(dir.path()).unwrap();
        let mut before = Arc::new(Layers::whole(base(200)).unwrap());
        let mut wanted = bytes(&before);
        for generation in 0..40_u8 {
            let page = u64::from(generation) * 3;
            // One that is new, one that is zero, one that is as it was.
            let wrote = [
                (page, 250),
                (page + 1, 0),
                (page + 2, wanted[page as usize + 2]),
            ];
            let kept = frost(&before, &wrote).keep(&shelf).unwrap();
            wanted[page as usize] = 250;
            wanted[page as usize + 1] = 0;
            assert_eq!(bytes(&kept.layers), wanted);
            assert!(kept.layers.files.len() <= MOST_CHUNKS + 1);
            assert!(kept.pages >= 1 && (kept.pages == 1 || generation as usize >= MOST_CHUNKS));
            before = Arc::new(kept.layers);
        }
        let again = frost(&before, &[]).keep(&shelf).unwrap();
        assert_eq!((again.added, again.pages), (0, 0));
        // Pages that are as in the base again are in no chunk.
        let undone: Vec<(u64, u8)> = (0..120).map(|page| (page, page as u8 + 1)).collect();
        let undone = frost(&before, &undone).keep(&shelf).unwrap();
        assert!(undone.layers.is_whole() && undone.added == 0);
    }

    #[test]
    fn a_sweep_takes_what_nobody_names_and_a_vm_with_it_open_is_kept_whole() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = Shelf::open(dir.path()).unwrap();
        let whole = Arc::new(Layers::whole(base(8)).unwrap());
        let first = frost(&whole, &[(1, 100)]).keep(&shelf).unwrap().layers;
        let second = frost(&whole, &[(2, 101)]).keep(&shelf).unwrap().layers;
        let live = names(&second);
        assert_eq!(
            shelf
                .sweep(true, || Ok(live.clone()))
                .unwrap()
                .unwrap()
                .files,
            1
        );
        let hold = shelf.hold().unwrap();
        assert!(shelf.sweep(false, || Ok(live.clone())).unwrap().is_none());
        drop(hold);
        assert_eq!(shelf.sweep(false, || Ok(live)).unwrap().unwrap().files, 1);
        assert!(!shelf.has(first.files[0].digest.as_ref().unwrap()));
        // A VM that came from the first is frozen once more.
        let third = frost(&Arc::new(first), &[(3, 102)]).keep(&shelf).unwrap();
        assert_eq!(bytes(&third.layers), [1, 100, 3, 102, 5, 6, 7, 8]);
        assert_eq!(third.pages, 2);
        assert!(shelf.open_base(&whole.base.sha256).is_ok());
        let same = frost(&whole, &[(1, 100), (3, 102)]).keep(&shelf).unwrap();
        assert_eq!((same.added, same.pages), (0, 2));
    }
}
