//! Commands: from the frame that opens a stream to the one that ends it.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal as Unix;
use thaw_wire::frame::{Frame, Kind};
use thaw_wire::message::{Execute, Exit, Language, Open, Signal};

use super::slots::{self, Slot};
use super::{Engine, MAX_STREAMS, Stream, StreamState};
use crate::command::{Act, Command, Ending};
use crate::interpreter::{self, Done, Heard, OUTPUTS, Part};
use crate::limits;
use crate::link::{Link, LinkError};

/// Longest source text. The front end's own limit is lower; this one protects the guest.
const MAX_SOURCE: u64 = 32 << 20;

/// How long killed interpreters may take to be gone.
const ROOM_WITHIN: Duration = Duration::from_secs(2);

/// Exit codes that the agent itself gives, as shells do.
const CANNOT_RUN: i32 = 126;
const NOT_FOUND: i32 = 127;

impl<L: Link> Engine<L> {
    pub(super) fn on_open(&mut self, id: u32, payload: &[u8]) -> Result<(), LinkError> {
        let is_open = self.streams.contains_key(&id) || self.processes.contains_key(&id);
        if is_open || self.streams.len() >= MAX_STREAMS {
            return self.refuse(id, CANNOT_RUN, "the stream cannot be opened".into());
        }
        let mut execute = match serde_json::from_slice(payload) {
            Ok(Open::Execute(execute)) => execute,
            Ok(Open::Process(order)) => return self.on_process(id, &order),
            Ok(Open::Attach(order)) => return self.on_attach(id, &order),
            Err(error) => {
                return self.refuse(
                    id,
                    CANNOT_RUN,
                    format!("the command makes no sense: {error}"),
                );
            }
        };
        if execute.code_len > MAX_SOURCE {
            return self.refuse(
                id,
                CANNOT_RUN,
                format!("the source is longer than {MAX_SOURCE} bytes"),
            );
        }
        if let Some(code) = execute.code.take() {
            return self.begin(id, &execute, code.as_bytes());
        }
        if execute.code_len == 0 {
            return self.begin(id, &execute, &[]);
        }
        let state = StreamState::Collecting {
            execute: Box::new(execute),
            source: Vec::new(),
        };
        self.streams.insert(id, Stream::new(state));
        Ok(())
    }

    pub(super) fn on_stdin(&mut self, id: u32, payload: Vec<u8>) -> Result<(), LinkError> {
        let taken = payload.len() as u32;
        let Some(Stream {
            state: StreamState::Collecting { execute, source },
            ..
        }) = self.streams.get_mut(&id)
        else {
            // Commands read nothing: their standard input is empty.
            return Ok(());
        };
        source.extend(payload);
        let is_whole = source.len() as u64 >= execute.code_len;
        if taken > 0 {
            self.emit(Frame::credit(id, taken))?;
        }
        if is_whole
            && let Some(Stream {
                state: StreamState::Collecting { execute, source },
                ..
            }) = self.streams.remove(&id)
        {
            return self.begin(id, &execute, &source);
        }
        Ok(())
    }

    pub(super) fn on_signal(&mut self, id: u32, payload: &[u8]) {
        let Ok(signal) = serde_json::from_slice::<Signal>(payload) else {
            return;
        };
        let slot = self.slots.iter_mut().find(|slot| {
            let command = slot.command.as_ref();
            command.is_some_and(|command| command.stream == Some(id) && command.ending.is_none())
        });
        if let Some(Slot {
            interpreter: Some(interpreter),
            command: Some(command),
            ..
        }) = slot
        {
            match signal {
                Signal::Interrupt => {
                    command.interrupted(Instant::now());
                    interpreter.signal(Unix::SIGINT);
                }
                Signal::Kill => {
                    command.killed(Instant::now());
                    interpreter.signal(Unix::SIGKILL);
                }
                // A command has no terminal.
                Signal::Hangup | Signal::Resize(_) => {}
            }
        }
    }

    pub(super) fn refuse(
        &mut self,
        id: u32,
        exit_code: i32,
        note: String,
    ) -> Result<(), LinkError> {
        let exit = Exit {
            exit_code,
            note: Some(note),
            ..Exit::default()
        };
        self.emit_json(id, Kind::Exit, &exit)
    }

