//! Orders about the VM itself.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use thaw_wire::message::{Language, Order, Renew, Report};

use super::Engine;
use crate::identity;
use crate::interpreter::{Heard, Talk, index};
use crate::link::{Link, LinkError};

/// How long interpreters may take to renew themselves; the host gives up later.
const RENEW_WITHIN: Duration = Duration::from_secs(3);

/// How long a collection of garbage before a freeze may take.
const FREEZE_WITHIN: Duration = Duration::from_secs(10);

/// How long to wait for a moment in which nothing runs.
const QUIET_WITHIN: Duration = Duration::from_secs(2);

/// An order whose answer waits for interpreters.
#[derive(Debug)]
struct Wait {
    order: &'static str,
    answer: Report,
    /// By slot.
    waiting: Vec<bool>,
    deadline: Option<Instant>,
}

/// The orders under way, one of each kind at most.
#[derive(Debug, Default)]
pub(super) struct Pending {
    warm: Option<Wait>,
    renew: Option<Wait>,
    freeze: Option<Wait>,
}

impl Pending {
    pub(super) fn deadline(&self) -> Option<Instant> {
        let each = [&self.warm, &self.renew, &self.freeze]
            .into_iter()
            .flatten();
        each.filter_map(|wait| wait.deadline).min()
    }

    fn each(&mut self) -> [&mut Option<Wait>; 3] {
        [&mut self.warm, &mut self.renew, &mut self.freeze]
    }
}

impl<L: Link> Engine<L> {
    pub(super) fn on_order(&mut self, payload: &[u8]) -> Result<(), LinkError> {
        match serde_json::from_slice(payload) {
            Ok(Order::Ping { token }) => self.report(&Report::Pong { token }),
            Ok(Order::Renew(order)) => self.on_renew(&order),
            Ok(Order::Warm { modules }) => self.on_warm(&modules),
            Ok(Order::Quiesce) => self.on_quiesce(),
            Err(error) => self.fail("unknown", format!("the order makes no sense: {error}")),
        }
    }

    fn fail(&mut self, order: &str, reason: String) -> Result<(), LinkError> {
        crate::console::say(&format!("order {order} failed: {reason}"));
        self.report(&Report::Failed {
            order: order.to_owned(),
            reason,
        })
    }

    fn on_renew(&mut self, order: &Renew) -> Result<(), LinkError> {
        let proof = match (self.ground.renew)(order) {
            Ok(proof) => proof,
            Err(error) => return self.fail("renew", error.to_string()),
        };
        self.keep_terminals(&order.terminals);
        self.env.extend(order.env.clone());
        let seed = identity::from_hex::<32>(&order.seed).unwrap_or_default();
        let mut waiting = vec![false; self.slots.len()];
        for (slot, waiting) in self.slots.iter_mut().zip(&mut waiting) {
            let Some(interpreter) = slot.interpreter.as_mut().filter(|_| !slot.dead) else {
                continue;
            };
            match interpreter.renew(&seed, &order.env) {
                Ok(waits) => *waiting = waits,
                Err(error) => {
                    let name = slot.name();
                    return self.fail("renew", format!("{name}: {error}"));
                }
            }
        }
        self.pending.renew = Some(Wait {
            order: "renew",
            answer: Report::Renewed {
                generation: order.generation,
                wall_ns: proof.wall_ns,
                sample: proof.sample,
            },
            waiting,
            deadline: Some(Instant::now() + RENEW_WITHIN),
        });
        self.answer()
    }

    fn on_warm(&mut self, modules: &[String]) -> Result<(), LinkError> {
        let mut waiting = vec![false; self.slots.len()];
        for language in [Language::Python, Language::Bash] {
            let is_there = crate::interpreter::available(language, &self.ground.place);
            if is_there && let Err(error) = self.ensure(index(language)) {
                return self.fail("warm", format!("{language:?} cannot be started: {error}"));
            }
        }
        for (slot, waiting) in self.slots.iter_mut().zip(&mut waiting) {
            // A context that runs a command is let be: its imports are its own affair.
            let is_busy = slot.context.is_some() && slot.command.is_some();
            if slot.language == Language::Javascript || slot.dead || is_busy {
                continue;
            }
            let Some(interpreter) = &mut slot.interpreter else {
                continue;
            };
            match interpreter.warm(modules) {
                Ok(waits) => *waiting = waits || !interpreter.ready,
                Err(error) => {
                    let name = slot.name();
                    return self.fail("warm", format!("{name}: {error}"));
                }
            }
        }
        let missing = if waiting[0] {
            BTreeMap::new()
        } else {
            let missing = modules.iter();
            missing
                .map(|name| (name.clone(), "the image has no Python".to_owned()))
                .collect()
        };
        self.pending.warm = Some(Wait {
            order: "warm",
            answer: Report::Warmed { missing },
            waiting,
            deadline: None,
        });
        self.answer()
    }

