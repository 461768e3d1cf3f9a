//! One command, from its place in the line to its outcome.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use thaw_wire::message::{Execute, Exit, Signal};
use tokio::sync::watch;
use tokio::time::Instant;

use super::core::{Busy, Core};
use super::line::{Place, Turn};
use super::live::{End, Live};
use super::metrics::{Degradation, Phase};
use super::output::{Collector, append_line};
use super::session::Session;
use super::start::NoVm;
use super::types::{Attached, Command, Outcome, PlanLimits, SessionError};
use super::vm::{Run, RunEvent};
use super::watch::Next;

/// Exit code of a command whose deadline passed, as `timeout(1)` has it.
const TIMED_OUT: i32 = 124;

/// Exit code of a command that ended with its VM: 128 + SIGKILL.
const CUT_SHORT: i32 = 137;

/// Exit code of a command that was cancelled before it started: that of an interrupt.
const CANCELLED_CODE: i32 = 130;

const INTERRUPTED: &str = "thaw: the command timed out and was interrupted";

const CANCELLED: &str = "thaw: the command was cancelled";

const STOPPING: &str = "thaw: the command timed out and is being stopped";

const STATE_LOST: &str = "thaw: the interpreter died and was replaced: its variables are lost";

/// A command's place in its session's line. Dropping it gives the place up.
#[derive(Debug)]
pub struct Accepted {
    pub(crate) session: Arc<Session>,
    pub(crate) place: Place,
    pub(crate) at: Instant,
    pub(crate) kills: u64,
}

impl Accepted {
    /// Waits until every command before this one has ended. The command starts with
    /// [`super::Sessions::run`] only.
    pub async fn ready(&mut self) {
        self.place.ready().await;
    }
}

impl Core {
    pub(crate) async fn run(
        self: &Arc<Self>,
        accepted: Accepted,
        limits: PlanLimits,
        command: Command,
        attached: Attached,
    ) -> Result<Outcome, SessionError> {
        let Accepted {
            session,
            place,
            at,
            kills,
        } = accepted;
        let answer_by = command.answer_within.map(|within| at + within);
        let mut cancel = attached.cancel.clone();
        let turn = match wait(answer_by, &mut cancel, place.turn()).await {
            Ok(turn) => turn,
            Err(Late::Cancelled) => return Ok(not_run(at, CANCELLED_CODE, CANCELLED)),
            Err(Late::TimedOut) => {
                self.metrics.degraded(Degradation::TimedOut);
                let note = "thaw: the command timed out before it started: other commands of this session ran";
                return Ok(not_run(at, TIMED_OUT, note));
            }
        };
        self.metrics.phase(Phase::Queue, at.elapsed());
        if self.is_draining() {
            return Err(SessionError::ShuttingDown);
        }
        if session.killed_since(kills) {
            let note = "thaw: the session's VM was killed before the command started";
            return Ok(not_run(at, CUT_SHORT, note));
        }
        session.touch();
        let busy = self.busy();
        let vm = self.vm_of(&session, limits, kills);
        let (live, restarted) = match wait(answer_by, &mut cancel, vm).await {
            Ok(Ok(vm)) => vm,
            Ok(Err(NoVm::Error(error))) => return Err(error),
            Ok(Err(NoVm::Killed)) => {
                let note = "thaw: the session's VM was killed before the command started";
                return Ok(not_run(at, CUT_SHORT, note));
            }
            Err(Late::Cancelled) => return Ok(not_run(at, CANCELLED_CODE, CANCELLED)),
            Err(Late::TimedOut) => {
                self.metrics.degraded(Degradation::TimedOut);
                let note = "thaw: the command timed out before it started: no VM was ready yet";
                return Ok(not_run(at, TIMED_OUT, note));
            }
        };
        let next = Next {
            session: &session.id,
            vm_id: &live.vm_id,
            vm: &live.vm,
            command: &command,
        };
        let step = match self.watch.before(next) {
            Some(before) => before.await,
            None => None,
        };
        // In this order: after a crash, what is not noted as running must be known not to have run.
        if let Some(witness) = &attached.witness {
            witness.starts().await.map_err(SessionError::Unavailable)?;
        }
        let began = Instant::now();
        let deadline = (began + command.timeout).min(answer_by.unwrap_or(began + command.timeout));
        let order = Execute {
            language: command.language,
            code_len: 0,
            code: Some(command.code),
            timeout_ms: deadline.duration_since(began).as_millis() as u64,
            env: live.staged_env(),
            live: command.live,
            context: command.context.map(|name| name.as_str().to_owned()),
        };
        let collector = Collector::new(self.config.output_bytes, self.budget.clone());
        let mut running = Running {
            core: self.clone(),
            session,
            live,
            run: None,
            opening: false,
            hold: Some((turn, busy)),
            collector,
            attached,
            deadline,
            answer_by,
            cancelled: false,
        };
        let end = running.carry_out(order).await;
        self.metrics.phase(Phase::Exec, began.elapsed());
        // Kept while the end of a step is noted; a command that still has to be stopped needs its turn itself.
        let hold = match (&step, &running.run) {
            (Some(_), None) => running.hold.take(),
            _ => None,
        };
        let mut outcome = running.outcome(end);
        outcome.execution_time = at.elapsed();
        outcome.vm_restarted = restarted;
        if let Some(step) = step {
            self.watch.after(step, &outcome).await;
        }
        drop(hold);
        Ok(outcome)
    }
}