    fn begin(&mut self, id: u32, execute: &Execute, source: &[u8]) -> Result<(), LinkError> {
        let language = execute.language;
        let at = match slots::find(&mut self.slots, language, execute.context.as_deref()) {
            Ok(at) => at,
            Err(why) => return self.refuse(id, CANNOT_RUN, why),
        };
        // Looking for the program costs system calls, so only where none runs yet.
        let is_up = self.slots[at].interpreter.is_some();
        if !is_up && !interpreter::available(language, &self.ground.place) {
            slots::forget_unused(&mut self.slots);
            return self.refuse(id, NOT_FOUND, format!("this image has no {language:?}"));
        }
        if self.slots[at].command.is_some() {
            let note = "another command of this session is still running there";
            return self.refuse(id, CANNOT_RUN, note.into());
        }
        self.make_room()?;
        self.replace_dead(at);
        if let Err(error) = self.ensure(at) {
            slots::forget_unused(&mut self.slots);
            return self.refuse(
                id,
                CANNOT_RUN,
                format!("{language:?} cannot be started: {error}"),
            );
        }
        let cpu_before = if language == Language::Bash {
            self.processor_us(at)
        } else {
            0
        };
        let slot = &mut self.slots[at];
        slot.command = Some(Command::start(id, execute, cpu_before));
        self.streams.insert(id, Stream::new(StreamState::Running));
        let started = match &mut slot.interpreter {
            Some(interpreter) => interpreter.execute(source, execute),
            None => Ok(()),
        };
        if let Err(error) = started {
            // It is dying; its death will be heard of and ends the command.
            crate::console::say(&format!("{language:?} takes no command: {error}"));
            if let Some(interpreter) = &slot.interpreter {
                interpreter.signal(Unix::SIGKILL);
            }
        }
        Ok(())
    }

