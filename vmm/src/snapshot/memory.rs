//! The `memory` file: sparse, so that a guest's untouched memory costs nothing.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{SnapshotError, io};
use crate::memory::{GuestMemory, PAGE};

const PAGE_BYTES: usize = PAGE as usize;

/// Bytes moved at once: large enough that system calls do not show.
const CHUNK: usize = 1024 * 1024;

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
