//! The durable queue of asynchronous commands.
//!
//! A task's row is committed before its id is given out. Its place in the session's line is taken
//! before that, so a task and the commands sent after its acknowledgement run in that order. A
//! task becomes `running` in the database before its command starts; what the command writes
//! follows, piece by piece, every [`TaskConfig::flush_ms`]. So after a crash a `queued` row has certainly not run and is
//! run, and a `running` row may have run and is not run again: it is interrupted.

mod room;
mod run;

use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use tokio::sync::watch;

use crate::backend::{Backend, Ticket};
use crate::config::TaskConfig;
use crate::session::{Feed, Follower, SessionId, TenantId};
use crate::store::{
    Asked, NewTask, Store, StoreError, Submitted, TaskOutput, TaskRow, WaitingTask, now_ms,
};
use room::CodeRooms;

/// Exit code of a task that was running when the server stopped: as if killed.
const INTERRUPTED: i32 = 137;

const INTERRUPTED_NOTE: &str =
    "thaw: the server stopped while this ran; the output up to then is all there is\n";

/// How often old results are looked for.
const REAP_EVERY: Duration = Duration::from_secs(60);

/// Rows deleted in one go, so that others get their turn at the database.
const REAP_BATCH: u32 = 200;

/// The task queue. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tasks {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    backend: Arc<dyn Backend>,
    config: TaskConfig,
    /// Tasks that are not complete. Values are taken out before anything is awaited.
    live: DashMap<String, Arc<Live>>,
    rooms: CodeRooms,
}

/// A task that is not complete.
#[derive(Debug)]
struct Live {
    tenant: String,
    output: Arc<Feed>,
    /// Set by who cancels it.
    cancel: watch::Sender<bool>,
    done: watch::Sender<bool>,
}

impl Tasks {
    /// Takes up where the last run of the server left off.
    ///
    /// # Errors
    /// The database failed.
    pub async fn start(
        store: Store,
        backend: Arc<dyn Backend>,
        config: TaskConfig,
    ) -> Result<Self, StoreError> {
        let (interrupted, queued) = store
            .call(|c| {
                let interrupted = TaskOutput::interrupt_running(c, INTERRUPTED_NOTE, INTERRUPTED)?;
                Ok((interrupted, TaskRow::queued(c, run::SHORT_CODE)?))
            })
            .await?;
        if interrupted + queued.len() > 0 {
            tracing::info!(interrupted, queued = queued.len(), "tasks of the last run");
        }
        let tasks = Self {
            inner: Arc::new(Inner {
                rooms: CodeRooms::new((config.max_open_code_mib as usize) << 20),
                store,
                backend,
                config,
                live: DashMap::new(),
            }),
        };
        tasks.recover(queued);
        let inner = Arc::downgrade(&tasks.inner);
        tokio::spawn(async move {
            loop {
                match inner.upgrade() {
                    Some(inner) => inner.reap().await,
                    None => return,
                }
                tokio::time::sleep(REAP_EVERY).await;
            }
        });
        Ok(tasks)
    }

    /// Takes a task, whose place in its session's line is taken already. It is durable when this
    /// returns [`Submitted::New`]. Once called it must be driven to its end: spawn it if the caller may go
    /// away.
    ///
    /// # Errors
    /// The database failed; nothing will run then.
    pub async fn submit(
        &self,
        task: NewTask,
        ticket: Box<dyn Ticket>,
    ) -> Result<Submitted, StoreError> {
        let inner = &self.inner;
        let tenant = TenantId(task.tenant.clone());
        let Some(session) = SessionId::parse(&task.session_id) else {
            return Ok(Submitted::Full(0));
        };
        let limit = inner.config.max_open;
        let id = task.id.clone();
        let (room, fits) = inner.rooms.take(&task.tenant, task.command.code.len());
        let command = run::without_long_code(&task.command);
        let max_vms = task.max_vms;
        // Known before it is durable, so that a poll never finds it neither here nor there.
        let live = inner.enter(&id, &task.tenant);
        let stored = inner.store.call(move |c| task.insert(c, limit, fits));
        let submitted = stored.await;
        if !matches!(submitted, Ok(Submitted::New)) {
            inner.live.remove(&id);
            return submitted;
        }
        let job = run::Job {
            id,
            tenant,
            session,
            command,
            max_vms,
            room,
        };
        let inner = inner.clone();
        tokio::spawn(async move { inner.run(job, live, Some(ticket)).await });
        Ok(Submitted::New)
    }