    /// Ends everything when an earlier command left so many processes behind that this one, and
    /// all after it, would starve.
    fn make_room(&mut self) -> Result<(), LinkError> {
        let Some(limits) = self
            .ground
            .limits
            .as_ref()
            .filter(|limits| limits.is_crowded())
        else {
            return Ok(());
        };
        limits.kill_all();
        let pids = |slots: &[Slot]| -> Vec<_> {
            let alive = slots.iter().filter(|slot| !slot.dead);
            alive
                .filter_map(|slot| Some(slot.interpreter.as_ref()?.pid))
                .collect()
        };
        let killed = pids(&self.slots);
        let give_up = Instant::now() + ROOM_WITHIN;
        while pids(&self.slots).iter().any(|pid| killed.contains(pid)) && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(2));
            self.on_children()?;
        }
        Ok(())
    }

    /// Makes sure that a language's interpreter exists.
    pub(super) fn ensure(&mut self, at: usize) -> std::io::Result<()> {
        let slot = &mut self.slots[at];
        if slot.interpreter.is_none() {
            let place = slot.place(&self.ground.place);
            slot.interpreter = Some(interpreter::start(slot.language, &place, &self.env)?);
            slot.dead = false;
            slot.deaf = false;
            slot.closed = Default::default();
            slot.watched = Default::default();
        }
        Ok(())
    }

    /// Processor time so far of whatever a language's commands run.
    fn processor_us(&self, at: usize) -> u64 {
        let group = self
            .ground
            .limits
            .as_ref()
            .and_then(limits::Limits::processor_us);
        let interpreter = self.slots[at].interpreter.as_ref();
        group
            .or_else(|| interpreter.map(|it| limits::process_us(it.pid)))
            .unwrap_or(0)
    }

    pub(super) fn on_interpreter(&mut self, at: usize, part: Part) -> Result<(), LinkError> {
        match part {
            Part::Stdout => return self.on_output(at, 0),
            Part::Stderr => return self.on_output(at, 1),
            Part::Commands | Part::Attend => {}
        }
        let slot = &mut self.slots[at];
        let Some(interpreter) = slot.interpreter.as_mut().filter(|_| !slot.dead) else {
            return Ok(());
        };
        match interpreter.hear(part) {
            Ok(Some(heard)) => {
                for said in heard {
                    self.on_heard(at, said)?;
                }
                Ok(())
            }
            // Closed or nonsense, yet alive: user code has broken it. Its end follows.
            Ok(None) | Err(_) => {
                interpreter.signal(Unix::SIGKILL);
                slot.deaf = true;
                Ok(())
            }
        }
    }

    fn on_heard(&mut self, at: usize, heard: Heard) -> Result<(), LinkError> {
        match heard {
            Heard::Done(done) => {
                self.on_done(at, done);
                Ok(())
            }
            Heard::Ready => {
                if let Some(interpreter) = &mut self.slots[at].interpreter {
                    interpreter.ready = true;
                }
                self.on_answer(at, Heard::Ready)
            }
            answer => self.on_answer(at, answer),
        }
    }

    fn on_done(&mut self, at: usize, done: Done) {
        let remaining = self.waiting(at);
        let cpu_after = match done.cpu_us {
            None => self.processor_us(at),
            Some(_) => 0,
        };
        let slot = &mut self.slots[at];
        let Some(command) = &mut slot.command else {
            return;
        };
        if command.ending.is_some() {
            return;
        }
        let counted = cpu_after.saturating_sub(command.cpu_before);
        let mut exit = command.exit(done.exit_code, done.cpu_us.unwrap_or(counted));
        if std::mem::take(&mut slot.lost) {
            exit.state_lost = true;
        }
        let sigkill = 128 + Unix::SIGKILL as i32;
        if exit.exit_code == sigkill || exit.exit_code == -(Unix::SIGKILL as i32) {
            exit.note = memory_note(self.ground.limits.as_ref(), &mut self.memory_kills);
        }
        command.ending = Some(Ending {
            exit,
            remaining,
            tails: done.tails,
            rich: done.rich.into(),
        });
    }

    /// An interpreter's process ended.
    pub(super) fn on_death(&mut self, at: usize, code: i32) -> Result<(), LinkError> {
        // What it said last may still be unheard.
        for part in [Part::Commands, Part::Attend] {
            let slot = &mut self.slots[at];
            if let Some(Ok(Some(heard))) = slot
                .interpreter
                .as_mut()
                .map(|interpreter| interpreter.hear(part))
            {
                for said in heard {
                    self.on_heard(at, said)?;
                }
            }
        }
        let remaining = self.waiting(at);
        let slot = &self.slots[at];
        let kept_state = slot.language == Language::Bash
            && slot
                .place(&self.ground.place)
                .scratch
                .join("state")
                .is_file();
        let slot = &mut self.slots[at];
        slot.dead = true;
        match &mut slot.command {
            Some(command) if command.ending.is_none() => {
                let mut exit = command.exit(code, 0);
                exit.state_lost = !kept_state;
                exit.note = memory_note(self.ground.limits.as_ref(), &mut self.memory_kills);
                if exit.note.is_none() && !kept_state && !command.was_killed() {
                    exit.note = Some(
                        "the interpreter ended with the command; a fresh one takes its place"
                            .into(),
                    );
                }
                command.ending = Some(Ending {
                    exit,
                    remaining,
                    tails: Default::default(),
                    rich: Default::default(),
                });
            }
            Some(_) => slot.lost |= !kept_state,
            None => slot.lost |= !kept_state,
        }
        self.on_lost(at)
    }

    /// Replaces an interpreter that died, once its last command is told of.
    pub(super) fn replace_dead(&mut self, at: usize) {
        let slot = &mut self.slots[at];
        if !slot.dead || slot.command.is_some() {
            return;
        }
        let died = slot.interpreter.take();
        slot.dead = false;
        // One that cannot even start is tried again only when it is wanted.
        let was_ready = died.is_some_and(|interpreter| interpreter.ready);
        if was_ready && let Err(error) = self.ensure(at) {
            let name = self.slots[at].name();
            crate::console::say(&format!("{name} cannot be started: {error}"));
        }
    }

    pub(super) fn on_time(&mut self) -> Result<(), LinkError> {
        let now = Instant::now();
        for at in 0..self.slots.len() {
            let Slot {
                interpreter: Some(interpreter),
                command: Some(command),
                dead: false,
                ..
            } = &mut self.slots[at]
            else {
                continue;
            };
            let Some(act) = command.due(now) else {
                continue;
            };
            let done = match act {
                Act::Tick => interpreter.tick(),
                Act::AskAgain => interpreter.ask_again(),
                Act::Interrupt => {
                    interpreter.signal(Unix::SIGINT);
                    Ok(())
                }
                Act::KillFollowers => {
                    limits::kill_followers(interpreter.pid);
                    interpreter.signal(Unix::SIGINT);
                    Ok(())
                }
                Act::Kill | Act::KillAll => {
                    interpreter.signal(Unix::SIGKILL);
                    Ok(())
                }
            };
            let limits = self.ground.limits.as_ref();
            let is_needed = |limits: &&limits::Limits| {
                act == Act::KillAll || act != Act::Tick && limits.is_crowded()
            };
            if let Some(limits) = limits.filter(is_needed) {
                // Signals cannot keep up with what forks without end.
                limits.kill_all();
            }
            if let Err(error) = done {
                crate::console::say(&format!("an interpreter does not listen: {error}"));
            }
        }
        self.orders_on_time(now)
    }
}

/// What to tell a user whose command met the kernel's out-of-memory killer since the last such note.
fn memory_note(limits: Option<&limits::Limits>, known: &mut u64) -> Option<String> {
    let kills = limits?.memory_kills();
    let is_news = kills > std::mem::replace(known, kills);
    is_news.then(|| "out of memory: the kernel ended a process of this command".into())
}

const _: () = assert!(OUTPUTS == 2);
