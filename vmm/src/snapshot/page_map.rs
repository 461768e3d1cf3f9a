//! Where each page of a frozen VM is: in its base, or in one of the files laid over it.
//!
//! A VM that was restored differs from what it was restored from in few pages, so a snapshot is a
//! base (a template's memory file), some files of pages, and this map. The `map` file is, all little-endian:
//! `THAWPMAP`, `u32` version, `u32` number of files, `u64` number of pages of the VM, `u64` number of extents, then the
//! extents: `u64` first page, `u32` pages, `u32` file, `u64` first slot. Extents ascend and do not
//! overlap; file [`ZERO`] stands for zeroes. A page in no extent is the base's.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{SnapshotError, io};

const MAGIC: &[u8; 8] = b"THAWPMAP";
const VERSION: u32 = 1;
const HEAD: usize = 32;
const ENTRY: usize = 24;

/// The file number of pages that are all zeroes, which no file holds.
pub const ZERO: u32 = u32::MAX;

/// Most files that one VM's memory may lie in, besides its base: as many descriptors as one message carries
/// (`SCM_MAX_FD`, 253), less those that a restore needs anyway.
pub const MAX_FILES: usize = 240;

/// Most pages of a VM: 9 GiB, see [`crate::memory::GuestMemory`].
const MAX_PAGES: u64 = (9 << 30) / 4096;

/// Neighbouring pages that lie side by side in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first page's number in the VM.
    pub page: u64,
    /// How many.
    pub count: u32,
    /// Number of the file, or [`ZERO`].
    pub file: u32,
    /// The first page's place in the file, in pages.
    pub slot: u64,
}

impl Extent {
    /// The VM's pages that it covers.
    #[must_use]
    pub fn pages(&self) -> Range<u64> {
        self.page..self.page + u64::from(self.count)
    }
}

/// The map. Every value of this type is sound: see [`PageMap::decode`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageMap {
    pages: u64,
    files: u32,
    extents: Vec<Extent>,
}

impl PageMap {
    /// Longest map as a file, bytes.
    pub const MAX_BYTES: u64 = HEAD as u64 + MAX_PAGES * ENTRY as u64;

    /// The map of a VM of so many pages that are all its base's.
    #[must_use]
    pub fn base(pages: u64) -> Self {
        Self {
            pages: pages.min(MAX_PAGES),
            ..Self::default()
        }
    }

    /// Builds a map from single pages `(page, file, slot)`, ascending by page, each page once.
    ///
    /// # Errors
    /// [`SnapshotError::Damaged`]: they are not so, or name files that are not there.
    pub fn of_pages(
        pages: u64,
        files: u32,
        entries: impl IntoIterator<Item = (u64, u32, u64)>,
    ) -> Result<Self, SnapshotError> {
        let mut extents: Vec<Extent> = Vec::new();
        for (page, file, slot) in entries {
            match extents.last_mut() {
                Some(last)
                    if last.pages().end == page
                        && last.file == file
                        && last.count < u32::MAX
                        && (file == ZERO || last.slot + u64::from(last.count) == slot) =>
                {
                    last.count += 1;
                }
                _ => extents.push(Extent {
                    page,
                    count: 1,
                    file,
                    slot: if file == ZERO { 0 } else { slot },
                }),
            }
        }
        Self::checked(pages, files, extents)
    }

    fn checked(pages: u64, files: u32, extents: Vec<Extent>) -> Result<Self, SnapshotError> {
        let damaged = |why: String| Err(SnapshotError::Damaged(format!("its page map {why}")));
        if pages > MAX_PAGES || files as usize > MAX_FILES {
            return damaged(format!("is of {pages} pages in {files} files"));
        }
        let mut next = 0;
        for extent in &extents {
            let end = extent.page.checked_add(extent.count.into());
            if extent.count == 0 || extent.page < next || end.is_none_or(|end| end > pages) {
                return damaged(format!("has no room for page {}", extent.page));
            }
            let far = extent.slot.checked_add(extent.count.into());
            if extent.file != ZERO
                && (extent.file >= files || far.is_none_or(|end| end > MAX_PAGES))
            {
                return damaged(format!("puts page {} nowhere", extent.page));
            }
            next = extent.page + u64::from(extent.count);
        }
        Ok(Self {
            pages,
            files,
            extents,
        })
    }

    /// Pages that the VM has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Files that it names.
    #[must_use]
    pub fn files(&self) -> u32 {
        self.files
    }

    /// Its extents, ascending.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The file and the slot that a page lies in; `None`: the base.
    #[must_use]
    pub fn find(&self, page: u64) -> Option<(u32, u64)> {
        let after = self.extents.partition_point(|extent| extent.page <= page);
        let extent = self.extents.get(after.checked_sub(1)?)?;
        let into = page - extent.page;
        (into < u64::from(extent.count)).then(|| (extent.file, extent.slot + into))
    }

