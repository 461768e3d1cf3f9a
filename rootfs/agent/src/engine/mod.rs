//! The agent's one loop: frames in, processes run, frames out.

mod execute;
mod orders;
mod output;
mod process;
mod slots;

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use thaw_wire::frame::{CONTROL, Frame, INITIAL_CREDIT, Kind, MAX_PAYLOAD};
use thaw_wire::message::{Execute, Ready, Renew, Report};

use crate::identity::{Proof, RenewError};
use crate::interpreter::{self, LANGUAGES, OUTPUTS, Part, Place};
use crate::limits::Limits;
use crate::link::{Link, LinkError};
use crate::process::Process;
use crate::sys::child;
use orders::Pending;
use slots::Slot;

/// Most streams at once. The host opens one for each interpreter; the rest is room for mistakes.
const MAX_STREAMS: usize = 64;

/// A full ring is looked at again after this long, in case the host's bell got lost.
const RETRY: Duration = Duration::from_millis(5);

/// Epoll tokens; below these are `slot * 4 + part`.
const LINK: u64 = 1000;
const CHILDREN: u64 = 1001;
const _: () = assert!(slots::MOST * Part::ALL.len() <= LINK as usize && slots::MOST < MAX_STREAMS);

/// What the engine stands on.
#[derive(Debug)]
pub struct Ground {
    /// Where interpreters live and run.
    pub place: Place,
    /// The commands' control group, if there is one.
    pub limits: Option<Limits>,
    /// The kernel's part of a renewal.
    pub renew: fn(&Renew) -> Result<Proof, RenewError>,
    /// `uname -r`.
    pub kernel: String,
}

/// One open stream.
#[derive(Debug)]
struct Stream {
    credit: u32,
    state: StreamState,
}

#[derive(Debug)]
enum StreamState {
    /// The command's source is still arriving.
    Collecting {
        execute: Box<Execute>,
        source: Vec<u8>,
    },
    /// The command runs.
    Running,
}

/// The loop's state.
#[derive(Debug)]
pub struct Engine<L> {
    link: L,
    epoll: Epoll,
    children: SignalFd,
    ground: Ground,
    slots: Vec<Slot>,
    streams: BTreeMap<u32, Stream>,
    /// Processes beside the commands, by stream.
    processes: BTreeMap<u32, process::Entry>,
    /// Processes whose host is gone, until they are.
    leaving: Vec<Process>,
    /// Terminals of an earlier generation that may be attached to, by name.
    parked: BTreeMap<String, Process>,
    outbox: VecDeque<Frame>,
    env: BTreeMap<String, String>,
    pending: Pending,
    scratch: Vec<u8>,
    /// Out-of-memory kills that a note has been made of.
    memory_kills: u64,
}

