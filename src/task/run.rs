//! One task, from its turn to its stored result.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::room::CodeRoom;
use super::{Inner, Live};
use crate::backend::Ticket;
use crate::session::{
    Attached, Command, Outcome, PlanLimits, SessionError, SessionId, TenantId, Witness,
};
use crate::store::{Store, StoreError, TaskEnd, TaskOutput, TaskRow};

/// Exit code of a task that thaw could not run at all, as container tools have it.
const NOT_RUN: i32 = 125;

/// First and longest pause between tries while the host or the plan is full.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(2);

/// Tries to store a result before it is given up; the pause doubles from [`RETRY_FIRST`].
const STORE_TRIES: u32 = 8;

/// Code of a waiting task that is kept in memory; longer code is read again when its turn comes. What a user's
/// waiting tasks take is then small whatever they run, and a short command costs no second look at the
/// database.
pub(super) const SHORT_CODE: usize = 4 << 10;

/// What is to run.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) id: String,
    pub(super) tenant: TenantId,
    pub(super) session: SessionId,
    /// Without its code if that is long: see [`SHORT_CODE`].
    pub(super) command: Command,
    pub(super) max_vms: u32,
    /// Given back when it is complete.
    pub(super) room: CodeRoom,
}

/// The command as it is kept while it waits.
pub(super) fn without_long_code(command: &Command) -> Command {
    let code = match command.code.len() > SHORT_CODE {
        true => String::new(),
        false => command.code.clone(),
    };
    Command {
        code,
        context: command.context.clone(),
        ..*command
    }
}

impl Inner {
    /// Runs a job to its end. A job that gets no turn because the server stops stays queued.
    pub(super) async fn run(&self, job: Job, live: Arc<Live>, ticket: Option<Box<dyn Ticket>>) {
        if let Some(outcome) = self.attempt(&job, &live, ticket).await {
            let end = TaskEnd {
                id: job.id.clone(),
                outcome,
            };
            self.insist(&job.id, move |store| {
                let end = end.clone();
                async move { store.call(move |c| end.store(c)).await }
            })
            .await;
        }
        self.live.remove(&job.id);
        live.done.send_replace(true);
        live.output.close();
    }

    /// Tries until the job has run or cannot.
    async fn attempt(
        &self,
        job: &Job,
        live: &Live,
        mut ticket: Option<Box<dyn Ticket>>,
    ) -> Option<Outcome> {
        let give_up = Instant::now() + Duration::from_secs(self.config.wait_for_vm_s);
        let mut pause = RETRY_FIRST;
        loop {
            let accepted = match ticket.take() {
                Some(ticket) => Ok(ticket),
                None => self.backend.accept(&job.tenant, &job.session),
            };
            let result = match accepted {
                Ok(ticket) => self.once(job, live, ticket).await,
                Err(error) => Err(error),
            };
            let error = match result {
                Ok(outcome) => return Some(outcome),
                Err(SessionError::ShuttingDown) => return None,
                Err(
                    error @ (SessionError::NotFound(_)
                    | SessionError::NoVm(_)
                    | SessionError::Asleep(_)
                    | SessionError::Conflict(_)),
                ) => {
                    return Some(not_run(&error));
                }
                Err(error) => error,
            };
            if Instant::now() + pause > give_up {
                return Some(not_run(&error));
            }
            tracing::debug!(task = job.id, %error, "a task waits for a VM");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MOST);
        }
    }

    /// Waits for the job's turn and runs it.
    async fn once(
        &self,
        job: &Job,
        live: &Live,
        mut ticket: Box<dyn Ticket>,
    ) -> Result<Outcome, SessionError> {
        let mut cancel = live.cancel.subscribe();
        tokio::select! {
            () = ticket.ready() => {}
            // The ticket itself answers that it was cancelled.
            _ = cancel.wait_for(|cancel| *cancel) => {}
        }
        let limits = PlanLimits {
            max_vms: job.max_vms,
        };
        let attached = Attached {
            feed: Some(live.output.clone()),
            cancel: Some(live.cancel.subscribe()),
            witness: Some(Arc::new(Starts {
                store: self.store.clone(),
                id: job.id.clone(),
            })),
        };
        let mut command = job.command.clone();
        if job.room.bytes() > SHORT_CODE {
            let id = job.id.clone();
            let code = self.store.call(move |c| TaskRow::code(c, &id)).await;
            command.code = code.map_err(|error| SessionError::Unavailable(error.into()))?;
        }
        let running = ticket.run(limits, command, attached);
        self.flushing(&job.id, live, running).await
    }

    /// Writes the output so far to the database while the command runs.
    async fn flushing(
        &self,
        id: &str,
        live: &Live,
        running: impl Future<Output = Result<Outcome, SessionError>>,
    ) -> Result<Outcome, SessionError> {
        let mut news = live.output.watch();
        let every = Duration::from_millis(self.config.flush_ms);
        let mut running = std::pin::pin!(running);
        let mut stored = [0; 2];
        loop {
            tokio::select! {
                result = &mut running => return result,
                () = tokio::time::sleep(every) => {}
            }
            if !news.has_changed().unwrap_or(false) {
                continue;
            }
            news.mark_unchanged();
            let new = live.output.since(stored);
            let now = [stored[0] + new.stdout.len(), stored[1] + new.stderr.len()];
            let id = id.to_owned();
            let append = self.store.call(move |c| TaskOutput::append(c, &id, &new));
            tokio::select! {
                result = &mut running => return result,
                appended = append => match appended {
                    Ok(()) => stored = now,
                    // The next time has it, too.
                    Err(error) => {
                        tracing::warn!(%error, "a task's output so far could not be stored");
                    }
                }
            }
        }
    }

    /// Stores a result, and again when that fails: the result exists nowhere else.
    async fn insist<F>(&self, id: &str, store: impl Fn(Store) -> F)
    where
        F: Future<Output = Result<(), StoreError>>,
    {
        let mut pause = RETRY_FIRST;
        for _ in 0..STORE_TRIES {
            match store(self.store.clone()).await {
                Ok(()) => return,
                Err(error) => tracing::error!(task = id, %error, "a result could not be stored"),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        tracing::error!(
            task = id,
            "a result is lost; the task will count as interrupted"
        );
    }
}

/// Notes that a task runs, before its command can have any effect.
#[derive(Debug)]
struct Starts {
    store: Store,
    id: String,
}

impl Witness for Starts {
    fn starts(&self) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async {
            let id = self.id.clone();
            Ok(self
                .store
                .call(move |c| TaskRow::mark_running(c, &id))
                .await?)
        })
    }
}

fn not_run(error: &SessionError) -> Outcome {
    Outcome {
        stderr: format!("thaw: this did not run: {error}\n"),
        exit_code: NOT_RUN,
        ..Outcome::default()
    }
}