    /// All single pages `(page, file, slot)` that are not the base's, ascending.
    pub fn entries(&self) -> impl Iterator<Item = (u64, u32, u64)> + '_ {
        self.extents.iter().flat_map(|extent| {
            let slot = |page| match extent.file {
                ZERO => 0,
                _ => extent.slot + (page - extent.page),
            };
            extent
                .pages()
                .map(move |page| (page, extent.file, slot(page)))
        })
    }

    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.extents.len() * ENTRY);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.files.to_le_bytes());
        bytes.extend_from_slice(&self.pages.to_le_bytes());
        bytes.extend_from_slice(&(self.extents.len() as u64).to_le_bytes());
        for extent in &self.extents {
            bytes.extend_from_slice(&extent.page.to_le_bytes());
            bytes.extend_from_slice(&extent.count.to_le_bytes());
            bytes.extend_from_slice(&extent.file.to_le_bytes());
            bytes.extend_from_slice(&extent.slot.to_le_bytes());
        }
        bytes
    }

    /// Decodes a file's bytes, which may come from anywhere.
    ///
    /// # Errors
    /// [`SnapshotError::Damaged`] for anything but a sound map of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let damaged = |why: &str| SnapshotError::Damaged(format!("its page map {why}"));
        let cut = || damaged("is cut off");
        let (head, rest) = bytes.split_first_chunk::<HEAD>().ok_or_else(cut)?;
        if &head[..8] != MAGIC {
            return Err(damaged("does not begin as one"));
        }
        let version = u32_at(head, 8);
        if version != VERSION {
            return Err(damaged(&format!(
                "has version {version}, this thaw reads {VERSION}"
            )));
        }
        let (files, pages, count) = (u32_at(head, 12), u64_at(head, 16), u64_at(head, 24));
        let (entries, odd) = rest.as_chunks::<ENTRY>();
        if count != entries.len() as u64 || !odd.is_empty() {
            return Err(damaged("has another length than it says"));
        }
        let extents = entries.iter().map(|entry| Extent {
            page: u64_at(entry, 0),
            count: u32_at(entry, 8),
            file: u32_at(entry, 12),
            slot: u64_at(entry, 16),
        });
        Self::checked(pages, files, extents.collect())
    }

    /// Reads the file.
    ///
    /// # Errors
    /// As [`Self::decode`], or it cannot be read.
    pub fn read(file: &File) -> Result<Self, SnapshotError> {
        let length = file.metadata().map_err(io("reading the page map"))?.len();
        if length > Self::MAX_BYTES {
            return Err(SnapshotError::Damaged("its page map is too long".into()));
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0)
            .map_err(io("reading the page map"))?;
        Self::decode(&bytes)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_become_one_extent_and_every_page_is_found() {
        let entries = [
            (3, 0, 0),
            (4, 0, 1),
            (5, 1, 2),
            (6, ZERO, 0),
            (7, ZERO, 0),
            (9, 0, 2),
        ];
        let map = PageMap::of_pages(10, 2, entries).unwrap();
        assert_eq!(map.extents().len(), 4);
        assert_eq!(map.find(2), None);
        assert_eq!(map.find(4), Some((0, 1)));
        assert_eq!(map.find(5), Some((1, 2)));
        assert_eq!(map.find(7).unwrap().0, ZERO);
        assert_eq!(map.find(8), None);
        assert_eq!(map.find(9), Some((0, 2)));
        assert_eq!(map.find(u64::MAX), None);
        assert!(map.entries().eq(entries));
        assert_eq!(PageMap::decode(&map.encode()).unwrap(), map);
    }

    #[test]
    fn unsound_maps_are_refused() {
        for entries in [
            vec![(10, 0, 0)],
            vec![(4, 2, 0)],
            vec![(4, 0, 0), (3, 0, 1)],
            vec![(4, 0, 0), (4, 1, 0)],
            vec![(4, 0, u64::MAX)],
        ] {
            assert!(
                PageMap::of_pages(10, 2, entries.clone()).is_err(),
                "{entries:?}"
            );
        }
        assert!(PageMap::of_pages(u64::MAX, 0, []).is_err());
        assert!(PageMap::of_pages(1, 1000, []).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), real in any::<bool>()) {
            if real && bytes.len() >= 32 {
                let extents = (bytes.len() - 32) / ENTRY;
                bytes.truncate(32 + extents * ENTRY);
                bytes[..8].copy_from_slice(MAGIC);
                bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
                bytes[12..16].copy_from_slice(&[3, 0, 0, 0]);
                bytes[16..24].copy_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0]);
                bytes[24..32].copy_from_slice(&(extents as u64).to_le_bytes());
                for entry in bytes[32..].as_chunks_mut::<ENTRY>().0 {
                    entry[3..8].fill(0);
                    entry[9..12].fill(0);
                    entry[13..16].fill(0);
                    entry[18..24].fill(0);
                }
            }
            if let Ok(map) = PageMap::decode(&bytes) {
                prop_assert_eq!(map.encode(), bytes);
                for (page, file, slot) in map.entries().take(100) {
                    prop_assert_eq!(map.find(page).map(|(f, _)| f), Some(file));
                    prop_assert!(page < map.pages() && (file == ZERO || file < map.files()), "{}", slot);
                }
            }
        }
    }
}
