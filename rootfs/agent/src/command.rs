//! One running command: its deadline, its escalation, its end.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use thaw_wire::message::{Execute, Exit};

use crate::interpreter::OUTPUTS;

/// After an interrupt, how long until whatever the command started is killed.
const FOLLOWERS_AFTER: Duration = Duration::from_millis(1000);

/// A shell whose child was killed rather than interrupted goes on with its next command, and
/// must be interrupted in that once more.
const AGAIN_AFTER: Duration = Duration::from_millis(1100);

/// After an interrupt, how long until the interpreter itself is killed, and state with it.
const KILL_AFTER: Duration = Duration::from_millis(2000);

/// After an interrupt, how long until everything of the session is killed: what a kill of the
/// interpreter has not ended by then is starved or out of memory.
const KILL_ALL_AFTER: Duration = Duration::from_millis(3000);

/// A status that an interrupt may have swallowed is asked for again after this long.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(300);

/// When output that a slow command has buffered is first asked for, and how often at most later.
const FIRST_TICK: Duration = Duration::from_millis(50);
const LAST_TICK: Duration = Duration::from_millis(200);

/// The same for a command that somebody watches: lines come by themselves, these are for what is printed
/// without a line's end.
const LIVE_FIRST_TICK: Duration = Duration::from_millis(10);
const LIVE_LAST_TICK: Duration = Duration::from_millis(50);

/// Longest time that a command can be given: the API's limit is ten minutes, this is for
/// arithmetic that cannot overflow.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// How far the effort to end a command has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Running,
    Interrupted,
    AskedAgain,
    FollowersKilled,
    InterruptedAgain,
    Killed,
    AllKilled,
}

/// What must be done to a command now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Have buffered output written.
    Tick,
    /// SIGINT to the group.
    Interrupt,
    /// Ask for the status again.
    AskAgain,
    /// SIGKILL to all of the group but the interpreter, SIGINT to the interpreter.
    KillFollowers,
    /// SIGKILL to the group.
    Kill,
    /// SIGKILL to all processes of the session.
    KillAll,
}

/// A command between its start and its last frame.
#[derive(Debug)]
pub struct Command {
    /// The stream that wants its output; none after a restore dropped it.
    pub stream: Option<u32>,
    /// Set when it is over and only output remains.
    pub ending: Option<Ending>,
    /// Processor time before it began, where the interpreter does not count it.
    pub cpu_before: u64,
    started: Instant,
    deadline: Instant,
    interrupted_at: Instant,
    next_tick: Instant,
    tick: Duration,
    last_tick: Duration,
    stage: Stage,
    timed_out: bool,
}

/// The end of a command whose output is still on its way.
#[derive(Debug)]
pub struct Ending {
    /// The last frame.
    pub exit: Exit,
    /// Bytes left in the pipes that belong to the command.
    pub remaining: [usize; OUTPUTS],
    /// Bytes that come after those.
    pub tails: [Vec<u8>; OUTPUTS],
    /// Rich results, which come after all output. They may be megabytes and leave from the front.
    pub rich: VecDeque<u8>,
}

impl Command {
    /// A command that starts now.
    pub fn start(stream: u32, order: &Execute, cpu_before: u64) -> Self {
        let now = Instant::now();
        let (first_tick, last_tick) = if order.live {
            (LIVE_FIRST_TICK, LIVE_LAST_TICK)
        } else {
            (FIRST_TICK, LAST_TICK)
        };
        Self {
            stream: Some(stream),
            ending: None,
            cpu_before,
            started: now,
            deadline: now + Duration::from_millis(order.timeout_ms).min(LONGEST),
            interrupted_at: now,
            next_tick: now + first_tick,
            tick: first_tick,
            last_tick,
            stage: Stage::Running,
            timed_out: false,
        }
    }

    /// When [`Self::due`] must be asked next.
    pub fn next_due(&self) -> Option<Instant> {
        if self.ending.is_some() {
            return None;
        }
        match self.stage {
            Stage::Running => Some(self.deadline.min(self.next_tick)),
            Stage::Interrupted => Some(self.interrupted_at + ASK_AGAIN_AFTER),
            Stage::AskedAgain => Some(self.interrupted_at + FOLLOWERS_AFTER),
            Stage::FollowersKilled => Some(self.interrupted_at + AGAIN_AFTER),
            Stage::InterruptedAgain => Some(self.interrupted_at + KILL_AFTER),
            Stage::Killed => Some(self.interrupted_at + KILL_ALL_AFTER),
            Stage::AllKilled => None,
        }
    }