/// Why something was not waited for to its end.
enum Late {
    TimedOut,
    Cancelled,
}

/// Awaits, but not beyond the time given, nor when the command is cancelled.
async fn wait<T>(
    until: Option<Instant>,
    cancel: &mut Option<watch::Receiver<bool>>,
    future: impl Future<Output = T>,
) -> Result<T, Late> {
    let timed = async {
        match until {
            Some(until) => tokio::time::timeout_at(until, future).await.ok(),
            None => Some(future.await),
        }
    };
    tokio::select! {
        biased;
        () = cancelled(cancel) => Err(Late::Cancelled),
        done = timed => done.ok_or(Late::TimedOut),
    }
}

fn not_run(accepted_at: Instant, exit_code: i32, note: &str) -> Outcome {
    let mut outcome = Outcome {
        exit_code,
        timed_out: exit_code == TIMED_OUT,
        cancelled: exit_code == CANCELLED_CODE,
        execution_time: accepted_at.elapsed(),
        ..Outcome::default()
    };
    append_line(&mut outcome.stderr, note);
    outcome
}

/// How a command's way ended.
enum Finish {
    /// The agent said so.
    Exit(Exit),
    /// The VM ended under it.
    Cut(End),
    /// The caller must be answered; the command is being stopped.
    Answer,
}

/// A command in a VM. Dropping it midway (the caller went away) stops the command and only then
/// passes the turn on.
struct Running {
    core: Arc<Core>,
    session: Arc<Session>,
    live: Arc<Live>,
    run: Option<Box<dyn Run>>,
    /// The command is being handed over: whether the guest has it is not known.
    opening: bool,
    hold: Option<(Turn, Busy)>,
    collector: Collector,
    attached: Attached,
    deadline: Instant,
    answer_by: Option<Instant>,
    cancelled: bool,
}

/// Resolves when the command is to be stopped.
async fn cancelled(cancel: &mut Option<watch::Receiver<bool>>) {
    if let Some(cancel) = cancel
        && cancel.wait_for(|cancel| *cancel).await.is_ok()
    {
        return;
    }
    // Nobody can cancel it (any more).
    std::future::pending().await
}

impl Running {
    /// Starts the command and follows it. Afterwards `run` is left only if the command still
    /// has to be stopped.
    async fn carry_out(&mut self, order: Execute) -> Finish {
        let (live, patience) = (self.live.clone(), self.core.config.interrupt_after_ms);
        let give_up = self.deadline + Duration::from_millis(patience);
        self.opening = true;
        let started = tokio::select! {
            biased;
            how = live.ended() => return Finish::Cut(how),
            started = tokio::time::timeout_at(give_up, live.vm.execute(order)) => started,
        };
        self.opening = false;
        let Ok(started) = started else {
            self.core.metrics.degraded(Degradation::VmUnstoppable);
            return self.failed("it did not take a command in time".into());
        };
        match started {
            Ok(run) => self.run = Some(run),
            Err(error) => return self.failed(format!("{error:#}")),
        }
        let finish = self.follow().await;
        if !matches!(finish, Finish::Answer) {
            self.run = None;
        }
        finish
    }

