//! Tapes: recordings of sessions. While one runs, every command of its session is a step, and before each step the VM
//! is frozen to a checkpoint, so that the session can go back there or branch off.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::session::{SessionId, TenantId};
use crate::store::{NewTapeEvent, Store, StoreError, TapeEvent, TapeFilter, TapeRow, now_ms};

/// Most tapes of one tenant: some hundred bytes each, without what is on them.
const MOST_TAPES: i64 = 1000;

/// Most events on one tape; it records no more then. At a KiB each this is 100 MiB.
const MOST_EVENTS: i64 = 100_000;

/// Milliseconds of a day.
const DAY_MS: i64 = 24 * 3600 * 1000;

/// Why a tape cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum TapeError {
    /// There is none by this id that this tenant owns.
    #[error("no tape {0}")]
    NotFound(String),
    /// There is no checkpoint there.
    #[error(
        "step {step} of tape {tape} has no checkpoint: it is none of its steps, or older than the checkpoints that are kept"
    )]
    NoCheckpoint {
        /// The tape.
        tape: String,
        /// The step.
        step: i64,
    },
    /// It cannot be done as things are; says what to do.
    #[error("{0}")]
    State(String),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How a session is to be recorded.
#[derive(Clone, Debug)]
pub struct NewTape {
    /// Whose it is.
    pub tenant: TenantId,
    /// What it records.
    pub session: SessionId,
    /// The session's VM.
    pub vm_id: Option<String>,
    /// Note the files that each step changed.
    pub files: bool,
    /// Days until it is forgotten.
    pub days: i64,
    /// The tape and the step that it branches from.
    pub parent: Option<(String, i64)>,
}

/// A session's recording, as it is known in memory.
#[derive(Clone, Debug)]
pub struct Recording {
    /// The tape's id.
    pub tape: String,
    /// It notes the files that each step changed.
    pub files: bool,
    /// The guest's clock when that was last looked for, nanoseconds since the Unix epoch; 0: not yet.
    pub looked_ns: Arc<AtomicU64>,
}

impl Recording {
    fn of(tape: &TapeRow) -> Self {
        Self {
            tape: tape.id.clone(),
            files: tape.files,
            looked_ns: Arc::default(),
        }
    }
}

/// All tapes.
#[derive(Debug)]
pub struct Tapes {
    store: Store,
    recording: Mutex<HashMap<SessionId, Recording>>,
}

impl Tapes {
    /// Finds the sessions that are being recorded.
    ///
    /// # Errors
    /// The store's.
    pub async fn open(store: Store) -> Result<Self, StoreError> {
        let rows = store.call(|c| TapeRow::recording(c)).await?;
        let recording = rows.into_iter().filter_map(|row| {
            let session = SessionId::parse(&row.session_id)?;
            Some((session, Recording::of(&row)))
        });
        let recording = Mutex::new(recording.collect());
        Ok(Self { store, recording })
    }

    /// The recording of a session, if one runs.
    pub fn of(&self, session: &SessionId) -> Option<Recording> {
        self.recordings().get(session).cloned()
    }

    /// The recording that a tape is of, while it runs.
    pub fn recording(&self, tape: &str) -> Option<Recording> {
        let recordings = self.recordings();
        recordings.values().find(|one| one.tape == tape).cloned()
    }

    /// Begins to record a session; one that is recorded already goes on with that tape.
    ///
    /// # Errors
    /// The tenant has too many tapes, or the store's.
    pub async fn start(&self, new: NewTape) -> Result<TapeRow, TapeError> {
        if let Some(running) = self.of(&new.session) {
            return self.get(&new.tenant, &running.tape).await;
        }
        let now = now_ms();
        let row = TapeRow {
            id: uuid::Uuid::new_v4().to_string(),
            tenant: new.tenant.0,
            session_id: new.session.to_string(),
            vm_id: new.vm_id,
            status: "recording".to_owned(),
            files: new.files,
            created_ms: now,
            stopped_ms: None,
            expires_ms: now + new.days * DAY_MS,
            parent: new.parent,
            steps: 0,
        };
        let stored = row.clone();
        if !self
            .store
            .call(move |c| stored.insert(c, MOST_TAPES))
            .await?
        {
            return Err(TapeError::State(format!(
                "{MOST_TAPES} tapes are the most one user may have; delete one first"
            )));
        }
        self.recordings().insert(new.session, Recording::of(&row));
        Ok(row)
    }

    /// One of the tenant's tapes.
    ///
    /// # Errors
    /// [`TapeError::NotFound`], or the store's.
    pub async fn get(&self, tenant: &TenantId, id: &str) -> Result<TapeRow, TapeError> {
        let (tenant, wanted) = (tenant.0.clone(), id.to_owned());
        let found = self.store.call(move |c| TapeRow::get(c, &tenant, &wanted));
        found
            .await?
            .ok_or_else(|| TapeError::NotFound(id.to_owned()))
    }

