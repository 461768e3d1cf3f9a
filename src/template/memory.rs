//! Guest memory as a file: measured by content, and copied into a sealed memfd.
//!
//! Most of a fresh guest's memory was never touched. Holes stay holes, and pages of zeroes are
//! not copied, so a template costs the host only what is in it.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek};
use sha2::{Digest, Sha256};

use super::manifest::MemoryPart;

/// Size of a page, bytes.
const PAGE: usize = 4096;
/// Bytes that are read at a time.
const CHUNK: usize = 256 * PAGE;

/// Measures a memory file.
///
/// # Errors
/// It cannot be read.
pub fn measure(file: &File) -> anyhow::Result<MemoryPart> {
    let mut hash = Sha256::new();
    let mut pages = 0;
    for_each_page(file, |number, bytes| {
        hash.update(number.to_le_bytes());
        hash.update(bytes);
        pages += 1;
        Ok(())
    })?;
    Ok(MemoryPart {
        bytes: file
            .metadata()
            .context("cannot look at a memory file")?
            .len(),
        pages,
        sha256: hex::encode(hash.finalize()),
    })
}

/// Copies a memory file of `bytes` into a memfd that nobody can write, grow or shrink any more.
///
/// # Errors
/// The file has another length, cannot be read, or the host has no memory for it.
pub fn seal(file: &File, bytes: u64) -> anyhow::Result<File> {
    let found = file
        .metadata()
        .context("cannot look at a memory file")?
        .len();
    if found != bytes {
        bail!("it has {found} bytes where {bytes} belong");
    }
    let sealed = File::from(
        memfd_create(
            c"thaw-template",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )
        .context("cannot make a memfd")?,
    );
    copy(file, &sealed)?;
    fcntl(
        sealed.as_fd(),
        FcntlArg::F_ADD_SEALS(
            SealFlag::F_SEAL_WRITE
                | SealFlag::F_SEAL_GROW
                | SealFlag::F_SEAL_SHRINK
                | SealFlag::F_SEAL_SEAL,
        ),
    )
    .context("cannot seal a memfd")?;
    Ok(sealed)
}

/// Copies a memory file into an empty one; holes stay holes.
///
/// # Errors
/// One cannot be read, or the other not be written.
pub fn copy(file: &File, to: &File) -> anyhow::Result<()> {
    let bytes = file
        .metadata()
        .context("cannot look at a memory file")?
        .len();
    to.set_len(bytes)
        .context("cannot size a copy of a memory file")?;
    // Neighbouring pages go in one write: a call for each would take most of the time.
    let mut run = Vec::with_capacity(CHUNK);
    let mut at = 0;
    let write = |run: &[u8], at| {
        to.write_all_at(run, at)
            .context("cannot fill a copy of a memory file")
    };
    for_each_page(file, |number, page| {
        let offset = number * PAGE as u64;
        if run.len() >= CHUNK || offset != at + run.len() as u64 {
            write(&run, at)?;
            run.clear();
            at = offset;
        }
        run.extend_from_slice(page);
        Ok(())
    })?;
    write(&run, at)
}

/// Calls `visit` with every page that is not all zeroes: its number and its bytes, in order.
pub(crate) fn for_each_page(
    file: &File,
    mut visit: impl FnMut(u64, &[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let length = file
        .metadata()
        .context("cannot look at a memory file")?
        .len();
    if length % PAGE as u64 != 0 {
        bail!("a memory file has {length} bytes, not a whole number of pages");
    }
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < length {
        let start = match seek(file, at, Whence::SeekData)? {
            Some(start) => start / PAGE as u64 * PAGE as u64,
            None => break,
        };
        let end = seek(file, start.max(at), Whence::SeekHole)?
            .unwrap_or(length)
            .next_multiple_of(PAGE as u64)
            .min(length);
        at = start.max(at);
        while at < end {
            let count = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            file.read_exact_at(&mut buffer[..count], at)
                .context("cannot read a memory file")?;
            for (index, page) in buffer[..count].chunks_exact(PAGE).enumerate() {
                if !is_zero(page) {
                    visit(at / PAGE as u64 + index as u64, page)?;
                }
            }
            at += count as u64;
        }
    }
    Ok(())
}

/// The next data or hole at or after an offset; `None` past the last one.
fn seek(file: &File, from: u64, what: Whence) -> anyhow::Result<Option<u64>> {
    let from = i64::try_from(from).context("a memory file is too long")?;
    match lseek(file.as_fd(), from, what) {
        Ok(at) => Ok(Some(
            u64::try_from(at).context("a file offset is negative")?,
        )),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error).context("cannot find the holes of a memory file"),
    }
}

fn is_zero(page: &[u8]) -> bool {
    // A slice comparison compiles to memcmp, which is fast even without optimization.
    static ZEROES: [u8; PAGE] = [0; PAGE];
    page == &ZEROES[..page.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn sparse() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 3 * PAGE], 5 * PAGE as u64).unwrap();
        file.write_all_at(&[0; 2 * PAGE], 20 * PAGE as u64).unwrap();
        file.write_all_at(&[9], 40 << 20).unwrap();
        file.write_all_at(&[1], (64 << 20) - 1).unwrap();
        file
    }

    #[test]
    fn a_copy_is_equal_sparse_and_sealed() {
        let file = sparse();
        let measured = measure(&file).unwrap();
        assert_eq!((measured.bytes, measured.pages), (64 << 20, 5));
        let mut sealed = seal(&file, 64 << 20).unwrap();
        assert_eq!(measure(&sealed).unwrap(), measured);
        let mut page = [0; PAGE];
        sealed.read_exact_at(&mut page, 7 * PAGE as u64).unwrap();
        assert_eq!(page, [7; PAGE]);
        use std::os::unix::fs::MetadataExt;
        assert!(sealed.metadata().unwrap().blocks() * 512 < 1 << 20);
        assert!(sealed.write_all(b"x").is_err());
        assert!(sealed.set_len(1).is_err());
    }

    #[test]
    fn content_decides_the_digest_and_holes_do_not() {
        let file = sparse();
        let before = measure(&file).unwrap();
        file.write_all_at(&[0; PAGE], 30 << 20).unwrap();
        assert_eq!(measure(&file).unwrap(), before);
        file.write_all_at(&[8], 6 * PAGE as u64).unwrap();
        assert_ne!(measure(&file).unwrap(), before);
    }

    #[test]
    fn an_odd_length_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        assert!(measure(&file).is_err());
        assert!(seal(&file, 4096).is_err());
        let empty = tempfile::tempfile().unwrap();
        assert_eq!(measure(&empty).unwrap().pages, 0);
    }
}