    async fn follow(&mut self) -> Finish {
        let live = self.live.clone();
        let ended = live.ended();
        tokio::pin!(ended);
        let mut stopping = Stopping::new(&self.core, self.deadline);
        let mut cancel = self.attached.cancel.clone();
        let timer = tokio::time::sleep_until(stopping.at);
        tokio::pin!(timer);
        loop {
            let Some(run) = self.run.as_mut() else {
                return self.failed("its command is gone".into());
            };
            // The timer and the VM's end come first: a flood of output cannot starve them.
            tokio::select! {
                biased;
                how = &mut ended => {
                    self.drain_now();
                    return Finish::Cut(how);
                }
                () = &mut timer => {
                    if self.answer_by.is_some() && !self.cancelled {
                        return Finish::Answer;
                    }
                    if let Some(finish) = self.stop_harder(&mut stopping).await {
                        return finish;
                    }
                }
                () = cancelled(&mut cancel), if !self.cancelled => {
                    self.cancelled = true;
                    stopping = Stopping::now(&self.core);
                }
                event = run.next() => match event {
                    RunEvent::Stdout(bytes) => self.collector.stdout(&bytes),
                    RunEvent::Stderr(bytes) => self.collector.stderr(&bytes),
                    RunEvent::Rich(bytes) => self.collector.rich(&bytes),
                    RunEvent::Exit(exit) => return Finish::Exit(exit),
                    RunEvent::Died(reason) => return self.failed(reason),
                }
            }
            self.show();
            if timer.deadline() != stopping.at {
                timer.as_mut().reset(stopping.at);
            }
        }
    }

    /// The next measure against a command that overruns.
    async fn stop_harder(&mut self, stopping: &mut Stopping) -> Option<Finish> {
        let run = self.run.as_mut()?;
        match stopping.next(run.as_mut()).await {
            Ok(()) => None,
            Err(reason) => {
                self.core.metrics.degraded(Degradation::VmUnstoppable);
                Some(self.failed(reason))
            }
        }
    }

    /// Takes what has already arrived from a VM that is no more.
    fn drain_now(&mut self) {
        let Some(run) = self.run.as_mut() else { return };
        // Bounded by what can be in flight: at most the credit of two streams.
        for _ in 0..1024 {
            match run.next().now_or_never() {
                Some(RunEvent::Stdout(bytes)) => self.collector.stdout(&bytes),
                Some(RunEvent::Stderr(bytes)) => self.collector.stderr(&bytes),
                Some(RunEvent::Rich(_)) => {}
                _ => return,
            }
        }
    }

    /// The VM is of no use any more. If somebody ended it before, that is the reason given.
    fn failed(&self, reason: String) -> Finish {
        let how = End::Failed(reason);
        self.session
            .end_vm(&self.live, how.clone(), &self.core.reaper);
        Finish::Cut(self.live.how_ended().unwrap_or(how))
    }

    fn show(&mut self) {
        if let Some(feed) = &self.attached.feed {
            self.collector.show(feed);
        }
    }

