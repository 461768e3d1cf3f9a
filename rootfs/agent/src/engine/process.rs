//! Processes beside the commands: from the frame that opens a stream to the one that ends it.

use std::io;
use std::time::Instant;

use nix::sys::epoll::{EpollEvent, EpollFlags};
use thaw_wire::frame::{Frame, Kind, MAX_PAYLOAD};
use thaw_wire::message::{Attach, Process as Order, Signal};

use super::{Engine, slots};
use crate::interpreter::LOWEST_MOVED;
use crate::link::{Link, LinkError};
use crate::process::{Part, Process, clean};
use crate::sys::child::Ended;

/// Most processes at once; the host allows as many in one VM.
const MOST: usize = 32;

/// Descriptors that children see under fixed numbers must not be in use here when they are moved there:
/// those of all processes and interpreters, each with four at most, and some of the agent's own stay below.
const _: () = assert!(MOST * 3 + slots::MOST * 4 + 20 < LOWEST_MOVED as usize);

/// Epoll tokens of processes: this, plus four times the stream's number, plus the part.
pub(super) const TOKENS: u64 = 1 << 32;

/// Exit codes that the agent itself gives, as shells do.
const CANNOT_RUN: i32 = 126;
const NOT_FOUND: i32 = 127;

/// A process and what epoll was told about its parts.
#[derive(Debug)]
pub(super) struct Entry {
    process: Process,
    /// What it can be attached to by.
    name: Option<String>,
    watched: [Option<EpollFlags>; Part::ALL.len()],
}

fn token(stream: u32, part: usize) -> u64 {
    TOKENS + u64::from(stream) * 4 + part as u64
}

impl<L: Link> Engine<L> {
    pub(super) fn on_process(&mut self, id: u32, order: &Order) -> Result<(), LinkError> {
        if self.processes.len() + self.parked.len() >= MOST {
            let note = format!("{MOST} terminals and file transfers run at once already");
            return self.refuse(id, CANNOT_RUN, note);
        }
        match Process::start(order, &self.ground.place, &self.env) {
            Ok(process) => {
                let name = order.name.clone().filter(|_| order.terminal.is_some());
                let entry = Entry {
                    process,
                    name,
                    watched: Default::default(),
                };
                self.processes.insert(id, entry);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.refuse(id, NOT_FOUND, format!("it cannot be started: {error}"))
            }
            Err(error) => self.refuse(id, CANNOT_RUN, format!("it cannot be started: {error}")),
        }
    }

    /// Goes on with a terminal of an earlier generation.
    pub(super) fn on_attach(&mut self, id: u32, order: &Attach) -> Result<(), LinkError> {
        let Some(mut process) = self.parked.remove(&order.name) else {
            return self.refuse(
                id,
                NOT_FOUND,
                "there is no such terminal any more".to_owned(),
            );
        };
        process.attached();
        let entry = Entry {
            process,
            name: Some(order.name.clone()),
            watched: Default::default(),
        };
        self.processes.insert(id, entry);
        Ok(())
    }

    /// Hangs up the terminals of an earlier generation that nobody will attach to.
    pub(super) fn keep_terminals(&mut self, names: &[String]) {
        for (name, mut process) in std::mem::take(&mut self.parked) {
            if names.contains(&name) {
                self.parked.insert(name, process);
            } else if process.exit_status().is_none() {
                process.abandon();
                self.leaving.push(process);
            }
        }
    }

    /// Input, credit or a signal for a process; false when the stream is none's.
    pub(super) fn on_process_frame(&mut self, frame: &Frame) -> bool {
        let Some(Entry { process, .. }) = self.processes.get_mut(&frame.stream) else {
            return false;
        };
        match frame.kind {
            Kind::Stdin => process.take_input(&frame.payload),
            Kind::Credit => {
                if let Ok(bytes) = frame.payload.as_slice().try_into() {
                    process.credit = process.credit.saturating_add(u32::from_le_bytes(bytes));
                }
            }
            Kind::Signal => match serde_json::from_slice(&frame.payload) {
                Ok(Signal::Interrupt) => process.interrupt(),
                Ok(Signal::Kill) => process.kill(),
                Ok(Signal::Hangup) => process.hang_up(),
                Ok(Signal::Resize(size)) => process.resize(size),
                // What a later version of the host may say.
                Err(_) => {}
            },
            _ => {}
        }
        true
    }

    /// Something of a process is readable or writable.
    pub(super) fn on_process_event(&mut self, token: u64) -> Result<(), LinkError> {
        let number = token - TOKENS;
        let (Ok(stream), part) = (u32::try_from(number / 4), (number % 4) as usize) else {
            return Ok(());
        };
        match Part::ALL.get(part) {
            Some(Part::Stdin) => {
                if let Some(entry) = self.processes.get_mut(&stream) {
                    entry.process.input.write_on();
                }
                Ok(())
            }
            Some(part) => self.forward_process(stream, *part),
            None => Ok(()),
        }
    }