    /// What [`Self::submit`] would say to a task of this name, content and length if that is not
    /// [`Submitted::New`], for who would have to make something for the task first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn foresee(
        &self,
        tenant: &TenantId,
        key: Option<String>,
        body_hash: [u8; 32],
        code_bytes: usize,
    ) -> Result<Option<Submitted>, StoreError> {
        let inner = &self.inner;
        let (limit, fits) = (
            inner.config.max_open,
            inner.rooms.fits(&tenant.0, code_bytes),
        );
        let tenant = tenant.0.clone();
        let foreseen = inner.store.call(move |c| {
            let asked = Asked {
                tenant: &tenant,
                key: key.as_deref(),
                body_hash: &body_hash,
            };
            asked.foresee(c, limit, fits)
        });
        foreseen.await
    }

    /// MiB of code that the open tasks of one tenant may have.
    pub fn most_code_mib(&self) -> u32 {
        self.inner.config.max_open_code_mib
    }

    /// The tenant's task as of now, or as of when it completes if that is within `wait`.
    ///
    /// # Errors
    /// The database failed.
    pub async fn view(
        &self,
        tenant: &TenantId,
        id: &str,
        wait: Duration,
    ) -> Result<Option<TaskRow>, StoreError> {
        let live = self.live(tenant, id);
        if let Some(live) = &live {
            let mut done = live.done.subscribe();
            // Whether it is done is seen in the row.
            drop(tokio::time::timeout(wait, done.wait_for(|done| *done)).await);
        }
        let (id, tenant) = (id.to_owned(), tenant.0.clone());
        let row = self
            .inner
            .store
            .call(move |c| TaskRow::find(c, &tenant, &id))
            .await?;
        Ok(row.map(|mut row| {
            if let Some(live) = live.filter(|_| !row.state.is_complete()) {
                let output = live.output.so_far();
                row.stdout = output.stdout;
                row.stderr = output.stderr;
            }
            row
        }))
    }

    /// The output of the tenant's task as it comes, while it is not complete.
    pub fn follow(&self, tenant: &TenantId, id: &str) -> Option<Follower> {
        self.live(tenant, id).map(|live| live.output.follow())
    }

    /// Stops the tenant's task, or keeps it from starting; `None` when it is not open.
    pub fn cancel(&self, tenant: &TenantId, id: &str) -> Option<()> {
        let live = self.live(tenant, id)?;
        live.cancel.send_replace(true);
        Some(())
    }

    fn live(&self, tenant: &TenantId, id: &str) -> Option<Arc<Live>> {
        let live = self.inner.live.get(id).map(|entry| entry.value().clone());
        live.filter(|live| live.tenant == tenant.0)
    }

    /// Tasks that wait or run.
    pub fn open(&self) -> usize {
        self.inner.live.len()
    }

    /// After the sessions are drained: waits until every result is stored.
    pub async fn settle(&self, most: Duration) {
        let settled = async {
            while !self.inner.live.is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(most, settled).await.is_err() {
            tracing::warn!(tasks = self.open(), "tasks had not settled at shutdown");
        }
    }

    /// Runs the queued tasks of the last run, each session's in their order.
    fn recover(&self, queued: Vec<WaitingTask>) {
        let mut by_session: Vec<(SessionId, Vec<_>)> = Vec::new();
        for row in queued {
            let Some(session) = SessionId::parse(&row.session_id) else {
                tracing::error!(task = row.id, "a stored task names no session");
                continue;
            };
            let tenant = TenantId(row.tenant);
            let live = self.inner.enter(&row.id, &tenant.0);
            // Before the server listens, so that new commands come after these. Those beyond
            // the line's length take their places as it moves.
            let ticket = self.inner.backend.accept(&tenant, &session).ok();
            // However much it is: it was accepted.
            let (room, _) = self.inner.rooms.take(&tenant.0, row.code_bytes);
            let job = run::Job {
                id: row.id,
                tenant,
                session: session.clone(),
                command: row.command,
                max_vms: row.max_vms,
                room,
            };
            match by_session.iter_mut().find(|(id, _)| *id == session) {
                Some((_, jobs)) => jobs.push((job, live, ticket)),
                None => by_session.push((session, vec![(job, live, ticket)])),
            }
        }
        for (_, jobs) in by_session {
            let inner = self.inner.clone();
            tokio::spawn(async move {
                for (job, live, ticket) in jobs {
                    inner.run(job, live, ticket).await;
                }
            });
        }
    }
}

impl Inner {
    fn enter(&self, id: &str, tenant: &str) -> Arc<Live> {
        let live = Arc::new(Live {
            tenant: tenant.to_owned(),
            output: Arc::default(),
            cancel: watch::Sender::new(false),
            done: watch::Sender::new(false),
        });
        self.live.insert(id.to_owned(), live.clone());
        live
    }

    async fn reap(&self) {
        let before = now_ms().saturating_sub_unsigned(self.config.keep_s.saturating_mul(1000));
        let (keep, most_bytes) = (self.config.keep_count, self.config.keep_mib << 20);
        loop {
            let reaped = self.store.call(move |c| {
                Ok(TaskRow::reap(c, before, keep, REAP_BATCH)?
                    + TaskRow::reap_bytes(c, most_bytes, REAP_BATCH)?)
            });
            match reaped.await {
                Ok(0) | Err(StoreError::Closed) => return,
                Ok(count) => tracing::debug!(count, "old task results were forgotten"),
                Err(error) => {
                    tracing::warn!(%error, "old task results could not be forgotten");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
