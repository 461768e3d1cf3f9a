//! What the front end and the sessions say to each other.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

pub use thaw_wire::message::Language;

/// Who owns a session. Every look-up has one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(pub String);

/// A session's name: minted by the server, a version 4 UUID in its canonical lower-case form.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(uuid::Uuid);

impl SessionId {
    /// A fresh, unguessable id.
    pub fn mint() -> Self {
        Self(uuid::Uuid::new_v4())
    }

    /// Reads a client's text. Only the canonical hyphenated form is an id.
    pub fn parse(text: &str) -> Option<Self> {
        let id = uuid::Uuid::try_parse(text).ok()?;
        (id.as_hyphenated().to_string() == text.to_ascii_lowercase()).then_some(Self(id))
    }
}

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

/// A context's name: 1 to 64 of `A-Z a-z 0-9 . _ -`, so that it is fit for a path and a log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContextName(String);

impl ContextName {
    /// Reads a client's text.
    pub fn parse(text: &str) -> Option<Self> {
        let fits = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        let is_name = (1..=64).contains(&text.len()) && text.bytes().all(fits);
        is_name.then(|| Self(text.to_owned()))
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a session is made with. The front end has validated the ranges.
#[derive(Clone, Debug)]
pub struct SessionSpec {
    /// How long its VM lives from its start: 20 s to 24 h.
    pub lifetime: Duration,
    /// Guest memory, MiB: 128 to 8192. The template of the next size up is used.
    pub memory_mib: u32,
    /// vCPUs asked for.
    pub vcpus: u32,
    /// The client's own labels, returned as given.
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Environment variables of everything the session runs.
    pub env: BTreeMap<String, String>,
}

/// One command, validated.
#[derive(Clone, Debug)]
pub struct Command {
    /// Its language.
    pub language: Language,
    /// The source text or command line.
    pub code: String,
    /// Which of the session's interpreters of this language.
    pub context: Option<ContextName>,
    /// Whether somebody watches its output as it comes.
    pub live: bool,
    /// How long it may run in the guest: 1 to 600 s.
    pub timeout: Duration,
    /// How long after acceptance the caller must have an answer, waiting in line and starting a
    /// VM included. A synchronous caller gives its own time-out less a margin for the way back;
    /// `None` (an asynchronous task) waits as long as it takes to get its turn.
    pub answer_within: Option<Duration>,
}

/// What the tenant's plan allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanLimits {
    /// VMs that may run at once.
    pub max_vms: u32,
}

/// What a running command has written so far, bounded like [`Outcome`]'s text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartialOutput {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Who else has to do with a running command than the one who waits for its outcome.
#[derive(Clone, Debug, Default)]
pub struct Attached {
    /// Where its output is shown as it comes.
    pub feed: Option<std::sync::Arc<super::Feed>>,
    /// The command is stopped when this becomes true.
    pub cancel: Option<tokio::sync::watch::Receiver<bool>>,
    /// Who must know that the command starts before it can have any effect.
    pub witness: Option<std::sync::Arc<dyn Witness>>,
}

/// Somebody who must know that a command starts: asked when its VM is in hand, before the VM is given
/// the command. So what was not witnessed has certainly not run.
pub trait Witness: std::fmt::Debug + Send + Sync {
    /// Takes note.
    ///
    /// # Errors
    /// It cannot; the command is not started then.
    fn starts(&self) -> futures_util::future::BoxFuture<'_, anyhow::Result<()>>;
}

/// How a command ended. A command that failed or overran is an outcome, not an error.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What it wrote to standard output, as UTF-8 (invalid bytes replaced), bounded.
    pub stdout: String,
    /// What it wrote to standard error, likewise, with thaw's own notes at the end.
    pub stderr: String,
    /// Bytes that were thrown away because output is bounded.
    pub truncated_bytes: u64,
    /// See [`thaw_wire::message::Exit::exit_code`].
    pub exit_code: i32,
    /// The deadline passed.
    pub timed_out: bool,
    /// From acceptance by the session to the result.
    pub execution_time: Duration,
    /// Processor time in the guest.
    pub cpu_time: Duration,
    /// Values in other representations than text: a JSON array of objects by MIME type, or empty.
    pub results: String,
    /// It was cancelled.
    pub cancelled: bool,
    /// This command started a fresh VM because the session's earlier one had ended.
    pub vm_restarted: bool,
}

/// Whether a session's VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmStatus {
    /// It runs.
    Active,
    /// It was killed or its lifetime passed.
    Killed,
    /// It ended by an error.
    Failed,
    /// It is frozen on disk and can be resumed.
    Suspended,
}

/// What can be told about a session.
#[derive(Clone, Debug)]
pub struct SessionView {
    /// Its id.
    pub id: SessionId,
    /// When it was made.
    pub created_at: SystemTime,
    /// What it was made with.
    pub spec: SessionSpec,
    /// Its VM's id and status, once there was one.
    pub vm: Option<(String, VmStatus)>,
    /// How long the VM has lived.
    pub uptime: Option<Duration>,
    /// When the VM's lifetime ends.
    pub expires_in: Option<Duration>,
}

/// Why a session cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// There is none by this id that this tenant owns. HTTP 404.
    #[error("no session {0}")]
    NotFound(SessionId),
    /// The session has no VM to act on. HTTP 404.
    #[error("session {0} has no running VM")]
    NoVm(SessionId),
    /// The tenant's plan allows no more VMs at once. HTTP 429.
    #[error("your plan allows {limit} VMs at a time; end one or let it expire")]
    PlanFull {
        /// The plan's number.
        limit: u32,
    },
    /// The host has no room for another VM now. HTTP 429.
    #[error("this host is at its limit of {limit} VMs; try again shortly")]
    HostFull {
        /// The configured number.
        limit: u32,
    },
    /// The host has too little free memory for another VM. HTTP 429.
    #[error("this host has no memory for another VM now; try again shortly")]
    NoMemory,
    /// The tenant has too many sessions, all of them with a running VM. HTTP 429.
    #[error("{limit} sessions are the most one tenant may have; end one or let it expire")]
    TooManySessions {
        /// The configured number.
        limit: usize,
    },
    /// Too many commands wait in this session. HTTP 429.
    #[error("{limit} commands already wait in this session; wait for one to finish")]
    QueueFull {
        /// The configured number.
        limit: usize,
    },
    /// The session's VM is suspended, and is resumed by its owner only. HTTP 409.
    #[error(
        "VM {0} is suspended; resume it with POST /v1/vms/{0}/resume, or let commands wake it by auto_resume"
    )]
    Asleep(String),
    /// The session has a VM already. HTTP 409.
    #[error("the session already has VM {0}; end it first, or use another session")]
    HasVm(String),
    /// What was asked for cannot be done in the state that things are in; says why. HTTP 409.
    #[error("{0}")]
    Conflict(String),
    /// The VM was ended while it was being started. HTTP 409.
    #[error("the VM was ended while it was being started")]
    EndedEarly,
    /// Too many terminals and file transfers at once. HTTP 429.
    #[error("{limit} terminals and file transfers are the most one VM serves at once; close one")]
    TooManyProcesses {
        /// The number.
        limit: usize,
    },
    /// The server is going down. HTTP 503.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// No VM could be had; the detail is in the log. HTTP 503.
    #[error("no VM could be started; the operator's log has the reason")]
    Unavailable(#[source] anyhow::Error),
}
