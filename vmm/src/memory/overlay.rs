//! Files of pages laid over a private view, and private pages written out of it.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::{GuestMemory, MemoryError, PAGE};
use crate::snapshot::{Extent, PageMap, ZERO};

/// Extents from which on single ones are copied instead of mapped: half of the mappings that Linux gives a
/// process by default (`vm.max_map_count`, 65530), because mapping within another splits that in two.
const MAX_MAPPINGS: usize = 30_000;

impl GuestMemory {
    /// Lays files of pages over the memory, as the map says: they are shared until written to, as the base is. Must
    /// come before anything reads or writes the memory.
    ///
    /// # Errors
    /// The map is for another size or names files that are missing or too short, or the kernel refused.
    pub fn lay_over(&self, map: &PageMap, files: &[&File]) -> Result<(), MemoryError> {
        if map.pages() != self.pages() || map.files() as usize > files.len() {
            return Err(MemoryError::Unmappable(format!(
                "the page map is of {} pages in {} files; the VM has {} and came with {}",
                map.pages(),
                map.files(),
                self.pages(),
                files.len()
            )));
        }
        let mut slots = Vec::with_capacity(files.len());
        for file in files {
            let stat = file.metadata().map_err(|source| MemoryError::Os {
                what: "fstat",
                source,
            })?;
            slots.push(stat.len() / PAGE);
        }
        for (number, extent) in map.extents().iter().enumerate() {
            if extent.file == ZERO {
                self.map_over(extent, None)?;
                continue;
            }
            let at = extent.file as usize;
            // A page beyond its file's end would kill the process when touched.
            if extent.slot + u64::from(extent.count) > slots[at] {
                return Err(MemoryError::Unmappable(format!(
                    "page {} lies beyond the end of its file",
                    extent.page
                )));
            }
            if number < MAX_MAPPINGS {
                self.map_over(extent, Some(files[at]))?;
            } else {
                self.copy_over(extent, files[at])?;
            }
        }
        Ok(())
    }

    fn map_over(&self, extent: &Extent, file: Option<&File>) -> Result<(), MemoryError> {
        let length = u64::from(extent.count) * PAGE;
        let place = self.pointer(extent.page * PAGE, length)?;
        let (flags, fd) = match file {
            Some(file) => (0, file.as_raw_fd()),
            None => (libc::MAP_ANONYMOUS, -1),
        };
        let offset = if file.is_some() {
            extent.slot * PAGE
        } else {
            0
        };
        // SAFETY: the range is inside this mapping (checked by `pointer`), which nobody holds references into yet, and
        // it stays mapped readable and writable for as long as `self` says.
        let mapped = unsafe {
            libc::mmap(
                place.cast(),
                usize::try_from(length).unwrap_or(0),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED | flags,
                fd,
                libc::off_t::try_from(offset).unwrap_or(libc::off_t::MAX),
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(last_error("mapping pages over the base"));
        }
        Ok(())
    }

    fn copy_over(&self, extent: &Extent, file: &File) -> Result<(), MemoryError> {
        use std::os::unix::fs::FileExt;
        let mut page = [0; PAGE as usize];
        for (number, slot) in extent.pages().zip(extent.slot..) {
            file.read_exact_at(&mut page, slot * PAGE)
                .map_err(|source| MemoryError::Os {
                    what: "reading pages",
                    source,
                })?;
            self.write(number * PAGE, &page)?;
        }
        Ok(())
    }

    /// Writes pages to a file, from `offset` on, straight from the mapping.
    ///
    /// # Errors
    /// The pages are not all the VM's, or the file cannot be written.
    pub fn write_to_file(
        &self,
        pages: &Range<u64>,
        file: &File,
        offset: u64,
    ) -> Result<(), MemoryError> {
        let length = pages.end.saturating_sub(pages.start).saturating_mul(PAGE);
        let from = self.pointer(pages.start.saturating_mul(PAGE), length)?;
        let mut done = 0;
        while done < length {
            // SAFETY: `from` is good for `length` bytes (checked by `pointer`) and `done < length`; the kernel only reads them.
            let wrote = unsafe {
                libc::pwrite(
                    file.as_raw_fd(),
                    from.add(usize::try_from(done).unwrap_or(0)).cast(),
                    usize::try_from(length - done).unwrap_or(0),
                    libc::off_t::try_from(offset + done).unwrap_or(libc::off_t::MAX),
                )
            };
            match u64::try_from(wrote) {
                Ok(0) => {
                    return Err(MemoryError::Os {
                        what: "writing pages",
                        source: std::io::ErrorKind::WriteZero.into(),
                    });
                }
                Ok(wrote) => done += wrote,
                Err(_) => {
                    let error = std::io::Error::last_os_error();
                    if error.kind() != std::io::ErrorKind::Interrupted {
                        return Err(MemoryError::Os {
                            what: "writing pages",
                            source: error,
                        });
                    }
                }
            }
        }
        Ok(())
    }
}

fn last_error(what: &'static str) -> MemoryError {
    MemoryError::Os {
        what,
        source: std::io::Error::last_os_error(),
    }
}
