//! Memory: mapping, moving, protecting, sharing and copying, with contents verified.

use std::ptr::null_mut;

use crate::check::{Check, Ended, Outcome, fork, status_of, sys, wait};
use crate::ensure;

/// This room's checks.
pub const CHECKS: &[Check] = &[
    Check {
        name: "memory-map-stress",
        limit: 60,
        run: map_stress,
    },
    Check {
        name: "memory-remap",
        limit: 30,
        run: remap,
    },
    Check {
        name: "memory-protect-flips",
        limit: 60,
        run: protect_flips,
    },
    Check {
        name: "memory-dontneed",
        limit: 30,
        run: dontneed,
    },
    Check {
        name: "memory-shared",
        limit: 30,
        run: shared,
    },
    Check {
        name: "memory-copy-on-write",
        limit: 60,
        run: copy_on_write,
    },
    Check {
        name: "memory-large-touch",
        limit: 120,
        run: large_touch,
    },
];

const PAGE: usize = 4096;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A mapping of this check's own; unmapped when dropped.
struct Mapping {
    at: *mut u64,
    bytes: usize,
}

impl Mapping {
    fn new(bytes: usize, kind: i32) -> Result<Self, String> {
        // SAFETY: a new anonymous mapping touches nothing that exists.
        let at = unsafe {
            libc::mmap(
                null_mut(),
                bytes,
                READ_WRITE,
                kind | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        ensure!(
            at != libc::MAP_FAILED,
            "mmap of {bytes} bytes: errno {}",
            crate::check::errno()
        );
        Ok(Self {
            at: at.cast(),
            bytes,
        })
    }

    /// The first word of page `page`.
    fn word(&self, page: usize) -> *mut u64 {
        assert!(page < self.bytes / PAGE, "page {page} is outside");
        self.at.wrapping_byte_add(page * PAGE)
    }

    fn read(&self, page: usize) -> u64 {
        // SAFETY: `word` stays inside the mapping, which callers made readable.
        unsafe { self.word(page).read_volatile() }
    }

    fn write(&self, page: usize, value: u64) {
        // SAFETY: `word` stays inside the mapping, which callers made writable.
        unsafe { self.word(page).write_volatile(value) }
    }

    /// Writes a pattern into every page.
    fn fill(&self, seed: u64) {
        (0..self.bytes / PAGE).for_each(|page| self.write(page, pattern(seed, page)));
    }

    /// The first page that does not hold its pattern.
    fn verify(&self, seed: u64) -> Outcome {
        for page in 0..self.bytes / PAGE {
            let found = self.read(page);
            ensure!(
                found == pattern(seed, page),
                "page {page}: {found:#x}, wanted {:#x}",
                pattern(seed, page)
            );
        }
        Ok(())
    }

    fn protect(&self, from: usize, pages: usize, protection: i32) -> Outcome {
        // SAFETY: the range lies in this mapping.
        sys("mprotect", unsafe {
            libc::mprotect(self.word(from).cast(), pages * PAGE, protection)
        })?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

fn pattern(seed: u64, page: usize) -> u64 {
    (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (page as u64 + 1).wrapping_mul(0xd6e8_feb8_6659_fd93)
}

fn map_stress() -> Outcome {
    let mut held: Vec<(Mapping, u64)> = Vec::new();
    for turn in 0..4000u64 {
        let pages = 1 + (turn * 7919 % 61) as usize;
        let mapping = Mapping::new(pages * PAGE, libc::MAP_PRIVATE)?;
        ensure!(
            (0..pages).all(|page| mapping.read(page) == 0),
            "turn {turn}: a new page is not zero"
        );
        mapping.fill(turn);
        held.push((mapping, turn));
        if held.len() > 40 {
            let (mapping, seed) = held.swap_remove((turn * 31 % 40) as usize);
            mapping
                .verify(seed)
                .map_err(|why| format!("turn {turn}: {why}"))?;
        }
    }
    held.iter()
        .try_for_each(|(mapping, seed)| mapping.verify(*seed))
}

fn remap() -> Outcome {
    let mut mapping = Mapping::new(8 * PAGE, libc::MAP_PRIVATE)?;
    for turn in 1..=300u64 {
        mapping.fill(turn);
        let bytes = if turn % 2 == 0 { 8 * PAGE } else { 64 * PAGE };
        // SAFETY: moves this mapping; the value takes its new place at once.
        let at = unsafe {
            libc::mremap(
                mapping.at.cast(),
                mapping.bytes,
                bytes,
                libc::MREMAP_MAYMOVE,
            )
        };
        ensure!(
            at != libc::MAP_FAILED,
            "mremap: errno {}",
            crate::check::errno()
        );
        mapping.at = at.cast();
        let kept = mapping.bytes.min(bytes) / PAGE;
        mapping.bytes = bytes;
        for page in 0..kept {
            ensure!(
                mapping.read(page) == pattern(turn, page),
                "turn {turn}: page {page} changed when moved"
            );
        }
        // In the way of growing in place, now and then.
        drop(Mapping::new(16 * PAGE, libc::MAP_PRIVATE)?);
    }
    Ok(())
}

fn protect_flips() -> Outcome {
    const PAGES: usize = 64;
    let mapping = Mapping::new(PAGES * PAGE, libc::MAP_PRIVATE)?;
    mapping.fill(0);
    for turn in 0..1500u64 {
        let from = (turn as usize * 13) % 48;
        mapping.protect(from, 16, libc::PROT_READ)?;
        for page in 0..PAGES {
            let found = mapping.read(page);
            ensure!(
                found == pattern(turn, page),
                "turn {turn}: page {page} holds {found:#x}"
            );
        }
        mapping.protect(from, 16, libc::PROT_NONE)?;
        mapping.protect(from, 16, READ_WRITE)?;
        mapping.fill(turn + 1);
    }
    Ok(())
}

fn dontneed() -> Outcome {
    const PAGES: usize = 256;
    let mapping = Mapping::new(PAGES * PAGE, libc::MAP_PRIVATE)?;
    for turn in 0..100u64 {
        mapping.fill(turn);
        let from = (turn as usize * 17) % 128;
        // SAFETY: drops pages of this mapping, which then read as zero.
        sys("madvise", unsafe {
            libc::madvise(mapping.word(from).cast(), 128 * PAGE, libc::MADV_DONTNEED)
        })?;
        for page in 0..PAGES {
            let dropped = (from..from + 128).contains(&page);
            let wanted = if dropped { 0 } else { pattern(turn, page) };
            ensure!(
                mapping.read(page) == wanted,
                "turn {turn}: page {page} holds {:#x}",
                mapping.read(page)
            );
        }
    }
    Ok(())
}

fn shared() -> Outcome {
    const PAGES: usize = 64;
    let mapping = Mapping::new(PAGES * PAGE, libc::MAP_SHARED)?;
    for turn in 0..100u64 {
        mapping.fill(turn);
        let child = fork(|| {
            let seen = mapping.verify(turn);
            mapping.fill(turn + 1000);
            status_of(seen)
        })?;
        ensure!(
            wait(child)? == Ended::Exited(0),
            "turn {turn}: the child saw other contents"
        );
        mapping.verify(turn + 1000)?;
    }
    Ok(())
}

fn copy_on_write() -> Outcome {
    const PAGES: usize = 128;
    let mapping = Mapping::new(PAGES * PAGE, libc::MAP_PRIVATE)?;
    for round in 0..40u64 {
        mapping.fill(round);
        let mut children = Vec::new();
        for number in 1..=8u64 {
            children.push(fork(|| {
                let done = mapping.verify(round).and_then(|()| {
                    mapping.fill(round * 100 + number);
                    // A grandchild takes a copy of the copy.
                    let child = fork(|| {
                        let seen = mapping.verify(round * 100 + number);
                        mapping.fill(7);
                        status_of(seen)
                    })?;
                    ensure!(wait(child)? == Ended::Exited(0), "grandchild failed");
                    mapping.verify(round * 100 + number)
                });
                status_of(done)
            })?);
            // The parent writes while its children read.
            mapping.write(number as usize, pattern(round, number as usize));
        }
        for child in children {
            let ended = wait(child)?;
            ensure!(ended == Ended::Exited(0), "round {round}: {ended:?}");
        }
        mapping
            .verify(round)
            .map_err(|why| format!("round {round}, parent: {why}"))?;
    }
    Ok(())
}

/// Most that [`large_touch`] takes: on a large host a quarter would only cost time.
const MOST_TOUCHED: usize = 1 << 30;

fn large_touch() -> Outcome {
    let info = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| format!("/proc/meminfo: {error}"))?;
    let available: usize = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .ok_or("no MemAvailable in /proc/meminfo")?;
    let bytes = (available / 4 * 1024).min(MOST_TOUCHED) / PAGE * PAGE;
    let mapping = Mapping::new(bytes, libc::MAP_PRIVATE)?;
    mapping.fill(1);
    mapping.verify(1)?;
    mapping.fill(2);
    mapping.verify(2)
}
