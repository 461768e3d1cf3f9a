//! Pinned pages shared with the host.

use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use thaw_wire::layout::PAGE;
use thaw_wire::ring::Shared;

/// Locked, populated pages that children do not inherit. Never unmapped: the host may write
/// into them for as long as the guest lives.
#[derive(Debug)]
pub struct Pages {
    base: NonNull<u8>,
    count: usize,
}

impl Pages {
    /// Maps `count` zeroed pages.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn map(count: usize) -> io::Result<Self> {
        let len = count * PAGE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice; nothing else refers to it.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_LOCKED | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range is the mapping just made.
        if unsafe { libc::madvise(base, len, libc::MADV_DONTFORK) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { base, count })
    }

    /// The frame number of each page, from `/proc/self/pagemap`.
    ///
    /// # Errors
    /// The file cannot be read, or the kernel hides the numbers.
    pub fn frames(&self) -> io::Result<Vec<u64>> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let pagemap = std::fs::File::open("/proc/self/pagemap")?;
        let mut words = vec![0; self.count * 8];
        pagemap.read_exact_at(&mut words, (self.base.as_ptr() as usize / PAGE * 8) as u64)?;
        words
            .chunks_exact(8)
            .map(|word| {
                let entry = u64::from_le_bytes(word.try_into().unwrap_or_default());
                match entry & FRAME {
                    frame if entry & PRESENT != 0 && frame != 0 => Ok(frame),
                    _ => Err(io::Error::other("a pinned page has no frame number")),
                }
            })
            .collect()
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.count * PAGE);
        // SAFETY: inside the mapping (asserted), aligned, never unmapped, and accessed as atomics by
        // both ends.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    fn double(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.count * PAGE);
        // SAFETY: as for `word`.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    /// Reads a `u64` that the host may have written.
    pub fn load64(&self, offset: usize) -> u64 {
        u64::from_le(self.double(offset).load(Ordering::Acquire))
    }

    /// Writes a `u64`.
    pub fn store64(&self, offset: usize, value: u64) {
        self.double(offset).store(value.to_le(), Ordering::Release);
    }

    /// Writes a `u32`.
    pub fn store32(&self, offset: usize, value: u32) {
        self.word(offset).store(value.to_le(), Ordering::Release);
    }

    /// One end of a ring whose bytes are the `pages` pages from page `first` on.
    pub fn ring(&'static self, first: usize, pages: usize, mine: usize, theirs: usize) -> RingEnd {
        assert!(first + pages <= self.count);
        RingEnd {
            pages: self,
            first: first * PAGE,
            capacity: (pages * PAGE) as u32,
            mine,
            theirs,
        }
    }
}

/// One end of a ring in [`Pages`].
#[derive(Debug)]
pub struct RingEnd {
    pages: &'static Pages,
    first: usize,
    capacity: u32,
    mine: usize,
    theirs: usize,
}

impl RingEnd {
    fn at(&self, offset: u32, len: usize) -> *mut u8 {
        assert!(offset as usize + len <= self.capacity as usize);
        // SAFETY: within the ring (asserted), which is within the mapping (checked by `Pages::ring`).
        unsafe { self.pages.base.as_ptr().add(self.first + offset as usize) }
    }
}

impl Shared for RingEnd {
    fn capacity(&self) -> u32 {
        self.capacity
    }

    fn peer(&self) -> u32 {
        u32::from_le(self.pages.word(self.theirs).load(Ordering::Acquire))
    }

    fn publish(&mut self, position: u32) {
        self.pages.store32(self.mine, position);
    }

    fn read(&self, offset: u32, into: &mut [u8]) {
        // SAFETY: `at` checked the range; the protocol has the host write only what lies outside of
        // [tail, head), and a host that breaks it owns the guest's memory anyway.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.at(offset, into.len()),
                into.as_mut_ptr(),
                into.len(),
            )
        }
    }

    fn write(&mut self, offset: u32, from: &[u8]) {
        // SAFETY: as for `read`.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.at(offset, from.len()), from.len())
        }
    }
}
