//! Why there is no snapshot, for whoever asked.

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// There is none by this id that this tenant owns.
    #[error("no snapshot {0}")]
    NotFound(String),
    /// The tenant has as many as one may have.
    #[error("{limit} snapshots are the most one user may have; delete one first")]
    TooMany {
        /// The configured number.
        limit: usize,
    },
    /// The tenant's snapshots take as much as they may.
    #[error("your snapshots take {used_mib} MiB and {limit_mib} MiB are allowed; delete one first")]
    TooLarge {
        /// What they take, this one included.
        used_mib: u64,
        /// The configured number.
        limit_mib: u64,
    },
    /// The disk is too full.
    #[error(
        "the disk is {short_mib} MiB short: a snapshot of this VM may take {need_mib} MiB, {free_mib} MiB are free and \
         {floor_mib} MiB stay free; delete snapshots or ask the operator for space"
    )]
    NoSpace {
        /// What is missing.
        short_mib: u64,
        /// What it may take.
        need_mib: u64,
        /// What is free.
        free_mib: u64,
        /// What stays free.
        floor_mib: u64,
    },
    /// It is still being made.
    #[error("snapshot {0} is still being made; try again when its status is ready")]
    Building(String),
    /// It could not be made.
    #[error("snapshot {id} failed: {why}")]
    Failed {
        /// Its id.
        id: String,
        /// Why.
        why: String,
    },
    /// It cannot be restored here.
    #[error("snapshot {id} cannot be restored: {why}")]
    Unfit {
        /// Its id.
        id: String,
        /// Why.
        why: String,
    },
    /// The VM could not be frozen, or the files not be written.
    #[error("the VM could not be frozen: {}", public(.0))]
    NotMade(anyhow::Error),
}

/// What of a failure is for the one who asked: what the VM said. The rest is the operator's.
fn public(error: &anyhow::Error) -> String {
    match error.downcast_ref::<crate::worker::WorkerError>() {
        Some(said) => said.to_string(),
        None => "the operator's log has the reason".to_owned(),
    }
}
