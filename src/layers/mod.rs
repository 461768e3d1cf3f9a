//! A frozen VM's memory: a base that many share, and files of pages laid over it.
//!
//! ```text
//! base   a template's memory file, whole
//! chunk  pages of one region that a VM wrote, on disk, named by its content   (chunk.rs)
//! loose  pages that a VM wrote, in memory only: between a VM and its forks
//! map    which page lies where                                                (thaw_vmm::snapshot::PageMap)
//! ```
//!
//! A VM maps all of them privately, so whatever is in them is shared by all VMs that come from them.
//! [`Shelf`] keeps bases and chunks on the disk.

mod chunk;
mod keep;
mod shelf;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use nix::sys::memfd::{MFdFlags, memfd_create};
use thaw_vmm::snapshot::{PageMap, ZERO};

pub use chunk::{Damage, Digest, chunk_pages};
pub use keep::Kept;
pub use shelf::{Shelf, Swept};

/// Size of a page, bytes.
pub const PAGE: usize = 4096;

/// Memory that others are laid over.
#[derive(Debug)]
pub struct Base {
    /// The memory: a sealed memfd, or a file that nobody writes to.
    pub file: Arc<File>,
    /// Its digest, as [`crate::template::memory::measure`] makes it.
    pub sha256: String,
    /// A file on disk with the same content, to be kept by another name.
    pub path: Option<PathBuf>,
}

/// A file of pages.
#[derive(Debug)]
pub struct Pages {
    /// The file; page `n` of it is at `n * PAGE`.
    pub file: Arc<File>,
    /// Its name on the shelf, if it is there.
    pub digest: Option<Digest>,
}

/// A frozen VM's memory.
#[derive(Debug)]
pub struct Layers {
    /// What the rest is laid over.
    pub base: Arc<Base>,
    /// The files that the map names, in its order.
    pub files: Vec<Arc<Pages>>,
    /// Where each page is.
    pub map: PageMap,
    /// The map as a file, for workers, made when the first one wants it.
    encoded: OnceLock<Arc<File>>,
}

/// What freezing a VM gave: what it has written since it was restored.
#[derive(Debug)]
pub struct Frost {
    /// Everything but memory.
    pub state: Arc<File>,
    /// The pages, one after the other.
    pub pages: Arc<File>,
    /// Their numbers, ascending.
    pub numbers: Vec<u64>,
    /// What the VM was restored from.
    pub origin: Arc<Layers>,
    /// How long it stood still.
    pub pause: Duration,
}

impl Layers {
    /// Layers that are one base.
    ///
    /// # Errors
    /// The file cannot be looked at.
    pub fn whole(base: Arc<Base>) -> anyhow::Result<Self> {
        let length = base.file.metadata().context("cannot look at a base")?.len();
        Ok(Self::new(
            base,
            Vec::new(),
            PageMap::base(length / PAGE as u64),
        ))
    }

    /// Layers of these files.
    pub fn new(base: Arc<Base>, files: Vec<Arc<Pages>>, map: PageMap) -> Self {
        Self {
            base,
            files,
            map,
            encoded: OnceLock::new(),
        }
    }

    /// The same memory over another file with the base's content.
    pub fn over(&self, base: Arc<Base>) -> Self {
        Self::new(base, self.files.clone(), self.map.clone())
    }

    /// Whether there is only a base.
    pub fn is_whole(&self) -> bool {
        self.files.is_empty() && self.map.extents().is_empty()
    }

    /// Reads one page.
    ///
    /// # Errors
    /// Its file cannot be read.
    pub fn read(&self, page: u64, into: &mut [u8; PAGE]) -> anyhow::Result<()> {
        let (file, slot) = match self.map.find(page) {
            Some((ZERO, _)) => {
                into.fill(0);
                return Ok(());
            }
            Some((number, slot)) => {
                let pages = self.files.get(number as usize);
                (&pages.context("a page lies in no file")?.file, slot)
            }
            None => (&self.base.file, page),
        };
        file.read_exact_at(into, slot * PAGE as u64)
            .with_context(|| format!("cannot read page {page}"))
    }

    /// The map as a file.
    ///
    /// # Errors
    /// The host has no memory for it.
    pub fn map_file(&self) -> anyhow::Result<Arc<File>> {
        if let Some(file) = self.encoded.get() {
            return Ok(file.clone());
        }
        let file = memory_file("thaw-map")?;
        file.write_all_at(&self.map.encode(), 0)
            .context("cannot write a page map")?;
        Ok(self.encoded.get_or_init(|| Arc::new(file)).clone())
    }
}

