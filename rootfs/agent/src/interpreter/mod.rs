//! The session's interpreters: a process for each language, and for each context that is asked
//! for, kept from command to command.

pub mod bash;
pub mod channel;
mod start;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};
use thaw_wire::message::{Execute, Language};

pub use start::{LOWEST_MOVED, Place, available, start};

use bash::Shell;
use channel::Channel;

/// A command's standard output and error, in this order, wherever both are kept. Its rich results
/// are no output: they come whole, with its end.
pub const OUTPUTS: usize = 2;

/// How the agent talks to an interpreter.
#[derive(Debug)]
pub enum Talk {
    /// Messages to a helper in the interpreter.
    Helper {
        /// Commands and their ends.
        commands: Channel,
        /// Ticks and renewals, answered even while a command runs.
        attend: Channel,
    },
    /// Lines to a shell.
    Shell(Shell),
}

/// What an interpreter said.
#[derive(Debug)]
pub enum Heard {
    /// It takes commands.
    Ready,
    /// The command is over.
    Done(Done),
    /// Modules are imported, but for these.
    Warmed(BTreeMap<String, String>),
    /// What is alive will not be touched by collections.
    Frozen,
    /// Random generators and environment are new.
    Renewed,
    /// An order failed.
    Failed(String),
}

/// The end of a command.
#[derive(Debug, Default)]
pub struct Done {
    /// Its status.
    pub exit_code: i32,
    /// Processor time in microseconds, where the interpreter counts it.
    pub cpu_us: Option<u64>,
    /// Output that did not go through the pipes.
    pub tails: [Vec<u8>; OUTPUTS],
    /// Rich results: JSON, or nothing.
    pub rich: Vec<u8>,
}

/// A running interpreter.
#[derive(Debug)]
pub struct Interpreter {
    /// Leader of its own process group.
    pub pid: Pid,
    /// Read ends, non-blocking.
    pub pipes: [OwnedFd; OUTPUTS],
    /// How to talk to it.
    pub talk: Talk,
    /// Whether it said [`Heard::Ready`].
    pub ready: bool,
}

/// A source of events of one interpreter, in the order of the engine's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// Commands' ends.
    Commands,
    /// Answers out of turn.
    Attend,
}

impl Part {
    /// Every part.
    pub const ALL: [Self; 4] = [Self::Stdout, Self::Stderr, Self::Commands, Self::Attend];
}