    /// The tenant's tapes, newest first.
    ///
    /// # Errors
    /// The store's.
    pub async fn list(&self, filter: TapeFilter) -> Result<Vec<TapeRow>, TapeError> {
        Ok(self.store.call(move |c| TapeRow::list(c, &filter)).await?)
    }

    /// Stops recording; what is recorded stays.
    ///
    /// # Errors
    /// [`TapeError::NotFound`], or the store's.
    pub async fn stop(&self, tenant: &TenantId, id: &str) -> Result<TapeRow, TapeError> {
        self.get(tenant, id).await?;
        self.forget(id);
        let stopped = id.to_owned();
        self.store.call(move |c| TapeRow::stop(c, &stopped)).await?;
        self.get(tenant, id).await
    }

    /// Removes a tape; gives the checkpoints that nothing names any more.
    ///
    /// # Errors
    /// [`TapeError::NotFound`], or the store's.
    pub async fn delete(&self, tenant: &TenantId, id: &str) -> Result<Vec<String>, TapeError> {
        self.get(tenant, id).await?;
        self.forget(id);
        let gone = id.to_owned();
        Ok(self.store.call(move |c| TapeRow::delete(c, &gone)).await?)
    }

    /// Removes the tapes whose time is over; gives owners and checkpoints.
    ///
    /// # Errors
    /// The store's.
    pub async fn expire(&self) -> Result<Vec<(TenantId, String)>, TapeError> {
        let expired = self.store.call(|c| TapeRow::expired(c, now_ms())).await?;
        let mut checkpoints = Vec::new();
        for tape in expired {
            let owner = TenantId(tape.tenant.clone());
            let gone = self.delete(&owner, &tape.id).await?;
            checkpoints.extend(gone.into_iter().map(|id| (owner.clone(), id)));
        }
        Ok(checkpoints)
    }

    /// Puts something on a tape; gives its step.
    ///
    /// # Errors
    /// [`TapeError::State`]: the tape is full, or has no such step; or the store's.
    pub async fn append(&self, tape: &str, new: NewTapeEvent) -> Result<i64, TapeError> {
        let id = tape.to_owned();
        let appended = self
            .store
            .call(move |c| TapeEvent::append(c, &id, &new, MOST_EVENTS));
        appended.await?.ok_or_else(|| {
            TapeError::State(format!(
                "tape {tape} has no such step, or has {MOST_EVENTS} events already"
            ))
        })
    }

    /// What is on a tape.
    ///
    /// # Errors
    /// The store's.
    pub async fn events(
        &self,
        tape: &str,
        after: i64,
        kind: Option<String>,
        limit: i64,
    ) -> Result<Vec<TapeEvent>, TapeError> {
        let tape = tape.to_owned();
        let events = self
            .store
            .call(move |c| TapeEvent::list(c, &tape, after, kind.as_deref(), limit));
        Ok(events.await?)
    }

    /// How many events there are of each kind.
    ///
    /// # Errors
    /// The store's.
    pub async fn lanes(&self, tape: &str) -> Result<Vec<(String, i64)>, TapeError> {
        let tape = tape.to_owned();
        Ok(self.store.call(move |c| TapeEvent::lanes(c, &tape)).await?)
    }

    /// The checkpoint of the moment before a step.
    ///
    /// # Errors
    /// [`TapeError::NoCheckpoint`], or the store's.
    pub async fn checkpoint(&self, tape: &str, step: i64) -> Result<String, TapeError> {
        let id = tape.to_owned();
        let found = self
            .store
            .call(move |c| TapeEvent::checkpoint(c, &id, step));
        found.await?.ok_or_else(|| TapeError::NoCheckpoint {
            tape: tape.to_owned(),
            step,
        })
    }

    /// Takes the oldest checkpoints off a tape until `keep` are left; gives what it took.
    ///
    /// # Errors
    /// The store's.
    pub async fn thin_out(&self, tape: &str, keep: usize) -> Result<Vec<String>, TapeError> {
        let tape = tape.to_owned();
        let thinned = self
            .store
            .call(move |c| TapeEvent::thin_out(c, &tape, keep));
        Ok(thinned.await?)
    }

    /// Every checkpoint that is on a tape.
    ///
    /// # Errors
    /// The store's.
    pub async fn all_checkpoints(&self) -> Result<Vec<String>, StoreError> {
        self.store.call(|c| TapeEvent::all_checkpoints(c)).await
    }

    fn forget(&self, tape: &str) {
        self.recordings()
            .retain(|_, recording| recording.tape != tape);
    }

    fn recordings(&self) -> MutexGuard<'_, HashMap<SessionId, Recording>> {
        self.recording
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something about a command for a tape: text, cut to what a tape keeps of it.
pub fn excerpt(text: &str) -> Value {
    /// Characters of a command that are kept: enough to know it by.
    const MOST: usize = 4096;
    match text.char_indices().nth(MOST) {
        None => Value::from(text),
        Some((end, _)) => Value::from(format!("{}…", &text[..end])),
    }
}

/// Days until a tape is forgotten, at least one.
pub fn days_left(tape: &TapeRow) -> i64 {
    ((tape.expires_ms - now_ms()) / DAY_MS).max(1)
}