    /// What the passing of time demands.
    pub fn due(&mut self, now: Instant) -> Option<Act> {
        if self.next_due()? > now {
            return None;
        }
        Some(match self.stage {
            Stage::Running if self.deadline <= now => {
                self.timed_out = true;
                self.interrupted(now);
                Act::Interrupt
            }
            Stage::Running => {
                self.tick = (self.tick * 2).min(self.last_tick);
                self.next_tick = now + self.tick;
                Act::Tick
            }
            Stage::Interrupted => {
                self.stage = Stage::AskedAgain;
                Act::AskAgain
            }
            Stage::AskedAgain => {
                self.stage = Stage::FollowersKilled;
                Act::KillFollowers
            }
            Stage::FollowersKilled => {
                self.stage = Stage::InterruptedAgain;
                Act::Interrupt
            }
            Stage::InterruptedAgain => {
                self.stage = Stage::Killed;
                Act::Kill
            }
            Stage::Killed => {
                self.stage = Stage::AllKilled;
                Act::KillAll
            }
            Stage::AllKilled => return None,
        })
    }

    /// Somebody interrupted it; from now on it is made to end.
    pub fn interrupted(&mut self, now: Instant) {
        if self.stage == Stage::Running {
            self.stage = Stage::Interrupted;
            self.interrupted_at = now;
        }
    }

    /// Somebody killed it.
    pub fn killed(&mut self, now: Instant) {
        if self.stage < Stage::Killed {
            self.interrupted(now);
            self.stage = Stage::Killed;
        }
    }

    /// Whether its interpreter was killed on purpose.
    pub fn was_killed(&self) -> bool {
        self.stage >= Stage::Killed
    }

    /// The last frame for a command that ended with this status.
    pub fn exit(&self, exit_code: i32, cpu_us: u64) -> Exit {
        Exit {
            exit_code: if self.timed_out { 124 } else { exit_code },
            timed_out: self.timed_out,
            cpu_us,
            wall_us: u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX),
            state_lost: false,
            note: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(timeout_ms: u64, live: bool) -> Command {
        let order = Execute {
            language: Default::default(),
            code_len: 0,
            code: None,
            timeout_ms,
            env: Default::default(),
            context: None,
            live,
        };
        Command::start(1, &order, 0)
    }

    #[test]
    fn what_is_watched_is_asked_for_its_output_sooner() {
        let due = |command: &Command| command.next_due().map(|due| due - command.started);
        assert_eq!(due(&start(1000, false)), Some(FIRST_TICK));
        let mut live = start(1000, true);
        let mut at = Duration::ZERO;
        for pause in [10, 20, 40, 50, 50] {
            at += Duration::from_millis(pause);
            assert_eq!(due(&live), Some(at));
            assert_eq!(live.due(live.started + at), Some(Act::Tick));
        }
    }

    #[test]
    fn a_command_that_overruns_is_interrupted_then_killed() {
        let mut command = start(100, false);
        let start = command.started;
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(command.due(at(10)), None);
        assert_eq!(command.due(at(50)), Some(Act::Tick));
        assert_eq!(command.due(at(100)), Some(Act::Interrupt));
        assert_eq!(command.due(at(399)), None);
        assert_eq!(command.due(at(400)), Some(Act::AskAgain));
        assert_eq!(command.due(at(1100)), Some(Act::KillFollowers));
        assert_eq!(command.due(at(1200)), Some(Act::Interrupt));
        assert_eq!(command.due(at(2100)), Some(Act::Kill));
        assert_eq!(command.due(at(3100)), Some(Act::KillAll));
        assert_eq!(command.next_due(), None);
        assert_eq!(command.exit(0, 0).exit_code, 124);
    }

    #[test]
    fn the_longest_timeout_does_not_overflow() {
        assert!(start(u64::MAX, false).next_due().is_some());
    }
}
