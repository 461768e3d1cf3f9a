//! The vCPUs beyond the first: one thread each, which runs when the first one's machine runs and can be brought to rest.
//!
//! What the guest asks for on such a thread goes to the machine's own as mail; a signal brings that one back from
//! its vCPU. At rest no thread is in the guest or holds its vCPU.

use std::collections::VecDeque;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context;
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};

use super::Exit;
use crate::kvm::{InterruptHandle, kick};

/// Mail that nobody has read. A guest rings with one word over and over, which is one letter; this many different ones
/// are no guest of ours.
const MAX_MAIL: usize = 32;

/// A lock that a panic elsewhere does not take away: what it guards is whole after each statement.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the threads wait for.
#[derive(Debug, Default)]
struct Pace {
    /// Threads that have come as far as waiting for the guest to run. What a thread needs to get there it may not
    /// do later, in the jail.
    arrived: usize,
    /// Threads that are, or may be, in the guest.
    running: usize,
    ended: bool,
}

/// What the machine's thread and those of its vCPUs share beside the VM.
#[derive(Debug)]
pub(super) struct Crew {
    /// The guest may run.
    go: AtomicBool,
    pace: Mutex<Pace>,
    changed: Condvar,
    mail: Mutex<VecDeque<Exit>>,
    has_mail: AtomicBool,
    /// The machine's thread.
    main: Pthread,
}

impl Crew {
    /// Of the calling thread's machine.
    pub(super) fn new() -> Self {
        // Its threads may be signalled before they run anything.
        kick::install();
        Self {
            go: AtomicBool::new(false),
            pace: Mutex::default(),
            changed: Condvar::new(),
            mail: Mutex::default(),
            has_mail: AtomicBool::new(false),
            main: pthread_self(),
        }
    }

    /// Whether the guest may run; if not, every thread comes to rest.
    pub(super) fn goes(&self) -> bool {
        self.go.load(Ordering::Acquire)
    }

    /// Whether the guest asked for something elsewhere that nobody has been told of.
    pub(super) fn has_mail(&self) -> bool {
        self.has_mail.load(Ordering::Acquire)
    }

    /// The next thing that the guest asked for elsewhere.
    pub(super) fn next_mail(&self) -> Option<Exit> {
        if !self.has_mail.swap(false, Ordering::AcqRel) {
            return None;
        }
        let mut mail = lock(&self.mail);
        let next = mail.pop_front();
        self.has_mail.store(!mail.is_empty(), Ordering::Release);
        next
    }

    /// Tells the machine's thread.
    pub(super) fn post(&self, exit: Exit) {
        {
            let mut mail = lock(&self.mail);
            if let (Exit::Doorbell(word), Some(Exit::Doorbell(last))) = (&exit, mail.back())
                && word == last
            {
                return;
            }
            if mail.len() >= MAX_MAIL {
                mail.clear();
                mail.push_back(Exit::Crashed(
                    "the guest rings faster than anybody can answer".to_owned(),
                ));
            } else {
                mail.push_back(exit);
            }
            self.has_mail.store(true, Ordering::Release);
        }
        signal(self.main);
    }

    /// Waits until the guest may run; `false` at the end.
    fn join_in(&self) -> bool {
        let mut pace = lock(&self.pace);
        pace.arrived += 1;
        self.changed.notify_all();
        while !pace.ended && !self.go.load(Ordering::Acquire) {
            pace = self
                .changed
                .wait(pace)
                .unwrap_or_else(PoisonError::into_inner);
        }
        pace.arrived -= 1;
        if !pace.ended {
            pace.running += 1;
        }
        !pace.ended
    }

    fn step_out(&self) {
        lock(&self.pace).running -= 1;
        self.changed.notify_all();
    }
}

/// Brings a thread back from its vCPU, or from waiting for an event of the guest's.
pub(super) fn signal(thread: Pthread) {
    if let Err(errno) = pthread_kill(thread, Signal::SIGUSR1) {
        tracing::error!(%errno, "a vCPU's thread cannot be signalled");
    }
}