impl Interpreter {
    /// What to poll for a part, if this interpreter has it.
    pub fn fd(&self, part: Part) -> Option<BorrowedFd<'_>> {
        match (part, &self.talk) {
            (Part::Stdout, _) => Some(self.pipes[0].as_fd()),
            (Part::Stderr, _) => Some(self.pipes[1].as_fd()),
            (Part::Commands, Talk::Helper { commands, .. }) => Some(commands.fd()),
            (Part::Commands, Talk::Shell(shell)) => Some(shell.fd()),
            (Part::Attend, Talk::Helper { attend, .. }) => Some(attend.fd()),
            (Part::Attend, Talk::Shell(_)) => None,
        }
    }

    /// Starts a command.
    ///
    /// # Errors
    /// The interpreter is gone.
    pub fn execute(&mut self, source: &[u8], order: &Execute) -> io::Result<()> {
        match &mut self.talk {
            Talk::Helper { commands, .. } => {
                let mut body = json!({"op": "execute"});
                if !order.env.is_empty() {
                    body["env"] = json!(order.env);
                }
                if order.live {
                    body["live"] = true.into();
                }
                commands.send(&body, source)
            }
            Talk::Shell(shell) => shell.execute(source, &order.env),
        }
    }

    /// Asks for the import of modules. False: there is nothing to wait for.
    ///
    /// # Errors
    /// The interpreter is gone.
    pub fn warm(&mut self, modules: &[String]) -> io::Result<bool> {
        match &mut self.talk {
            Talk::Helper { commands, .. } => {
                commands.send(&json!({"op": "warm", "modules": modules}), &[])?;
                Ok(true)
            }
            Talk::Shell(_) => Ok(false),
        }
    }

    /// Asks to settle before the VM is frozen. False: there is nothing to wait for.
    ///
    /// # Errors
    /// The interpreter is gone.
    pub fn freeze(&mut self) -> io::Result<bool> {
        match &mut self.talk {
            Talk::Helper { commands, .. } => {
                commands.send(&json!({"op": "freeze"}), &[])?;
                Ok(true)
            }
            Talk::Shell(_) => Ok(false),
        }
    }

    /// Gives new randomness and environment. False: done without an answer.
    ///
    /// # Errors
    /// The interpreter is gone.
    pub fn renew(&mut self, seed: &[u8], env: &BTreeMap<String, String>) -> io::Result<bool> {
        match &mut self.talk {
            Talk::Helper { attend, .. } => {
                attend.send(&json!({"op": "renew", "env": env}), seed)?;
                Ok(true)
            }
            Talk::Shell(shell) => {
                shell.renew(seed, env);
                Ok(false)
            }
        }
    }

    /// Has what a running command printed so far written out.
    ///
    /// # Errors
    /// The interpreter is gone.
    pub fn tick(&mut self) -> io::Result<()> {
        match &mut self.talk {
            // One that is busy with earlier ticks needs no more of them.
            Talk::Helper { attend, .. } if !attend.is_blocked() => {
                attend.send(&json!({"op": "tick"}), &[])
            }
            _ => Ok(()),
        }
    }

    /// Repeats the request for a status that an interrupt may have swallowed.
    ///
    /// # Errors
    /// The interpreter is gone.
    pub fn ask_again(&mut self) -> io::Result<()> {
        match &mut self.talk {
            Talk::Helper { .. } => Ok(()),
            Talk::Shell(shell) => shell.ask_status(),
        }
    }

    /// Reads what it says on a part; `None` at the end of the stream.
    ///
    /// # Errors
    /// The socket's failure, or nonsense on it.
    pub fn hear(&mut self, part: Part) -> io::Result<Option<Vec<Heard>>> {
        match &mut self.talk {
            Talk::Shell(shell) => shell.hear(),
            Talk::Helper { commands, attend } => {
                let channel = if part == Part::Commands {
                    commands
                } else {
                    attend
                };
                if channel.is_blocked() {
                    channel.write_on()?;
                }
                let open = channel.fill()?;
                let mut heard = Vec::new();
                while let Some((body, blob)) = channel.take()? {
                    heard.extend(understand(&body, blob));
                }
                Ok((open || !heard.is_empty()).then_some(heard))
            }
        }
    }

    /// Whether a part waits to write.
    pub fn is_blocked(&self, part: Part) -> bool {
        match (part, &self.talk) {
            (Part::Commands, Talk::Helper { commands, .. }) => commands.is_blocked(),
            (Part::Attend, Talk::Helper { attend, .. }) => attend.is_blocked(),
            _ => false,
        }
    }

    /// Signals its process group. A group that is gone is no error.
    pub fn signal(&self, signal: Signal) {
        if let Err(error) = killpg(self.pid, signal)
            && error != nix::Error::ESRCH
        {
            crate::console::say(&format!("cannot signal {}: {error}", self.pid));
        }
    }
}

/// A helper's message. What is malformed is dropped: user code may have sent it.
fn understand(body: &Value, mut blob: Vec<u8>) -> Option<Heard> {
    let number = |name: &str| body[name].as_i64().unwrap_or_default();
    let strings = |name: &str| serde_json::from_value(body[name].clone()).unwrap_or_default();
    Some(match body["op"].as_str()? {
        "ready" => Heard::Ready,
        "done" => {
            let out = usize::try_from(number("out")).ok()?;
            let err = usize::try_from(number("err")).ok()?;
            let rich_len = usize::try_from(number("rich")).ok()?;
            let mut stderr = blob.split_off(out.min(blob.len()));
            let mut rich = stderr.split_off(err.min(stderr.len()));
            rich.truncate(rich_len);
            Heard::Done(Done {
                exit_code: number("exit") as i32,
                cpu_us: u64::try_from(number("cpu_us")).ok(),
                tails: [blob, stderr],
                rich,
            })
        }
        "warmed" => Heard::Warmed(strings("missing")),
        "frozen" => Heard::Frozen,
        "renewed" => Heard::Renewed,
        "failed" => Heard::Failed(
            body["reason"]
                .as_str()
                .unwrap_or("no reason given")
                .to_owned(),
        ),
        _ => return None,
    })
}

/// An index for tables by language.
pub fn index(language: Language) -> usize {
    match language {
        Language::Python => 0,
        Language::Bash => 1,
        Language::Javascript => 2,
    }
}

/// The languages in the order of [`index`].
pub const LANGUAGES: [Language; 3] = [Language::Python, Language::Bash, Language::Javascript];