    /// Sends output on as far as credit and the ring go.
    fn forward_process(&mut self, stream: u32, part: Part) -> Result<(), LinkError> {
        loop {
            if !self.outbox.is_empty() {
                return Ok(());
            }
            let Some(Entry { process, .. }) = self.processes.get_mut(&stream) else {
                return Ok(());
            };
            let limit = MAX_PAYLOAD.min(process.credit as usize);
            let count = match limit {
                0 => 0,
                _ => process.read(part, &mut self.scratch[..limit]),
            };
            if count == 0 {
                return Ok(());
            }
            process.credit -= count as u32;
            let kind = match part {
                Part::Stderr => Kind::Stderr,
                Part::Stdout | Part::Stdin => Kind::Stdout,
            };
            let bytes = self.scratch[..count].to_vec();
            self.emit(Frame::new(stream, kind, bytes))?;
        }
    }

    /// A process ended, if it was one of these.
    pub(super) fn on_process_death(&mut self, ended: Ended) {
        let all = self.processes.values_mut().map(|entry| &mut entry.process);
        let mut all = all.chain(&mut self.leaving).chain(self.parked.values_mut());
        let Some(process) = all.find(|process| process.pid == ended.pid) else {
            return;
        };
        process.ended(ended.status, ended.cpu_us);
        if let Some(file) = process.broken_off()
            && let Err(error) = clean(file, &self.ground.place)
        {
            crate::console::say(&format!("a draft may be left: {error}"));
        }
        self.leaving
            .retain(|process| process.exit_status().is_none());
    }

    /// When the processes must be looked at next.
    pub(super) fn processes_due(&self) -> Option<Instant> {
        let all = self.processes.values().map(|entry| &entry.process);
        all.chain(&self.leaving).filter_map(Process::next_due).min()
    }

    /// What is to be done for processes at the end of a turn; nothing costs anything without any.
    pub(super) fn tend_processes(&mut self) -> Result<(), LinkError> {
        if self.processes.is_empty() && self.leaving.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        for process in &mut self.leaving {
            process.on_time(now);
        }
        let streams: Vec<u32> = self.processes.keys().copied().collect();
        for stream in streams {
            let Some(Entry { process, .. }) = self.processes.get_mut(&stream) else {
                continue;
            };
            process.on_time(now);
            process.input.write_on();
            if let Some(grant) = process.input.grant() {
                self.emit(Frame::credit(stream, grant))?;
            }
            for part in [Part::Stdout, Part::Stderr] {
                self.forward_process(stream, part)?;
            }
            self.watch_process(stream)?;
            let exit = self
                .processes
                .get(&stream)
                .and_then(|entry| entry.process.exit());
            if let Some(exit) = exit {
                self.processes.remove(&stream);
                self.emit_json(stream, Kind::Exit, &exit)?;
            }
        }
        Ok(())
    }

    /// The host that knew the processes is no more: terminals with a name wait for the next one, the others are hung up.
    pub(super) fn abandon_processes(&mut self) {
        // Whoever was told to go a generation ago has had its time: so there are never more than MOST.
        for mut process in self.leaving.drain(..) {
            process.kill();
        }
        for mut entry in std::mem::take(&mut self.processes).into_values() {
            if let Some(name) = entry.name.take() {
                self.unwatch(&entry);
                self.parked.insert(name, entry.process);
            } else if entry.process.exit_status().is_none() {
                entry.process.abandon();
                self.leaving.push(entry.process);
            }
        }
    }

    /// Takes a process's descriptors out of epoll, where they are known by a stream that is no more.
    fn unwatch(&mut self, entry: &Entry) {
        for (number, part) in Part::ALL.into_iter().enumerate() {
            let fd = entry.process.fd(part);
            let Some(fd) = fd.filter(|_| entry.watched[number].is_some()) else {
                continue;
            };
            if let Err(error) = self.epoll.delete(fd) {
                crate::console::say(&format!("a terminal stays watched: {error}"));
            }
        }
    }

    fn watch_process(&mut self, stream: u32) -> Result<(), LinkError> {
        // While the ring is full nothing is read, and readable output would wake us for nothing.
        let may_read = self.outbox.is_empty();
        let Some(Entry {
            process, watched, ..
        }) = self.processes.get_mut(&stream)
        else {
            return Ok(());
        };
        for (number, part) in Part::ALL.into_iter().enumerate() {
            let interest = process.interest(part);
            let wanted = interest.and_then(|(_, writes)| match writes {
                true => Some(EpollFlags::EPOLLOUT),
                false => may_read.then_some(EpollFlags::EPOLLIN),
            });
            let before = watched[number];
            // A descriptor that was closed has left epoll by itself.
            let Some(fd) = process.fd(part) else {
                watched[number] = None;
                continue;
            };
            if before == wanted {
                continue;
            }
            let mut event =
                EpollEvent::new(wanted.unwrap_or(EpollFlags::empty()), token(stream, number));
            let change = match (before, wanted) {
                (None, _) => self.epoll.add(fd, event),
                (_, None) => self.epoll.delete(fd),
                (_, Some(_)) => self.epoll.modify(fd, &mut event),
            };
            change.map_err(io::Error::from)?;
            watched[number] = wanted;
        }
        Ok(())
    }
}