impl Frost {
    /// The frozen VM's memory, without a disk: what the VM wrote is laid over what it came from.
    ///
    /// # Errors
    /// Its pages lie in more files than a VM can be restored from; a snapshot on disk gathers them.
    pub fn layers(&self) -> anyhow::Result<Layers> {
        let origin = &self.origin;
        // Files of which nothing is left to be seen are let go.
        let mut used = vec![false; origin.files.len()];
        let mut entries = Vec::new();
        let mut mine = (0..).zip(&self.numbers).peekable();
        for (page, file, slot) in origin.map.entries() {
            while let Some((slot, _)) = mine.next_if(|(_, number)| **number < page) {
                entries.push((self.numbers[slot], None, slot as u64));
            }
            if let Some((slot, _)) = mine.next_if(|(_, number)| **number == page) {
                entries.push((page, None, slot as u64));
                continue;
            }
            if file != ZERO {
                used[file as usize] = true;
            }
            entries.push((page, Some(file), slot));
        }
        entries.extend(mine.map(|(slot, number)| (*number, None, slot as u64)));
        let mut files = Vec::new();
        let mut renumbered = vec![ZERO; used.len()];
        for (old, _) in used.iter().enumerate().filter(|(_, used)| **used) {
            renumbered[old] = files.len() as u32;
            files.push(origin.files[old].clone());
        }
        let own = files.len() as u32;
        files.push(Arc::new(Pages {
            file: self.pages.clone(),
            digest: None,
        }));
        let entries = entries.into_iter().map(|(page, file, slot)| {
            let file = match file {
                None => own,
                Some(ZERO) => ZERO,
                Some(old) => renumbered[old as usize],
            };
            (page, file, slot)
        });
        let map = PageMap::of_pages(origin.map.pages(), files.len() as u32, entries)?;
        Ok(Layers::new(origin.base.clone(), files, map))
    }
}

/// An empty file in memory.
///
/// # Errors
/// The host has no descriptor or memory for it.
pub fn memory_file(name: &str) -> anyhow::Result<File> {
    let name = std::ffi::CString::new(name).context("a name with a NUL")?;
    let file = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC);
    Ok(File::from(file.context("cannot make a memfd")?))
}

/// The numbers in a list that a worker wrote: little-endian `u64`, ascending, below `pages`.
///
/// # Errors
/// The file cannot be read, or is no such list.
pub fn page_numbers(list: &File, pages: u64) -> anyhow::Result<Vec<u64>> {
    let length = list.metadata().context("cannot look at a list")?.len();
    anyhow::ensure!(length <= pages * 8, "a list of pages is too long");
    let mut bytes = vec![0; usize::try_from(length).context("a list of pages is too long")?];
    list.read_exact_at(&mut bytes, 0)
        .context("cannot read a list of pages")?;
    let (words, odd) = bytes.as_chunks::<8>();
    let numbers: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let sound = odd.is_empty()
        && numbers.windows(2).all(|pair| pair[0] < pair[1])
        && numbers.last().is_none_or(|last| *last < pages);
    anyhow::ensure!(sound, "a list of pages is none");
    Ok(numbers)
}

impl AsFd for Base {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A base of so many pages, page `n` full of `n + 1`.
    pub(crate) fn base(pages: u8) -> Arc<Base> {
        let file = memory_file("base").unwrap();
        for page in 0..pages {
            file.write_all_at(&[page + 1; PAGE], u64::from(page) * PAGE as u64)
                .unwrap();
        }
        let sha256 = crate::template::memory::measure(&file).unwrap().sha256;
        Arc::new(Base {
            file: Arc::new(file),
            sha256,
            path: None,
        })
    }

    /// A VM that wrote `(page, byte)` since it came from `origin`.
    pub(crate) fn frost(origin: &Arc<Layers>, wrote: &[(u64, u8)]) -> Frost {
        let pages = memory_file("pages").unwrap();
        for (slot, (_, byte)) in (0..).zip(wrote) {
            pages
                .write_all_at(&[*byte; PAGE], slot * PAGE as u64)
                .unwrap();
        }
        let state = memory_file("state").unwrap();
        state.write_all_at(b"state", 0).unwrap();
        Frost {
            state: Arc::new(state),
            pages: Arc::new(pages),
            numbers: wrote.iter().map(|(page, _)| *page).collect(),
            origin: origin.clone(),
            pause: Duration::ZERO,
        }
    }

    pub(crate) fn bytes(layers: &Layers) -> Vec<u8> {
        let mut page = [0; PAGE];
        let read = |number| {
            layers.read(number, &mut page).unwrap();
            assert!(page.iter().all(|byte| *byte == page[0]));
            page[0]
        };
        (0..layers.map.pages()).map(read).collect()
    }

    #[test]
    fn forks_of_forks_see_what_was_written_last() {
        let whole = Arc::new(Layers::whole(base(8)).unwrap());
        assert!(whole.is_whole());
        let once = Arc::new(
            frost(&whole, &[(1, 50), (2, 51), (6, 52)])
                .layers()
                .unwrap(),
        );
        assert_eq!(bytes(&once), [1, 50, 51, 4, 5, 6, 52, 8]);
        let twice = Arc::new(frost(&once, &[(0, 60), (2, 61)]).layers().unwrap());
        assert_eq!(bytes(&twice), [60, 50, 61, 4, 5, 6, 52, 8]);
        assert_eq!(twice.files.len(), 2);
        // Nothing is left of the first two.
        let all = frost(&twice, &[(0, 70), (1, 71), (2, 72), (6, 73)])
            .layers()
            .unwrap();
        assert_eq!(
            (bytes(&all), all.files.len()),
            (vec![70, 71, 72, 4, 5, 6, 73, 8], 1)
        );
        assert_eq!(bytes(&once), [1, 50, 51, 4, 5, 6, 52, 8]);
    }

    #[test]
    fn a_list_that_is_none_is_refused() {
        let list = |numbers: &[u64]| {
            let file = memory_file("list").unwrap();
            let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            file.write_all_at(&bytes, 0).unwrap();
            page_numbers(&file, 10)
        };
        assert_eq!(list(&[1, 2, 9]).unwrap(), [1, 2, 9]);
        for wrong in [&[2, 1][..], &[1, 1], &[10], &[0; 11]] {
            assert!(list(wrong).is_err(), "{wrong:?}");
        }
    }
}