impl<L: Link> Engine<L> {
    /// An engine over a link; no handshake yet.
    ///
    /// # Errors
    /// The system lacks descriptors.
    pub fn new(link: L, ground: Ground) -> io::Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        signals.thread_block()?;
        let children =
            SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(link.fd(), EpollEvent::new(EpollFlags::EPOLLIN, LINK))?;
        epoll.add(
            children.as_fd(),
            EpollEvent::new(EpollFlags::EPOLLIN, CHILDREN),
        )?;
        Ok(Self {
            link,
            epoll,
            children,
            ground,
            slots: slots::defaults(),
            streams: BTreeMap::new(),
            processes: BTreeMap::new(),
            leaving: Vec::new(),
            parked: BTreeMap::new(),
            outbox: VecDeque::new(),
            env: BTreeMap::new(),
            pending: Pending::default(),
            memory_kills: 0,
            // Untouched parts of it cost no memory.
            scratch: vec![0; MAX_PAYLOAD],
        })
    }

    /// Shakes hands and serves for ever.
    ///
    /// # Errors
    /// The wire broke: there is nothing left to serve.
    pub fn run(&mut self) -> Result<Infallible, LinkError> {
        self.link.shake_hands()?;
        let mut greeted = self.greet();
        let mut events = [EpollEvent::empty(); 16];
        loop {
            // A restore can come between any two instructions; wherever it shows, start over.
            match std::mem::replace(&mut greeted, Ok(())).and_then(|()| self.turn(&mut events)) {
                Err(LinkError::NewGeneration) => greeted = self.start_over(),
                other => other?,
            }
        }
    }

    fn start_over(&mut self) -> Result<(), LinkError> {
        self.streams.clear();
        self.abandon_processes();
        self.outbox.clear();
        self.pending = Pending::default();
        for slot in &mut self.slots {
            if let Some(command) = &mut slot.command {
                command.stream = None;
            }
        }
        self.link.shake_hands()?;
        self.greet()
    }

    fn greet(&mut self) -> Result<(), LinkError> {
        let languages = LANGUAGES.into_iter();
        let languages =
            languages.filter(|&language| interpreter::available(language, &self.ground.place));
        let ready = Ready {
            generation: self.link.generation(),
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: self.ground.kernel.clone(),
            languages: languages.collect(),
            warm: self.slots[0]
                .interpreter
                .as_ref()
                .is_some_and(|runner| runner.ready),
        };
        self.report(&Report::Ready(ready))?;
        self.link.flush()
    }

    /// Waits once and does what is to be done.
    fn turn(&mut self, events: &mut [EpollEvent; 16]) -> Result<(), LinkError> {
        let count = match self.epoll.wait(events, self.timeout()) {
            Ok(count) => count,
            Err(nix::Error::EINTR) => 0,
            Err(error) => return Err(LinkError::Io(error.into())),
        };
        for event in &events[..count] {
            match event.data() {
                LINK => self.on_link()?,
                CHILDREN => self.on_children()?,
                token if token >= process::TOKENS => self.on_process_event(token)?,
                token => {
                    let at = (token / 4) as usize;
                    if at < self.slots.len() {
                        self.on_interpreter(at, Part::ALL[(token % 4) as usize])?;
                    }
                }
            }
        }
        self.on_time()?;
        for at in 0..self.slots.len() {
            self.finish_output(at)?;
        }
        self.send_outbox()?;
        self.tend_processes()?;
        self.link.flush()?;
        // What takes time and nobody waits for comes last.
        for at in 0..self.slots.len() {
            self.replace_dead(at);
            self.watch(at)?;
        }
        Ok(())
    }

    fn timeout(&self) -> EpollTimeout {
        let now = Instant::now();
        let commands = self
            .slots
            .iter()
            .filter_map(|slot| slot.command.as_ref()?.next_due());
        let retry = (!self.outbox.is_empty()).then(|| now + RETRY);
        let next = commands
            .chain(self.pending.deadline())
            .chain(self.processes_due())
            .chain(retry)
            .min();
        let Some(next) = next else {
            return EpollTimeout::NONE;
        };
        // Rounded up: waking early would spin until the time has come.
        let wait = next.saturating_duration_since(now) + Duration::from_micros(999);
        EpollTimeout::try_from(wait.as_millis()).unwrap_or(EpollTimeout::MAX)
    }

    fn on_link(&mut self) -> Result<(), LinkError> {
        self.link.acknowledge()?;
        while let Some(frame) = self.link.receive()? {
            self.on_frame(frame)?;
        }
        Ok(())
    }

    fn on_frame(&mut self, frame: Frame) -> Result<(), LinkError> {
        if self.on_process_frame(&frame) {
            return Ok(());
        }
        match frame.kind {
            Kind::Order if frame.stream == CONTROL => self.on_order(&frame.payload),
            Kind::Open => self.on_open(frame.stream, &frame.payload),
            Kind::Stdin => self.on_stdin(frame.stream, frame.payload),
            Kind::Credit => {
                if let (Some(stream), Ok(bytes)) = (
                    self.streams.get_mut(&frame.stream),
                    frame.payload.as_slice().try_into(),
                ) {
                    stream.credit = stream.credit.saturating_add(u32::from_le_bytes(bytes));
                }
                Ok(())
            }
            Kind::Signal => {
                self.on_signal(frame.stream, &frame.payload);
                Ok(())
            }
            // What a later version of the host may say; streams that are gone end up here too.
            _ => Ok(()),
        }
    }

    /// Reaps everything that ended, interpreters and orphans alike.
    fn on_children(&mut self) -> Result<(), LinkError> {
        while self
            .children
            .read_signal()
            .map_err(io::Error::from)?
            .is_some()
        {}
        while let Some(ended) = child::reap() {
            let is_it = |slot: &&Slot| {
                let interpreter = slot.interpreter.as_ref();
                !slot.dead && interpreter.is_some_and(|it| it.pid == ended.pid)
            };
            if let Some(at) = self.slots.iter().position(|slot| is_it(&slot)) {
                self.on_death(at, ended.status)?;
            } else {
                self.on_process_death(ended);
            }
        }
        Ok(())
    }

    /// Keeps epoll's interest in step with what can be read now.
    fn watch(&mut self, at: usize) -> Result<(), LinkError> {
        let open = self.output_may_flow(at);
        let slot = &mut self.slots[at];
        let Some(interpreter) = &slot.interpreter else {
            return Ok(());
        };
        for (number, part) in Part::ALL.into_iter().enumerate() {
            let Some(fd) = interpreter.fd(part) else {
                continue;
            };
            let mut wanted = EpollFlags::empty();
            if number >= OUTPUTS && !slot.dead && !slot.deaf {
                wanted |= EpollFlags::EPOLLIN;
            }
            if number < OUTPUTS && open && !slot.closed[number] {
                wanted |= EpollFlags::EPOLLIN;
            }
            if interpreter.is_blocked(part) && !slot.dead && !slot.deaf {
                wanted |= EpollFlags::EPOLLOUT;
            }
            // A descriptor without interest must leave: its hang-up would be reported for ever.
            let watch = (!wanted.is_empty()).then_some(wanted);
            let before = std::mem::replace(&mut slot.watched[number], watch);
            let mut event = EpollEvent::new(wanted, (at * 4 + number) as u64);
            let change = match (before, watch) {
                (before, watch) if before == watch => Ok(()),
                (None, _) => self.epoll.add(fd, event),
                (_, None) => self.epoll.delete(fd),
                (_, Some(_)) => self.epoll.modify(fd, &mut event),
            };
            change.map_err(io::Error::from)?;
        }
        Ok(())
    }

    fn report(&mut self, report: &Report) -> Result<(), LinkError> {
        self.emit_json(CONTROL, Kind::Report, report)
    }

    fn emit_json<T: serde::Serialize>(
        &mut self,
        stream: u32,
        kind: Kind,
        body: &T,
    ) -> Result<(), LinkError> {
        match Frame::json(stream, kind, body) {
            Ok(frame) => self.emit(frame),
            Err(error) => {
                crate::console::say(&format!("a message was not sent: {error}"));
                Ok(())
            }
        }
    }

    fn emit(&mut self, frame: Frame) -> Result<(), LinkError> {
        if !self.outbox.is_empty() || !self.link.send(&frame)? {
            self.outbox.push_back(frame);
        }
        Ok(())
    }

    fn send_outbox(&mut self) -> Result<(), LinkError> {
        while let Some(frame) = self.outbox.front() {
            if !self.link.send(frame)? {
                break;
            }
            self.outbox.pop_front();
        }
        Ok(())
    }
}

impl Stream {
    fn new(state: StreamState) -> Self {
        Self {
            credit: INITIAL_CREDIT,
            state,
        }
    }
}
