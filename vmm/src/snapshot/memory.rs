//! The `memory` file: sparse, so that a guest's untouched memory costs nothing.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{PageMap, SnapshotError, io};
use crate::memory::{GuestMemory, MemoryError, PAGE, page_ranges};

const PAGE_BYTES: usize = PAGE as usize;

/// Bytes moved at once: large enough that system calls do not show.
const CHUNK: usize = 1024 * 1024;

/// A frozen VM's memory, as the files that it lies in.
#[derive(Debug)]
pub struct FrozenMemory {
    base: File,
    over: Option<(PageMap, Vec<File>)>,
}

impl FrozenMemory {
    /// All of it in one file.
    #[must_use]
    pub fn whole(base: File) -> Self {
        Self { base, over: None }
    }

    /// Files laid over a base, as the map says.
    #[must_use]
    pub fn layered(base: File, map: PageMap, files: Vec<File>) -> Self {
        let over = Some((map, files));
        Self { base, over }
    }

    /// A private view for a VM with `size` bytes of memory.
    ///
    /// # Errors
    /// The files are not of such a VM, or the kernel refused.
    pub fn view(&self, size: u64) -> Result<GuestMemory, MemoryError> {
        let memory = GuestMemory::private_view(&self.base, size)?;
        if let Some((map, files)) = &self.over {
            memory.lay_over(map, &files.iter().collect::<Vec<_>>())?;
        }
        Ok(memory)
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedMemory {
    /// Apparent size of the file, bytes.
    pub bytes: u64,
    /// Pages that hold anything but zeroes.
    pub pages: u64,
}

/// Writes memory into an empty file, leaving holes for zeroes. The guest must stand still.
///
/// # Errors
/// The file cannot be written.
pub fn save(memory: &GuestMemory, file: &File) -> Result<SavedMemory, SnapshotError> {
    let bytes = memory.size();
    file.set_len(bytes).map_err(io("sizing the memory file"))?;
    let mut pages = 0;
    let mut run = Run::default();
    memory.for_each_data_page(|number, page| {
        pages += 1;
        run.add(number, page, file)
    })?;
    run.flush(file)?;
    Ok(SavedMemory { bytes, pages })
}

/// Writes the pages that belong to this VM alone into an empty file, one after the other, and their numbers
/// (little-endian `u64`, ascending) into another. The guest must stand still.
///
/// # Errors
/// The files cannot be written.
pub fn save_private(
    memory: &GuestMemory,
    file: &File,
    list: &File,
) -> Result<SavedMemory, SnapshotError> {
    let pages = memory.private_pages()?;
    let mut slot = 0;
    for range in page_ranges(&pages) {
        memory.write_to_file(&range, file, slot * PAGE)?;
        slot += range.end - range.start;
    }
    super::working_set::write(list, &pages)?;
    Ok(SavedMemory {
        bytes: slot * PAGE,
        pages: slot,
    })
}

/// Neighbouring pages, gathered into one write.
#[derive(Default)]
struct Run {
    first: u64,
    bytes: Vec<u8>,
}

impl Run {
    fn add(&mut self, number: u64, page: &[u8], file: &File) -> Result<(), SnapshotError> {
        let next = self.first + (self.bytes.len() / PAGE_BYTES) as u64;
        if self.bytes.is_empty() || next != number || self.bytes.len() >= CHUNK {
            self.flush(file)?;
            self.first = number;
        }
        self.bytes.extend_from_slice(page);
        Ok(())
    }

    fn flush(&mut self, file: &File) -> Result<(), SnapshotError> {
        if !self.bytes.is_empty() {
            file.write_all_at(&self.bytes, self.first * PAGE)
                .map_err(io("writing the memory file"))?;
            self.bytes.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn memfd() -> File {
        File::from(memfd_create(c"test", MFdFlags::empty()).unwrap())
    }

    fn memory() -> GuestMemory {
        let memory = GuestMemory::anonymous(4096 * PAGE).unwrap();
        for page in [0, 1, 2, 700, 4095] {
            memory.write(page * PAGE + 5, &[page as u8 | 1]).unwrap();
        }
        memory.write(100 * PAGE, &[0]).unwrap();
        memory
    }

    #[test]
    fn what_changed_is_laid_over_its_base() {
        let base = memfd();
        save(&memory(), &base).unwrap();
        let changed = GuestMemory::private_view(&base, 4096 * PAGE).unwrap();
        for page in [1, 2, 3, 2000] {
            changed.write(page * PAGE, &[0xee]).unwrap();
        }
        let (pages, list) = (memfd(), memfd());
        let saved = save_private(&changed, &pages, &list).unwrap();
        assert_eq!((saved.pages, saved.bytes), (4, 4 * PAGE));
        assert_eq!(list.metadata().unwrap().len(), 4 * 8);
        let entries = [
            (1, 0, 0),
            (2, 0, 1),
            (3, 0, 2),
            (700, crate::snapshot::ZERO, 0),
            (2000, 0, 3),
        ];
        let map = crate::snapshot::PageMap::of_pages(4096, 1, entries).unwrap();
        let again = GuestMemory::private_view(&base, 4096 * PAGE).unwrap();
        again.lay_over(&map, &[&pages]).unwrap();
        for (page, first) in [
            (0, 0),
            (1, 0xee),
            (2, 0xee),
            (3, 0xee),
            (700, 0),
            (2000, 0xee),
            (2001, 0),
        ] {
            assert_eq!(again.read_array(page * PAGE).unwrap(), [first], "{page}");
        }
        assert_eq!(again.read_array(2 * PAGE + 5).unwrap(), [3]);
        again.write(3 * PAGE, &[7]).unwrap();
        again.write(9 * PAGE, &[7]).unwrap();
        let private = again.private_pages().unwrap();
        assert!(
            private.contains(&3) && private.contains(&9) && !private.contains(&2),
            "{private:?}"
        );
        assert_eq!(changed.read_array(3 * PAGE).unwrap(), [0xee]);
    }

    #[test]
    fn a_file_too_short_for_its_map_is_refused() {
        let memory = GuestMemory::anonymous(16 * PAGE).unwrap();
        let short = memfd();
        short.set_len(PAGE).unwrap();
        let map = crate::snapshot::PageMap::of_pages(16, 1, [(3, 0, 0), (4, 0, 1)]).unwrap();
        assert!(memory.lay_over(&map, &[&short]).is_err());
        let far = crate::snapshot::PageMap::of_pages(17, 0, []).unwrap();
        assert!(memory.lay_over(&far, &[]).is_err());
    }

    #[test]
    fn memory_survives_its_file() {
        let file = memfd();
        let saved = save(&memory(), &file).unwrap();
        assert_eq!(
            saved,
            SavedMemory {
                bytes: 4096 * PAGE,
                pages: 5
            }
        );
        assert_eq!(file.metadata().unwrap().len(), 4096 * PAGE);
        assert!(file.metadata().unwrap().blocks() * 512 <= 5 * PAGE);
        let restored = GuestMemory::private_view(&file, 4096 * PAGE).unwrap();
        for page in [0, 1, 2, 700, 4095] {
            let byte = restored.read_array(page * PAGE + 5).unwrap();
            assert_eq!(byte, [page as u8 | 1]);
        }
    }
}
