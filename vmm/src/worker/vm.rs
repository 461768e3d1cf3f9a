//! The worker's VM: the machine, its wire, and what waits between them and the socket.

use std::collections::VecDeque;
use std::fs::File;
use std::time::{Duration, Instant};

use thaw_wire::frame::{CONTROL, Frame, HEADER, Kind};
use thaw_wire::layout::{PAGE, RING_PAGES};
use thaw_wire::message::{self, Signal};

use super::console::Console;
use super::socket::Socket;
use super::{End, links, log};
use crate::machine::{Exit, Machine};
use crate::protocol::{Cause, Report};
use crate::wire::{Heard, Misuse, Overdue, Wire};

/// Bytes that may wait for room in the guest's ring before the socket is left alone: one ring's worth.
const MAX_QUEUED: usize = RING_PAGES * PAGE;

/// After taking this much from the guest's ring, the guest is told that there is room: it may be waiting.
const ROOM_WORTH_AN_INTERRUPT: usize = RING_PAGES * PAGE / 2;

/// How often a busy guest is stopped to see whether it can be saved now.
const SAVE_RETRY: Duration = Duration::from_millis(1);

/// An order to save that waits for a good moment.
#[derive(Debug)]
pub(super) struct Saving {
    pub(super) state: File,
    pub(super) memory: File,
    /// Where the numbers of pages go, if only those that the VM wrote are wanted.
    pub(super) list: Option<File>,
    pub(super) until: Instant,
}

#[derive(Debug)]
pub(super) struct Vm {
    pub(super) machine: Box<dyn Machine>,
    pub(super) wire: Wire,
    pub(super) saving: Option<Saving>,
    console: Console,
    /// Frames for the guest that its ring has no room for.
    queue: VecDeque<Frame>,
    queued: usize,
    /// Bytes taken from the guest since it was last interrupted.
    taken: usize,
    /// The guest has halted, until this moment if it named one.
    halted: bool,
    wakes: Option<Instant>,
}

impl Vm {
    pub(super) fn new(machine: Box<dyn Machine>, wire: Wire, now: Instant) -> Self {
        Self {
            machine,
            wire,
            saving: None,
            console: Console::new(now),
            queue: VecDeque::new(),
            queued: 0,
            taken: 0,
            halted: false,
            wakes: None,
        }
    }

    /// Whether `serve` may be listened to.
    pub(super) fn takes_more(&self) -> bool {
        self.queued < MAX_QUEUED
    }

    pub(super) fn is_halted(&self) -> bool {
        self.halted
    }

    pub(super) fn is_runnable(&self, now: Instant) -> bool {
        !self.halted || self.wakes.is_some_and(|at| at <= now)
    }

    /// When something is due although the guest is idle.
    pub(super) fn next_event(&self, now: Instant) -> Option<Instant> {
        let wakes = self.wakes.filter(|_| self.halted);
        [wakes, self.next_alarm(now)].into_iter().flatten().min()
    }

    /// When something is due that the guest does not do by itself.
    pub(super) fn next_alarm(&self, now: Instant) -> Option<Instant> {
        let retry = self.saving.as_ref().map(|_| now + SAVE_RETRY);
        [retry, self.wire.next_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    pub(super) fn run(&mut self) -> anyhow::Result<Exit> {
        self.halted = false;
        let exit = self.machine.run();
        self.log_console();
        exit
    }

    pub(super) fn idle(&mut self, deadline: Option<Instant>) {
        self.halted = true;
        self.wakes = deadline;
    }

    pub(super) fn rung(&mut self, word: u32) -> Result<(), End> {
        if self.wire.rung(word)? {
            self.interrupt();
        }
        Ok(())
    }

    pub(super) fn interrupt(&mut self) {
        self.taken = 0;
        self.halted = false;
        self.machine.raise_wire();
    }

    /// Tells the agent something; its answer is expected.
    pub(super) fn order(&mut self, message: &message::Order) -> Result<(), serde_json::Error> {
        let frame = Frame::json(CONTROL, Kind::Order, message)?;
        self.wire.expect_answer();
        self.enqueue(frame);
        Ok(())
    }

    /// Takes a frame of a stream from `serve`.
    pub(super) fn accept(&mut self, frame: Frame) -> Result<(), Misuse> {
        if self.wire.admit(&frame, Instant::now())? {
            self.enqueue(frame);
        }
        Ok(())
    }

    fn enqueue(&mut self, frame: Frame) {
        self.queued += HEADER + frame.payload.len();
        self.queue.push_back(frame);
    }

    /// Moves frames both ways, as far as there is room.
    pub(super) fn pump(&mut self, socket: &mut Socket) -> Result<(), End> {
        let mut said = false;
        while let Some(frame) = self.queue.front() {
            if !self.wire.put(frame)? {
                break;
            }
            self.queued -= HEADER + frame.payload.len();
            self.queue.pop_front();
            said = true;
        }
        while socket.has_room() {
            match self.wire.hear()? {
                None => break,
                Some(Heard::Relay(frame)) => {
                    self.taken += HEADER + frame.payload.len();
                    socket.queue(&frame);
                }
                Some(Heard::Report(message)) => {
                    if let message::Report::Ready(_) = message {
                        log::line("the agent is ready");
                    }
                    links::say(socket, &Report::Agent { message })?;
                }
            }
        }
        if said || self.taken >= ROOM_WORTH_AN_INTERRUPT {
            self.interrupt();
        }
        Ok(())
    }

    /// Ends commands that overran everybody else's patience.
    pub(super) fn enforce_deadlines(&mut self, now: Instant) -> Result<(), End> {
        if self.wire.next_deadline().is_none_or(|at| at > now) {
            return Ok(());
        }
        while let Some(overdue) = self.wire.overdue(now) {
            match overdue {
                Overdue::Kill(stream) => {
                    let frame = Frame::json(stream, Kind::Signal, &Signal::Kill)
                        .map_err(|error| End::Died(Cause::Worker, error.to_string()))?;
                    // Ahead of everything that waits.
                    self.queued += HEADER + frame.payload.len();
                    self.queue.push_front(frame);
                    log::line(&format!(
                        "the command on stream {stream} overran: killing it"
                    ));
                    if !self.wire.is_attached() {
                        continue;
                    }
                    if let Some(frame) = self.queue.front()
                        && self.wire.put(frame)?
                    {
                        self.queued -= HEADER + frame.payload.len();
                        self.queue.pop_front();
                        self.interrupt();
                    }
                }
                Overdue::Unresponsive(stream) => {
                    return Err(End::Died(
                        Cause::Unresponsive,
                        format!("the command on stream {stream} could not be killed"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Logs what the guest's console said.
    pub(super) fn log_console(&mut self) {
        let bytes = self.machine.take_console();
        if bytes.is_empty() {
            return;
        }
        for line in self.console.add(&bytes, Instant::now()) {
            log::line(&format!("console: {line}"));
        }
    }

    pub(super) fn console_tail(&self) -> String {
        self.console.tail()
    }
}
