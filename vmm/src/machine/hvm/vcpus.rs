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

use super::Shared;
use super::devices::Asked;
use crate::kvm::{Stop, Vcpu, kick};
use crate::machine::Exit;

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
        Self {
            go: AtomicBool::new(false),
            pace: Mutex::default(),
            changed: Condvar::new(),
            mail: Mutex::default(),
            has_mail: AtomicBool::new(false),
            main: pthread_self(),
        }
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

    fn post(&self, exit: Exit) {
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

fn signal(thread: Pthread) {
    if let Err(errno) = pthread_kill(thread, Signal::SIGUSR1) {
        tracing::error!(%errno, "a vCPU's thread cannot be signalled");
    }
}

/// The threads.
#[derive(Debug)]
pub(super) struct Others {
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl Others {
    /// Starts a thread for each vCPU; they rest until [`Self::resume`].
    pub(super) fn new(shared: &Arc<Shared>, vcpus: Vec<Vcpu>) -> anyhow::Result<Self> {
        let mut others = Self {
            vcpus: vcpus
                .into_iter()
                .map(|vcpu| Arc::new(Mutex::new(vcpu)))
                .collect(),
            threads: Vec::new(),
            shared: shared.clone(),
        };
        if others.vcpus.is_empty() {
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
        for (index, vcpu) in (1..).zip(&self.vcpus) {
            let (shared, vcpu) = (self.shared.clone(), vcpu.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || live(&shared, &vcpu))?;
            self.threads.push(thread);
        }
        Ok(())
    }

    fn wait_until(&self, come: impl Fn(&Pace) -> bool) {
        let crew = &self.shared.crew;
        let mut pace = lock(&crew.pace);
        while !come(&pace) {
            pace = crew
                .changed
                .wait(pace)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets them run.
    pub(super) fn resume(&self) {
        let crew = &self.shared.crew;
        if self.threads.is_empty() || crew.go.load(Ordering::Acquire) {
            return;
        }
        let _pace = lock(&crew.pace);
        crew.go.store(true, Ordering::Release);
        crew.changed.notify_all();
    }

    /// Brings them to rest.
    pub(super) fn pause(&self) {
        let crew = &self.shared.crew;
        crew.go.store(false, Ordering::Release);
        self.threads
            .iter()
            .for_each(|thread| signal(thread.as_pthread_t()));
        self.wait_until(|pace| pace.running == 0);
    }

    /// The vCPUs, settled; they must be at rest, else this waits for as long as they run.
    pub(super) fn vcpus(&self) -> impl Iterator<Item = MutexGuard<'_, Vcpu>> {
        self.vcpus.iter().map(|vcpu| lock(vcpu))
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        self.pause();
        {
            let mut pace = lock(&self.shared.crew.pace);
            pace.ended = true;
            self.shared.crew.changed.notify_all();
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU's thread panicked");
            }
        }
    }
}

fn live(shared: &Shared, vcpu: &Mutex<Vcpu>) {
    while shared.crew.join_in() {
        let done = {
            let mut vcpu = lock(vcpu);
            let handle = vcpu.interrupt_handle();
            kick::attach(handle);
            let done = run(shared, &mut vcpu);
            kick::detach(handle);
            done
        };
        shared.crew.step_out();
        if done {
            return;
        }
    }
}

/// Runs until the guest must rest; `true` when this vCPU can run no more.
fn run(shared: &Shared, vcpu: &mut Vcpu) -> bool {
    while shared.crew.go.load(Ordering::Acquire) {
        let served = match vcpu.run() {
            Ok(Stop::Interrupted) => continue,
            Ok(stop) => shared.serve(vcpu, stop),
            Err(error) => Err(error.into()),
        };
        let exit = match served {
            Ok(Asked::Doorbell(word)) => {
                shared.crew.post(Exit::Doorbell(word));
                continue;
            }
            Ok(Asked::Reset) => shared.ended(),
            Ok(_) => continue,
            Err(error) => Exit::Crashed(format!("{error:#}")),
        };
        shared.crew.post(exit);
        return true;
    }
    // Here and not where it is saved: a vCPU that changes threads makes KVM wait for all processors.
    match vcpu.settle() {
        Ok(()) => false,
        Err(error) => {
            shared.crew.post(Exit::Crashed(format!("{error:#}")));
            true
        }
    }
}
