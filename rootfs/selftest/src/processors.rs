//! Several processors with one address space: what one changes of it the others must see at once.
//!
//! A processor remembers translations. When another takes a page away, write-protects or replaces it, the kernel
//! asks every processor to forget; one that does not goes on writing to a page that is somebody else's by then. With one
//! processor the checks pass trivially.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::check::{Check, Ended, Outcome, fork, handle, patience, sys, wait};
use crate::ensure;

/// This room's checks.
pub const CHECKS: &[Check] = &[
    Check {
        name: "processors-all-work",
        limit: 30,
        run: all_work,
    },
    Check {
        name: "processors-protect",
        limit: 60,
        run: protect,
    },
    Check {
        name: "processors-replace",
        limit: 60,
        run: replace,
    },
    Check {
        name: "processors-fork",
        limit: 60,
        run: fork_while_written,
    },
];

const PAGE: usize = 4096;
const ROUNDS: u64 = 300;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// How long a processor that forgot nothing is given to show it.
const WATCHED: Duration = Duration::from_micros(300);

fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// From now on the calling thread runs on this processor.
fn pin(processor: usize) -> Outcome {
    // SAFETY: all zeroes is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is live and the number below its size.
    unsafe { libc::CPU_SET(processor % processors(), &mut set) };
    // SAFETY: a live set of the size that is given.
    sys("sched_setaffinity", unsafe {
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    })
    .map(drop)
}

/// A page of its own, never unmapped: a thread may be looking at it until the check's process ends.
fn page() -> Result<*mut AtomicU64, String> {
    // SAFETY: a new anonymous mapping touches nothing that exists.
    let at = unsafe {
        libc::mmap(
            null_mut(),
            PAGE,
            READ_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    ensure!(at != libc::MAP_FAILED, "mmap failed");
    Ok(at.cast())
}

/// Every processor does its share at the same time as the others.
fn all_work() -> Outcome {
    let arrived = Arc::new(AtomicUsize::new(0));
    let all = processors();
    let threads: Vec<_> = (0..all)
        .map(|number| {
            let arrived = Arc::clone(&arrived);
            thread::spawn(move || -> Outcome {
                pin(number)?;
                arrived.fetch_add(1, SeqCst);
                let end = Instant::now() + patience(Duration::from_secs(20));
                while arrived.load(SeqCst) < all {
                    ensure!(
                        Instant::now() < end,
                        "processor {number} waits for the others"
                    );
                    std::hint::spin_loop();
                }
                // SAFETY: no arguments, no memory.
                let here = sys("sched_getcpu", unsafe { libc::sched_getcpu() })?;
                ensure!(
                    here == i32::try_from(number).unwrap_or(-1),
                    "{number} runs on {here}"
                );
                Ok(())
            })
        })
        .collect();
    for thread in threads {
        thread
            .join()
            .map_err(|_| "a thread panicked".to_owned())??;
    }
    Ok(())
}

/// Writes to a page from the second processor until it is dropped.
struct Writer {
    stop: Arc<AtomicBool>,
    trouble: Arc<Mutex<Option<String>>>,
}

impl Writer {
    fn start(page: *mut AtomicU64) -> Result<Self, String> {
        let writer = Self {
            stop: Arc::default(),
            trouble: Arc::default(),
        };
        let (stop, trouble, at) = (writer.stop.clone(), writer.trouble.clone(), page as usize);
        thread::spawn(move || {
            if let Err(why) = pin(1) {
                *trouble.lock().unwrap_or_else(|error| error.into_inner()) = Some(why);
            }
            while !stop.load(SeqCst) {
                // SAFETY: the page is never unmapped; while it cannot be written the handler waits.
                unsafe { (*(at as *mut AtomicU64)).fetch_add(1, SeqCst) };
            }
        });
        let began = Instant::now();
        // SAFETY: as above.
        while unsafe { (*page).load(SeqCst) } == 0 {
            ensure!(
                began.elapsed() < patience(Duration::from_secs(20)),
                "the writer never ran"
            );
            thread::yield_now();
        }
        Ok(writer)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        let trouble = self
            .trouble
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        if let Some(why) = trouble.as_ref() {
            eprintln!("the writer could not be moved to the second processor: {why}");
        }
    }
}

/// Watches a page that nobody may change.
fn stays(page: *mut AtomicU64, what: &str) -> Outcome {
    // SAFETY: the page can be read.
    let read = || unsafe { (*page).load(SeqCst) };
    let (before, began) = (read(), Instant::now());
    while began.elapsed() < WATCHED {
        let now = read();
        ensure!(now == before, "{what}: {before} became {now}");
    }
    Ok(())
}

extern "C" fn wait_and_try_again() {
    // SAFETY: no arguments, no memory.
    unsafe { libc::sched_yield() };
}

/// A page that is made read-only on one processor is not written to on another.
fn protect() -> Outcome {
    pin(0)?;
    handle(libc::SIGSEGV, 0, wait_and_try_again as *const () as usize)?;
    let page = page()?;
    let _writer = Writer::start(page)?;
    let set = |protection| {
        // SAFETY: the page is this check's own.
        sys("mprotect", unsafe {
            libc::mprotect(page.cast(), PAGE, protection)
        })
    };
    for _ in 0..ROUNDS {
        set(libc::PROT_READ)?;
        stays(page, "written while it was read-only")?;
        set(READ_WRITE)?;
        thread::yield_now();
    }
    Ok(())
}

/// A page that is replaced on one processor is not read any more on another.
fn replace() -> Outcome {
    pin(0)?;
    let shown = page()?;
    let (newest, stale) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let (newest, stale, stop, at) =
            (newest.clone(), stale.clone(), stop.clone(), shown as usize);
        thread::spawn(move || -> Outcome {
            pin(1)?;
            while !stop.load(SeqCst) {
                let least = newest.load(SeqCst);
                // SAFETY: something is always mapped there.
                if unsafe { (*(at as *mut AtomicU64)).load(SeqCst) } < least {
                    stale.fetch_add(1, SeqCst);
                }
            }
            Ok(())
        })
    };
    for round in 1..=ROUNDS * 5 {
        let next = page()?;
        // SAFETY: a new page of this check's own.
        unsafe { (*next).store(round, SeqCst) };
        // SAFETY: both are pages of this check's own; the reader takes whichever it finds.
        let moved = unsafe {
            libc::mremap(
                next.cast(),
                PAGE,
                PAGE,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                shown,
            )
        };
        ensure!(moved == shown.cast(), "mremap failed");
        newest.store(round, SeqCst);
        if round % 16 == 0 {
            thread::yield_now();
        }
    }
    stop.store(true, SeqCst);
    reader
        .join()
        .map_err(|_| "the reader panicked".to_owned())??;
    let stale = stale.load(SeqCst);
    ensure!(
        stale == 0,
        "a page was read {stale} times after it was replaced"
    );
    Ok(())
}

/// What a process had when it forked is its child's, although another processor goes on writing to it.
fn fork_while_written() -> Outcome {
    pin(0)?;
    let page = page()?;
    let _writer = Writer::start(page)?;
    for _ in 0..ROUNDS / 3 {
        let child = fork(
            || match stays(page, "a child's page was written by its parent") {
                Ok(()) => 0,
                Err(_) => 1,
            },
        )?;
        let end = wait(child)?;
        ensure!(end == Ended::Exited(0), "the child's page changed: {end:?}");
    }
    Ok(())
}
