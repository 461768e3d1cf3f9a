//! From a command's pipes to its stream, never more than the host asked for.

use std::os::fd::AsFd;

use thaw_wire::frame::{Frame, Kind, MAX_PAYLOAD};

use super::Engine;
use crate::interpreter::OUTPUTS;
use crate::link::{Link, LinkError};

/// The kind of frame that each output becomes.
const KINDS: [Kind; OUTPUTS] = [Kind::Stdout, Kind::Stderr];

impl<L: Link> Engine<L> {
    /// Whether a language's pipes should be read as their bytes come.
    ///
    /// Without a command they are: what a background process prints between commands goes
    /// nowhere, but it must not block. At a command's end the pipes are read by count instead.
    pub(super) fn output_may_flow(&self, at: usize) -> bool {
        let slot = &self.slots[at];
        if slot.dead {
            return false;
        }
        let Some(command) = &slot.command else {
            return true;
        };
        match command.stream.and_then(|stream| self.streams.get(&stream)) {
            Some(stream) => command.ending.is_none() && stream.credit > 0 && self.outbox.is_empty(),
            None => command.ending.is_none(),
        }
    }

    /// Reads up to `limit` bytes of an output into the scratch; how many.
    fn read_output(&mut self, at: usize, output: usize, limit: usize) -> usize {
        let slot = &mut self.slots[at];
        let Some(interpreter) = &slot.interpreter else {
            return 0;
        };
        let limit = limit.min(self.scratch.len());
        if limit == 0 {
            return 0;
        }
        match nix::unistd::read(
            interpreter.pipes[output].as_fd(),
            &mut self.scratch[..limit],
        ) {
            Ok(0) => {
                slot.closed[output] = true;
                0
            }
            Ok(count) => count,
            // Nothing there now.
            Err(_) => 0,
        }
    }

    /// An output is readable.
    pub(super) fn on_output(&mut self, at: usize, output: usize) -> Result<(), LinkError> {
        if !self.output_may_flow(at) {
            return Ok(());
        }
        let command = self.slots[at].command.as_ref();
        let stream = command.and_then(|command| command.stream);
        let Some(stream) = stream.filter(|stream| self.streams.contains_key(stream)) else {
            self.read_output(at, output, MAX_PAYLOAD);
            return Ok(());
        };
        self.forward(at, stream, output, MAX_PAYLOAD).map(drop)
    }

    /// Forwards up to `limit` bytes as far as credit goes; how many, 0 when there are none.
    fn forward(
        &mut self,
        at: usize,
        stream: u32,
        output: usize,
        limit: usize,
    ) -> Result<usize, LinkError> {
        let credit = self
            .streams
            .get(&stream)
            .map_or(0, |stream| stream.credit as usize);
        let count = self.read_output(at, output, limit.min(credit));
        if count > 0 {
            let bytes = self.scratch[..count].to_vec();
            self.emit_output(stream, output, bytes)?;
        }
        Ok(count)
    }

    fn emit_output(&mut self, stream: u32, output: usize, bytes: Vec<u8>) -> Result<(), LinkError> {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.credit = stream.credit.saturating_sub(bytes.len() as u32);
        }
        self.emit(Frame::new(stream, KINDS[output], bytes))
    }

    /// Bytes in a language's pipes now: what a command that is over has written.
    pub(super) fn waiting(&self, at: usize) -> [usize; OUTPUTS] {
        let Some(interpreter) = &self.slots[at].interpreter else {
            return [0; OUTPUTS];
        };
        let waiting =
            |output: usize| crate::sys::device::waiting_bytes(interpreter.pipes[output].as_fd());
        [0, 1].map(|output| waiting(output).unwrap_or(0))
    }

    /// Sends what is left of a command that is over, then its last frame.
    pub(super) fn finish_output(&mut self, at: usize) -> Result<(), LinkError> {
        let Some(command) = &mut self.slots[at].command else {
            return Ok(());
        };
        let Some(mut ending) = command.ending.take() else {
            return Ok(());
        };
        let stream = command
            .stream
            .filter(|stream| self.streams.contains_key(stream));
        let Some(stream) = stream else {
            self.slots[at].command = None;
            return Ok(());
        };
        for output in 0..OUTPUTS {
            while ending.remaining[output] > 0 && self.may_send(stream) {
                let count = self.forward(at, stream, output, ending.remaining[output])?;
                ending.remaining[output] = if count == 0 {
                    0
                } else {
                    ending.remaining[output] - count
                };
            }
            while ending.remaining[output] == 0
                && !ending.tails[output].is_empty()
                && self.may_send(stream)
            {
                let credit = self
                    .streams
                    .get(&stream)
                    .map_or(0, |stream| stream.credit as usize);
                let rest = &mut ending.tails[output];
                let count = rest.len().min(credit).min(MAX_PAYLOAD);
                let bytes = rest.drain(..count).collect();
                self.emit_output(stream, output, bytes)?;
            }
        }
        let is_told = ending.remaining == [0; OUTPUTS] && ending.tails.iter().all(Vec::is_empty);
        while is_told && !ending.rich.is_empty() && self.may_send(stream) {
            let Some(open) = self.streams.get_mut(&stream) else {
                break;
            };
            let count = ending.rich.len().min(open.credit as usize).min(MAX_PAYLOAD);
            open.credit -= count as u32;
            let bytes = ending.rich.drain(..count).collect();
            self.emit(Frame::new(stream, Kind::Rich, bytes))?;
        }
        let is_sent = is_told && ending.rich.is_empty();
        if !is_sent {
            if let Some(command) = &mut self.slots[at].command {
                command.ending = Some(ending);
            }
            return Ok(());
        }
        self.slots[at].command = None;
        self.streams.remove(&stream);
        self.emit_json(stream, Kind::Exit, &ending.exit)
    }

    fn may_send(&self, stream: u32) -> bool {
        self.outbox.is_empty()
            && self
                .streams
                .get(&stream)
                .is_some_and(|stream| stream.credit > 0)
    }
}