/// A vCPU with what its thread needs to run it.
pub(super) trait Member: Send + std::fmt::Debug + 'static {
    /// Called on the thread, once, before the first run and before the process is in its jail.
    ///
    /// # Errors
    /// It cannot run.
    fn arrive(&mut self) -> anyhow::Result<()>;
    /// What brings it back from the guest.
    fn handle(&mut self) -> InterruptHandle;
    /// Runs as long as the crew [goes](Crew::goes). `Some`: it can run no more.
    fn work(&mut self, crew: &Crew) -> Option<Exit>;
    /// Completes what the last exit left half done. On its own thread, and not where the machine is saved: a vCPU that
    /// changes threads makes KVM wait for all processors.
    ///
    /// # Errors
    /// A failure of KVM.
    fn settle(&mut self) -> anyhow::Result<()>;
}

/// The threads.
#[derive(Debug)]
pub(super) struct Others<M: Member> {
    members: Vec<Arc<Mutex<M>>>,
    threads: Vec<JoinHandle<()>>,
    crew: Arc<Crew>,
}

impl<M: Member> Others<M> {
    /// Starts a thread for each; they rest until [`Self::resume`].
    ///
    /// # Errors
    /// A thread cannot be started.
    pub(super) fn new(crew: &Arc<Crew>, members: Vec<M>) -> anyhow::Result<Self> {
        let mut others = Self {
            members: members
                .into_iter()
                .map(|member| Arc::new(Mutex::new(member)))
                .collect(),
            threads: Vec::new(),
            crew: crew.clone(),
        };
        if others.members.is_empty() {
            return Ok(others);
        }
        // Signals to the process are for its main thread. The new ones inherit this mask from their first moment on.
        let mut mask = SigSet::all();
        mask.remove(Signal::SIGUSR1);
        let before = mask.thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let started = others.start();
        before.thread_set_mask()?;
        started.context("starting a vCPU's thread")?;
        others.wait_until(|pace| pace.arrived == others.threads.len());
        Ok(others)
    }

    fn start(&mut self) -> std::io::Result<()> {
        for (index, member) in (1..).zip(&self.members) {
            let (crew, member) = (self.crew.clone(), member.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || live(&crew, &member))?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Whether the machine has no vCPU but its first.
    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    fn wait_until(&self, come: impl Fn(&Pace) -> bool) {
        let mut pace = lock(&self.crew.pace);
        while !come(&pace) {
            pace = self
                .crew
                .changed
                .wait(pace)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets them run.
    pub(super) fn resume(&self) {
        if self.threads.is_empty() || self.crew.goes() {
            return;
        }
        let _pace = lock(&self.crew.pace);
        self.crew.go.store(true, Ordering::Release);
        self.crew.changed.notify_all();
    }

    /// Brings them to rest.
    pub(super) fn pause(&self) {
        self.crew.go.store(false, Ordering::Release);
        self.threads
            .iter()
            .for_each(|thread| signal(thread.as_pthread_t()));
        self.wait_until(|pace| pace.running == 0);
    }

    /// The members, settled; they must be at rest, else this waits for as long as they run.
    pub(super) fn members(&self) -> impl Iterator<Item = MutexGuard<'_, M>> {
        self.members.iter().map(|member| lock(member))
    }
}

impl<M: Member> Drop for Others<M> {
    fn drop(&mut self) {
        self.pause();
        {
            let mut pace = lock(&self.crew.pace);
            pace.ended = true;
            self.crew.changed.notify_all();
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU's thread panicked");
            }
        }
    }
}

fn live<M: Member>(crew: &Crew, member: &Mutex<M>) {
    let mut failed_to_arrive = lock(member).arrive().err().map(failed);
    while crew.join_in() {
        let end = failed_to_arrive
            .take()
            .or_else(|| shift(crew, &mut *lock(member)));
        let ended = end.is_some();
        if let Some(exit) = end {
            crew.post(exit);
        }
        crew.step_out();
        if ended {
            return;
        }
    }
}

/// From when the guest may run to when it must rest.
fn shift<M: Member>(crew: &Crew, member: &mut M) -> Option<Exit> {
    let handle = member.handle();
    kick::attach(handle);
    let end = member
        .work(crew)
        .or_else(|| member.settle().err().map(failed));
    kick::detach(handle);
    end
}

fn failed(error: anyhow::Error) -> Exit {
    Exit::Crashed(format!("{error:#}"))
}
