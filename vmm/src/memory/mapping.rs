//! The mapping itself and the checked accesses to it.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use super::{MemoryError, PAGE, pagemap};

/// Largest memory of a VM with everything the machine keeps behind it: 8 GiB of RAM (the plan limit), and an eighth more.
const MAX_BYTES: u64 = 9 << 30;

/// Pages from which on a second thread is worth its start, which costs as much as some 30 pages.
const PREFAULT_TOGETHER: u64 = 128;

/// One VM's memory.
///
/// Guest-physical address `a` is byte `a` of the mapping. Unmapped on drop, so the VM's file
/// descriptors must be closed first (the machine's field order sees to that).
#[derive(Debug)]
pub struct GuestMemory {
    base: NonNull<u8>,
    size: u64,
    private_file: bool,
}

// SAFETY: the mapping is not tied to a thread, and all accesses are atomic or plain copies of bytes that nobody holds references to.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; racing copies see torn bytes at worst, which callers must expect of guest memory anyway.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Zeroed memory of its own, `size` bytes (a multiple of the page size).
    ///
    /// # Errors
    /// A size that is no multiple of a page or too large, or a refusal of the kernel.
    pub fn anonymous(size: u64) -> Result<Self, MemoryError> {
        Self::map(size, libc::MAP_ANONYMOUS, -1, false)
    }

    /// A private view of the first `size` bytes of `file`: reads share the file's pages, the first write to a page copies it.
    ///
    /// # Errors
    /// As [`Self::anonymous`], or a file shorter than `size` (a page beyond its end would kill the process when touched).
    pub fn private_view(file: impl AsFd, size: u64) -> Result<Self, MemoryError> {
        let file = file.as_fd();
        let stat = nix::sys::stat::fstat(file).map_err(|errno| os("fstat", errno))?;
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        if length < size {
            return Err(MemoryError::Unmappable(format!(
                "the memory file has {length} bytes, the VM needs {size}"
            )));
        }
        Self::map(size, 0, file.as_raw_fd(), true)
    }

    fn map(size: u64, flags: i32, fd: i32, private_file: bool) -> Result<Self, MemoryError> {
        let length = usize::try_from(size).unwrap_or(usize::MAX);
        if size == 0 || !size.is_multiple_of(PAGE) || size > MAX_BYTES {
            return Err(MemoryError::Unmappable(format!(
                "{size} is not a whole number of pages up to {MAX_BYTES} bytes"
            )));
        }
        // SAFETY: a fresh mapping at an address the kernel chooses; it replaces nothing.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE | flags,
                fd,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(MemoryError::Os {
                what: "mmap",
                source: std::io::Error::last_os_error(),
            });
        }
        let Some(base) = NonNull::new(base.cast::<u8>()) else {
            return Err(MemoryError::Unmappable("mapped at address 0".to_owned()));
        };
        Ok(Self {
            base,
            size,
            private_file,
        })
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Size in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.size / PAGE
    }

    /// Where the mapping starts in this process; for KVM's memory slot.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    pub(super) fn pointer(&self, address: u64, length: u64) -> Result<*mut u8, MemoryError> {
        let end = address.checked_add(length);
        if end.is_none_or(|end| end > self.size) {
            return Err(MemoryError::OutOfBounds {
                address,
                length,
                size: self.size,
            });
        }
        // SAFETY: `address <= size`, so the result is inside the mapping or one past its end.
        Ok(unsafe {
            self.base
                .as_ptr()
                .add(usize::try_from(address).unwrap_or(0))
        })
    }

    /// Copies guest memory out.
    ///
    /// # Errors
    /// A range outside the memory.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.pointer(address, into.len() as u64)?;
        // SAFETY: `from` is good for `into.len()` bytes (checked above) and `into` is not guest memory.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies into guest memory.
    ///
    /// # Errors
    /// A range outside the memory.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let to = self.pointer(address, bytes.len() as u64)?;
        // SAFETY: `to` is good for `bytes.len()` bytes (checked above) and `bytes` is not guest memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Reads `N` bytes.
    ///
    /// # Errors
    /// A range outside the memory.
    pub fn read_array<const N: usize>(&self, address: u64) -> Result<[u8; N], MemoryError> {
        let mut bytes = [0; N];
        self.read(address, &mut bytes)?;
        Ok(bytes)
    }

    fn aligned<T>(&self, address: u64) -> Result<*mut T, MemoryError> {
        let alignment = size_of::<T>() as u64;
        if !address.is_multiple_of(alignment) {
            return Err(MemoryError::Misaligned { address, alignment });
        }
        Ok(self.pointer(address, alignment)?.cast())
    }

    /// The byte at `address`, for atomic access.
    ///
    /// # Errors
    /// An address outside the memory.
    pub fn atomic_u8(&self, address: u64) -> Result<&AtomicU8, MemoryError> {
        let pointer = self.aligned::<u8>(address)?;
        // SAFETY: in bounds and aligned (checked); lives as long as the mapping, which `self` keeps.
        Ok(unsafe { AtomicU8::from_ptr(pointer) })
    }

    /// The little-endian `u32` at `address`, for atomic access.
    ///
    /// # Errors
    /// An address outside the memory or not aligned.
    pub fn atomic_u32(&self, address: u64) -> Result<&AtomicU32, MemoryError> {
        let pointer = self.aligned::<u32>(address)?;
        // SAFETY: in bounds and aligned (checked); lives as long as the mapping, which `self` keeps.
        Ok(unsafe { AtomicU32::from_ptr(pointer) })
    }

    /// The little-endian `u64` at `address`, for atomic access.
    ///
    /// # Errors
    /// An address outside the memory or not aligned.
    pub fn atomic_u64(&self, address: u64) -> Result<&AtomicU64, MemoryError> {
        let pointer = self.aligned::<u64>(address)?;
        // SAFETY: in bounds and aligned (checked); lives as long as the mapping, which `self` keeps.
        Ok(unsafe { AtomicU64::from_ptr(pointer) })
    }

    /// Reads an aligned `u64` (acquire).
    ///
    /// # Errors
    /// An address outside the memory or not aligned.
    pub fn read_u64(&self, address: u64) -> Result<u64, MemoryError> {
        Ok(self.atomic_u64(address)?.load(Ordering::Acquire))
    }

    /// Writes an aligned `u64` (release).
    ///
    /// # Errors
    /// An address outside the memory or not aligned.
    pub fn write_u64(&self, address: u64, value: u64) -> Result<(), MemoryError> {
        self.atomic_u64(address)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Makes pages writable and private now, so that no fault is paid for them later.
    /// Parts of ranges outside the memory are ignored.
    ///
    /// # Errors
    /// A refusal of the kernel (no memory, or no `MADV_POPULATE_WRITE`, which needs Linux 5.14).
    pub fn prefault(&self, page_ranges: &[Range<u64>]) -> Result<(), MemoryError> {
        let advise = |ranges: &[Range<u64>]| {
            self.advise_pages(ranges, libc::MADV_POPULATE_WRITE, "prefaulting pages")
        };
        // Copying pages is most of a restore's time, and two processors do it in half the time.
        let length = |range: &Range<u64>| range.end.saturating_sub(range.start);
        let pages: u64 = page_ranges.iter().map(length).sum();
        let alone =
            std::thread::available_parallelism().map_or(true, |processors| processors.get() < 2);
        if alone || pages < PREFAULT_TOGETHER {
            return advise(page_ranges);
        }
        let mut before = 0;
        let middle = page_ranges.iter().position(|range| {
            before += length(range);
            before > pages / 2
        });
        let (first, second) = page_ranges.split_at(middle.unwrap_or(0));
        std::thread::scope(|scope| {
            let helper = scope.spawn(|| advise(first));
            advise(second)?;
            helper.join().unwrap_or_else(|_| advise(first))
        })
    }

    /// Maps pages for reading now, shared with the file as long as nobody writes them.
    /// Parts of ranges outside the memory are ignored.
    ///
    /// # Errors
    /// As [`Self::prefault`].
    pub fn prefault_shared(&self, page_ranges: &[Range<u64>]) -> Result<(), MemoryError> {
        self.advise_pages(page_ranges, libc::MADV_POPULATE_READ, "mapping pages")
    }

    fn advise_pages(
        &self,
        page_ranges: &[Range<u64>],
        advice: i32,
        what: &'static str,
    ) -> Result<(), MemoryError> {
        for range in page_ranges {
            let (start, end) = (range.start.min(self.pages()), range.end.min(self.pages()));
            if start >= end {
                continue;
            }
            let length = (end - start) * PAGE;
            let pointer = self.pointer(start * PAGE, length)?;
            // SAFETY: the range is inside this mapping; populating changes no contents.
            let result = unsafe {
                libc::madvise(pointer.cast(), usize::try_from(length).unwrap_or(0), advice)
            };
            if result != 0 {
                return Err(MemoryError::Os {
                    what,
                    source: std::io::Error::last_os_error(),
                });
            }
        }
        Ok(())
    }

    /// Asks for huge pages where the kernel likes; good for a VM that boots, useless for one that is restored.
    pub fn prefer_huge_pages(&self) {
        // SAFETY: the range is exactly this mapping; the advice changes no contents. A refusal costs speed alone.
        unsafe {
            libc::madvise(
                self.base.as_ptr().cast(),
                usize::try_from(self.size).unwrap_or(0),
                libc::MADV_HUGEPAGE,
            )
        };
    }

    /// Numbers of the pages that belong to this VM alone, ascending: those it (or the host on its behalf) wrote
    /// since it was restored; for anonymous memory, those touched at all.
    ///
    /// # Errors
    /// `/proc/self/pagemap` cannot be read.
    pub fn private_pages(&self) -> Result<Vec<u64>, MemoryError> {
        pagemap::private_pages(self.host_address(), self.pages(), self.private_file)
    }

    /// Calls `each` with every page that holds anything but zeroes, ascending. Untouched pages of
    /// anonymous memory are skipped without reading them.
    ///
    /// # Errors
    /// `/proc/self/pagemap` cannot be read, or whatever `each` says.
    pub fn for_each_data_page<E: From<MemoryError>>(
        &self,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut page = [0_u8; PAGE as usize];
        let mut visit = |number: u64| -> Result<(), E> {
            self.read(number * PAGE, &mut page)?;
            if page.iter().any(|&byte| byte != 0) {
                each(number, &page)
            } else {
                Ok(())
            }
        };
        if self.private_file {
            (0..self.pages()).try_for_each(&mut visit)
        } else {
            self.private_pages()?.into_iter().try_for_each(&mut visit)
        }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`; references into it cannot outlive `self`.
        unsafe {
            libc::munmap(
                self.base.as_ptr().cast(),
                usize::try_from(self.size).unwrap_or(0),
            )
        };
    }
}

fn os(what: &'static str, errno: nix::errno::Errno) -> MemoryError {
    MemoryError::Os {
        what,
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;

    use super::super::page_ranges;
    use super::*;

    fn file(pages: u64) -> std::fs::File {
        let fd: OwnedFd =
            nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::empty()).unwrap();
        let mut file = std::fs::File::from(fd);
        for page in 0..pages {
            file.write_all(&[u8::try_from(page + 1).unwrap(); 4096])
                .unwrap();
        }
        file
    }

    #[test]
    fn accesses_outside_the_memory_are_refused() {
        let memory = GuestMemory::anonymous(2 * PAGE).unwrap();
        let mut bytes = [0; 16];
        assert!(memory.read(2 * PAGE - 16, &mut bytes).is_ok());
        for address in [2 * PAGE - 15, 2 * PAGE, u64::MAX, u64::MAX - 15, 1 << 40] {
            assert!(memory.read(address, &mut bytes).is_err(), "{address:#x}");
            assert!(memory.write(address, &bytes).is_err(), "{address:#x}");
        }
        assert!(memory.atomic_u64(2 * PAGE - 8).is_ok());
        assert!(memory.atomic_u64(2 * PAGE - 4).is_err());
        assert!(memory.atomic_u32(6).is_err());
    }

    #[test]
    fn a_short_file_is_refused_before_it_can_kill_the_process() {
        assert!(GuestMemory::private_view(file(1), 2 * PAGE).is_err());
        assert!(GuestMemory::private_view(file(2), 2 * PAGE).is_ok());
    }

    #[test]
    fn only_written_pages_are_private() {
        let file = file(16);
        let memory = GuestMemory::private_view(&file, 16 * PAGE).unwrap();
        let mut byte = [0];
        for page in 0..16 {
            memory.read(page * PAGE, &mut byte).unwrap();
        }
        assert!(memory.private_pages().unwrap().is_empty());
        memory.write(3 * PAGE + 7, &[9]).unwrap();
        memory.prefault(&[8..10, 15..99]).unwrap();
        assert_eq!(memory.private_pages().unwrap(), [3, 8, 9, 15]);
        let other = GuestMemory::private_view(&file, 16 * PAGE).unwrap();
        other.read(3 * PAGE + 7, &mut byte).unwrap();
        assert_eq!(byte, [4]);
    }

    #[test]
    fn pages_of_zeroes_are_not_data() {
        let memory = GuestMemory::anonymous(64 * PAGE).unwrap();
        memory.write(5 * PAGE, &[1]).unwrap();
        memory.write(9 * PAGE, &[0]).unwrap();
        memory.write(63 * PAGE + 4095, &[2]).unwrap();
        let mut found = Vec::new();
        memory
            .for_each_data_page(|number, page| {
                found.push((number, page.len()));
                Ok::<(), MemoryError>(())
            })
            .unwrap();
        assert_eq!(found, [(5, 4096), (63, 4096)]);
    }

    #[test]
    fn pages_join_into_ranges() {
        assert_eq!(page_ranges(&[1, 2, 2, 3, 7, 9, 10]), [1..4, 7..8, 9..11]);
        assert_eq!(page_ranges(&[]), []);
    }
}