    fn on_quiesce(&mut self) -> Result<(), LinkError> {
        let mut waiting = vec![false; self.slots.len()];
        for (slot, waiting) in self.slots.iter_mut().zip(&mut waiting) {
            // One that runs a command could not answer; it is frozen as it is.
            if slot.dead || slot.command.is_some() {
                continue;
            }
            if let Some(interpreter) = &mut slot.interpreter {
                match interpreter.freeze() {
                    Ok(waits) => *waiting = waits,
                    Err(error) => {
                        let name = slot.name();
                        return self.fail("quiesce", format!("{name}: {error}"));
                    }
                }
            }
        }
        self.pending.freeze = Some(Wait {
            order: "quiesce",
            answer: Report::Quiet,
            waiting,
            deadline: Some(Instant::now() + FREEZE_WITHIN),
        });
        self.answer()
    }

    /// An interpreter answered an order.
    pub(super) fn on_answer(&mut self, at: usize, heard: Heard) -> Result<(), LinkError> {
        let slot = &self.slots[at];
        let is_shell = slot
            .interpreter
            .as_ref()
            .is_some_and(|it| matches!(it.talk, Talk::Shell(_)));
        let wait = match &heard {
            Heard::Ready if is_shell => &mut self.pending.warm,
            Heard::Warmed(_) => &mut self.pending.warm,
            Heard::Frozen => &mut self.pending.freeze,
            Heard::Renewed | Heard::Failed(_) => &mut self.pending.renew,
            _ => return Ok(()),
        };
        let Some(waited) = wait
            .as_mut()
            .filter(|wait| wait.waiting.get(at) == Some(&true))
        else {
            return Ok(());
        };
        match heard {
            Heard::Failed(reason) => {
                *wait = None;
                let name = self.slots[at].name();
                return self.fail("renew", format!("{name}: {reason}"));
            }
            Heard::Warmed(lacking) => {
                if let Report::Warmed { missing } = &mut waited.answer {
                    missing.extend(lacking);
                }
            }
            _ => {}
        }
        waited.waiting[at] = false;
        self.answer()
    }

    /// An interpreter died; whoever waits for it waits in vain.
    pub(super) fn on_lost(&mut self, at: usize) -> Result<(), LinkError> {
        let mut failed = Vec::new();
        for wait in self.pending.each() {
            if let Some(wait) = wait.take_if(|wait| wait.waiting.get(at) == Some(&true)) {
                failed.push(wait.order);
            }
        }
        for order in failed {
            let name = self.slots[at].name();
            self.fail(order, format!("{name} ended"))?;
        }
        Ok(())
    }

    pub(super) fn orders_on_time(&mut self, now: Instant) -> Result<(), LinkError> {
        let mut failed = Vec::new();
        for wait in self.pending.each() {
            if let Some(wait) =
                wait.take_if(|wait| wait.deadline.is_some_and(|deadline| deadline <= now))
            {
                failed.push(wait.order);
            }
        }
        for order in failed {
            self.fail(order, "an interpreter did not answer in time".into())?;
        }
        Ok(())
    }

    /// Reports every order that waits for nothing any more.
    fn answer(&mut self) -> Result<(), LinkError> {
        let mut done = Vec::new();
        for wait in self.pending.each() {
            if let Some(wait) = wait.take_if(|wait| !wait.waiting.contains(&true)) {
                done.push(wait.answer);
            }
        }
        for report in done {
            if report == Report::Quiet {
                nix::unistd::sync();
                wait_until_idle();
            }
            self.report(&report)?;
        }
        Ok(())
    }
}

/// Waits until no other thread of the guest wants to run.
fn wait_until_idle() {
    let give_up = Instant::now() + QUIET_WITHIN;
    while Instant::now() < give_up {
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        // "0.00 0.00 0.00 1/45 123": runnable (this thread among them) / all.
        let runnable = load
            .split(' ')
            .nth(3)
            .and_then(|word| word.split('/').next());
        if runnable == Some("1") {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
