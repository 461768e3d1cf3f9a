//! What is kept of a VM: while it runs, while it is suspended, and for a while after.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::session::{SessionId, TenantId};

/// Most earlier ids by which a VM is still found: each resume adds one.
pub(super) const MOST_ALIASES: usize = 64;

/// How a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It is being started.
    Creating,
    /// It runs.
    Active,
    /// It is frozen on disk.
    Suspended,
    /// It ended.
    Terminated,
    /// It could not be started, or died.
    Failed,
}

impl Status {
    /// As clients read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Active => "active",
            Self::Suspended => "suspended",
            Self::Terminated => "terminated",
            Self::Failed => "failed",
        }
    }

    /// Whether there is nothing left of the VM.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Terminated | Self::Failed)
    }
}

/// What is wanted of a VM beyond what its session is made with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Make a snapshot when it ends.
    #[serde(default)]
    pub snapshot_on_terminate: bool,
    /// What that snapshot is called.
    #[serde(default)]
    pub snapshot_name: Option<String>,
    /// Suspend it at the end of its lifetime instead of ending it.
    #[serde(default)]
    pub auto_suspend: bool,
    /// Let commands resume it when it is suspended.
    #[serde(default)]
    pub auto_resume: bool,
}

impl Options {
    /// Whether something is to be done at the end of the VM's lifetime.
    pub fn lingers(&self) -> bool {
        self.snapshot_on_terminate || self.auto_suspend
    }
}

/// A VM's record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its id: a new one with every resume.
    pub vm_id: String,
    /// Its owner.
    pub tenant: String,
    /// Its session.
    pub session_id: String,
    /// How it is.
    pub status: Status,
    /// Why it ended.
    #[serde(default)]
    pub reason: Option<String>,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// vCPUs that were asked for.
    pub vcpus: u32,
    /// vCPUs that it really has: fewer than asked for where the machine or the operator allows no more.
    #[serde(default = "one_core")]
    pub cores: u32,
    /// Seconds that it lives from its start.
    pub lifetime_s: u64,
    /// When it was asked for, milliseconds since the Unix epoch.
    pub created_ms: i64,
    /// When it began to run.
    #[serde(default)]
    pub started_ms: Option<i64>,
    /// When its lifetime ends.
    #[serde(default)]
    pub expires_ms: Option<i64>,
    /// When it ended or was suspended.
    #[serde(default)]
    pub ended_ms: Option<i64>,
    /// Its owner's labels.
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// The snapshot it was restored from.
    #[serde(default)]
    pub snapshot_id: Option<String>,
    /// The snapshot that it is while it is suspended.
    #[serde(default)]
    pub parked_in: Option<String>,
    /// It is suspended because nobody used it: any command wakes it, and its lifetime goes on.
    #[serde(default)]
    pub hibernated: bool,
    /// Names of the terminals that it had when it was suspended.
    #[serde(default)]
    pub terminals: Vec<String>,
    /// The checkpoint that it was taken back to, and when, milliseconds since the Unix epoch.
    #[serde(default)]
    pub rewound: Option<(String, i64)>,
    /// What is wanted of it.
    #[serde(default)]
    pub options: Options,
    /// Ids that it had before it was resumed.
    #[serde(default)]
    pub aliases: Vec<String>,
}

/// What VMs had before there was a choice.
pub fn one_core() -> u32 {
    1
}

impl VmRecord {
    /// Its owner.
    pub fn owner(&self) -> TenantId {
        TenantId(self.tenant.clone())
    }

    /// Its session.
    pub fn session(&self) -> Option<SessionId> {
        SessionId::parse(&self.session_id)
    }

    /// Notes that it is over.
    pub(super) fn close(&mut self, status: Status, reason: Option<String>, now_ms: i64) {
        self.status = status;
        self.reason = reason;
        self.ended_ms.get_or_insert(now_ms);
    }
}
