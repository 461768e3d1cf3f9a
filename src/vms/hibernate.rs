//! Hibernation: VMs that nobody uses are frozen to disk by themselves, and wake with the next command.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::mpsc;

use super::{Status, VmError, Vms};
use crate::session::{RoomWanted, SessionError, TenantId};
use crate::snapshots::Kind;
use crate::store::now_ms;

/// Shortest and longest time between two looks for idle VMs.
const LOOK: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));

/// How long freezing an idle VM may wait for its turn: if a command has come meanwhile, it is not idle.
const NO_WAIT: Duration = Duration::from_millis(20);

/// Idle VMs that are tried for one place: the first may be used, or too large for the disk, just then.
const MOST_TRIED: usize = 4;

/// VMs that are frozen at the same time when the server goes: each keeps a core and the disk busy.
const AT_ONCE: usize = 4;

impl Vms {
    /// Hibernates VMs that have had no command for so long, and ends those whose lifetime passes while they
    /// sleep. Never returns.
    pub async fn hibernate_idle(self, after: Duration) {
        let pause = (after / 4).clamp(LOOK.0, LOOK.1);
        loop {
            tokio::time::sleep(pause).await;
            self.end_expired_sleepers().await;
            for (tenant, vm_id) in self.sessions.idle_vms(after) {
                match self
                    .freeze_and_end(&tenant, &vm_id, NO_WAIT, Kind::Hibernated)
                    .await
                {
                    Ok(_) => tracing::debug!(vm = vm_id, "an idle VM hibernates"),
                    // It was used or ended in this moment, or its owner has as many snapshots as one may have.
                    Err(
                        error @ (VmError::State(_) | VmError::Session(SessionError::Conflict(_))),
                    ) => {
                        tracing::debug!(vm = vm_id, "an idle VM goes on running: {error}");
                    }
                    Err(error) => tracing::warn!(vm = vm_id, "an idle VM goes on running: {error}"),
                }
            }
        }
    }

    /// Hibernates every VM in which no command runs, because the server goes. Those that are not frozen within the time
    /// go on running, for somebody else to end.
    pub async fn hibernate_all(&self, within: Duration) {
        let all = self.sessions.all_vms();
        if all.is_empty() {
            return;
        }
        let count = all.len();
        let freeze = async |(tenant, vm_id): (TenantId, String)| {
            let frozen = self.freeze_and_end(&tenant, &vm_id, NO_WAIT, Kind::Hibernated);
            match frozen.await {
                Ok(_) => tracing::debug!(vm = vm_id, "a VM hibernates until the next start"),
                Err(error) => tracing::warn!(vm = vm_id, "a VM ends with the server: {error}"),
            }
        };
        let frozen = stream::iter(all).for_each_concurrent(AT_ONCE, freeze);
        match tokio::time::timeout(within, frozen).await {
            Ok(()) => tracing::info!(count, "VMs hibernate until the next start"),
            Err(_) => tracing::warn!(
                count,
                "some VMs end with the server: there was no time to freeze them"
            ),
        }
    }

    /// Hibernates the VM that has been idle longest, at least for so long, whenever the host is full and another is
    /// wanted. Ends with the requests.
    pub async fn hibernate_for_room(self, idle: Duration, mut wanted: mpsc::Receiver<RoomWanted>) {
        while let Some(wanted) = wanted.recv().await {
            let mut made = false;
            for (tenant, vm_id) in self.sessions.idle_vms(idle).into_iter().take(MOST_TRIED) {
                match self
                    .freeze_and_end(&tenant, &vm_id, NO_WAIT, Kind::Hibernated)
                    .await
                {
                    Ok(_) => {
                        tracing::info!(
                            vm = vm_id,
                            "an idle VM hibernates, because the host is full"
                        );
                        made = true;
                        break;
                    }
                    Err(error) => tracing::debug!(vm = vm_id, "it cannot give way: {error}"),
                }
            }
            if wanted.send(made).is_err() {
                tracing::debug!("whoever wanted room has gone");
            }
        }
    }

    async fn end_expired_sleepers(&self) {
        for record in self.ledger.sleepers(now_ms()) {
            let done = match record.options.auto_suspend {
                // From here on it is suspended as its owner wanted it at the end of its lifetime.
                true => {
                    self.ledger
                        .change(&record.vm_id, |record| record.hibernated = false);
                    Ok(())
                }
                false => {
                    let ended = self.delete(&record.owner(), &record.vm_id).await;
                    ended.map(drop)
                }
            };
            if let Err(error) = done {
                tracing::warn!(
                    vm = record.vm_id,
                    "a hibernated VM outlives its lifetime: {error}"
                );
            }
        }
    }
}

impl super::VmRecord {
    /// Whether it hibernates and its lifetime has passed.
    pub(super) fn sleeps_beyond(&self, now_ms: i64) -> bool {
        self.status == Status::Suspended
            && self.hibernated
            && self.expires_ms.is_some_and(|at| at <= now_ms)
    }
}
