//! One task, from its turn to its stored result.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::{Inner, Live};
use crate::backend::Ticket;
use crate::session::{
    Attached, Command, Outcome, PlanLimits, SessionError, SessionId, TenantId, Witness,
};
use crate::store::{Store, StoreError, TaskEnd, TaskRow};

/// Exit code of a task that thaw could not run at all, as container tools have it.
const NOT_RUN: i32 = 125;

/// First and longest pause between tries while the host or the plan is full.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(2);

/// Output of a running task that is written at the configured pace; twice as much is written half as
/// often. So a task writes some hundred KiB a second to the database, however much it prints.
const FLUSH_STEP: usize = 64 << 10;

/// Tries to store a result before it is given up; the pause doubles from [`RETRY_FIRST`].
const STORE_TRIES: u32 = 8;

/// What is to run.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) id: String,
    pub(super) tenant: TenantId,
    pub(super) session: SessionId,
    pub(super) command: Command,
    pub(super) max_vms: u32,
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
        let running = ticket.run(limits, job.command.clone(), attached);
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
        let mut pause = every;
        let mut running = std::pin::pin!(running);
        loop {
            tokio::select! {
                result = &mut running => return result,
                () = tokio::time::sleep(pause) => {}
            }
            if !news.has_changed().unwrap_or(false) {
                continue;
            }
            news.mark_unchanged();
            let now = live.output.so_far();
            // The whole is written each time, so the more there is the seldomer.
            let steps = (now.stdout.len() + now.stderr.len()) / FLUSH_STEP;
            pause = every * u32::try_from(steps + 1).unwrap_or(u32::MAX);
            let id = id.to_owned();
            let stored = self
                .store
                .call(move |c| TaskRow::store_partial(c, &id, &now.stdout, &now.stderr));
            tokio::select! {
                result = &mut running => return result,
                stored = stored => if let Err(error) = stored {
                    tracing::warn!(%error, "a task's output so far could not be stored");
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