    fn outcome(&mut self, finish: Finish) -> Outcome {
        self.show();
        let results = self.collector.results();
        let (stdout, stderr, truncated_bytes) = self.collector.finish();
        let mut outcome = Outcome {
            results,
            cancelled: self.cancelled,
            stdout,
            stderr,
            truncated_bytes,
            ..Outcome::default()
        };
        match finish {
            Finish::Exit(exit) => {
                outcome.exit_code = exit.exit_code;
                outcome.timed_out = exit.timed_out;
                outcome.cpu_time = Duration::from_micros(exit.cpu_us);
                if self.cancelled {
                    append_line(&mut outcome.stderr, CANCELLED);
                } else if exit.timed_out {
                    append_line(&mut outcome.stderr, INTERRUPTED);
                }
                let lost_before = self.live.state_lost.swap(false, Ordering::AcqRel);
                match exit.note {
                    Some(note) => append_line(&mut outcome.stderr, &format!("thaw: {note}")),
                    None if exit.state_lost || lost_before => {
                        append_line(&mut outcome.stderr, STATE_LOST)
                    }
                    None => {}
                }
            }
            Finish::Cut(how) => {
                outcome.timed_out = Instant::now() >= self.deadline;
                outcome.exit_code = if outcome.timed_out {
                    TIMED_OUT
                } else {
                    CUT_SHORT
                };
                if outcome.timed_out {
                    append_line(&mut outcome.stderr, "thaw: the command timed out");
                }
                append_line(&mut outcome.stderr, &how.note());
            }
            Finish::Answer => {
                outcome.timed_out = true;
                outcome.exit_code = TIMED_OUT;
                append_line(&mut outcome.stderr, STOPPING);
            }
        }
        if outcome.timed_out {
            self.core.metrics.degraded(Degradation::TimedOut);
        }
        if outcome.truncated_bytes > 0 {
            self.core.metrics.degraded(Degradation::Truncated);
        }
        outcome
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let hold = self.hold.take();
        if self.opening && self.run.is_none() {
            self.failed("the caller went away while it was given a command".into());
        }
        let Some(run) = self.run.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let (core, session, live) = (self.core.clone(), self.session.clone(), self.live.clone());
        runtime.spawn(async move {
            stop(core, session, live, run).await;
            drop(hold);
        });
    }
}

/// Stops a command that nobody waits for, so that the session's next one finds the VM free.
async fn stop(core: Arc<Core>, session: Arc<Session>, live: Arc<Live>, mut run: Box<dyn Run>) {
    let mut stopping = Stopping::now(&core);
    loop {
        tokio::select! {
            biased;
            _ = live.ended() => return,
            () = tokio::time::sleep_until(stopping.at) => {
                if let Err(reason) = stopping.next(run.as_mut()).await {
                    core.metrics.degraded(Degradation::VmUnstoppable);
                    session.end_vm(&live, End::Failed(reason), &core.reaper);
                    return;
                }
            }
            event = run.next() => match event {
                RunEvent::Stdout(_) | RunEvent::Stderr(_) | RunEvent::Rich(_) => {}
                RunEvent::Exit(exit) => {
                    // Its caller was answered long ago; the next one is told.
                    live.state_lost.fetch_or(exit.state_lost, Ordering::AcqRel);
                    return;
                }
                RunEvent::Died(reason) => {
                    session.end_vm(&live, End::Failed(reason), &core.reaper);
                    return;
                }
            }
        }
    }
}

/// The measures against a command that will not end, one after the other.
struct Stopping {
    /// When the next one is due.
    at: Instant,
    measures: std::vec::IntoIter<(Option<Signal>, Duration)>,
}

impl Stopping {
    /// For a command whose agent interrupts it at its deadline.
    fn new(core: &Core, deadline: Instant) -> Self {
        let after = Duration::from_millis(core.config.interrupt_after_ms);
        Self {
            at: deadline + after,
            ..Self::now(core)
        }
    }

    /// For a command to be stopped at once.
    fn now(core: &Core) -> Self {
        let ms = Duration::from_millis;
        let measures = vec![
            (Some(Signal::Interrupt), ms(core.config.kill_after_ms)),
            (Some(Signal::Kill), ms(core.config.end_after_ms)),
            (None, Duration::ZERO),
        ];
        Self {
            at: Instant::now(),
            measures: measures.into_iter(),
        }
    }

    /// Takes the next measure. An error says why the VM must be ended.
    async fn next(&mut self, run: &mut dyn Run) -> Result<(), String> {
        let Some((Some(signal), pause)) = self.measures.next() else {
            return Err("a command overran its deadline and could not be stopped".into());
        };
        self.at = Instant::now() + pause;
        // A VM that does not even take the signal in time is not going to act on it.
        match tokio::time::timeout(pause, run.signal(signal)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("a command could not be signalled: {error:#}")),
            Err(_) => Err("a command could not be signalled in time".into()),
        }
    }
}
