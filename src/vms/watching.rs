//! What the sessions tell the ledger, and ask it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;

use super::ledger::Ledger;
use super::record::{MOST_ALIASES, Options, Status, VmRecord};
use crate::session::{
    Frozen, Next, Outcome, Parting, SessionError, Step, Vm, VmEnd, VmStarted, VmWatch,
};
use crate::snapshots::{Kind, SnapshotError};
use crate::store::now_ms;

impl VmWatch for Ledger {
    fn started(&self, vm: VmStarted) -> bool {
        let now = now_ms();
        let expires = vm.expires_at.duration_since(SystemTime::UNIX_EPOCH);
        let expires_ms = expires.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX));
        let (record, parked) = {
            let mut books = self.books();
            let before = vm.resumes.as_deref().and_then(|old| books.remove(old));
            let expected = books.records.get(&vm.vm_id).cloned();
            let options = before.as_ref().or(expected.as_ref());
            let options = options.map_or_else(Options::default, |record| record.options.clone());
            let mut aliases = before.as_ref().map_or_else(Vec::new, |old| {
                let mut aliases = old.aliases.clone();
                aliases.push(old.vm_id.clone());
                aliases
            });
            let beyond = aliases.len().saturating_sub(MOST_ALIASES);
            aliases.drain(..beyond);
            let origin = before.as_ref().or(expected.as_ref());
            let record = VmRecord {
                vm_id: vm.vm_id,
                tenant: vm.tenant.0,
                session_id: vm.session.to_string(),
                status: Status::Active,
                reason: None,
                memory_mib: vm.memory_mib,
                vcpus: vm.spec.vcpus,
                cores: vm.cores,
                lifetime_s: vm.spec.lifetime.as_secs(),
                created_ms: origin.map_or(now, |record| record.created_ms),
                started_ms: Some(now),
                expires_ms: Some(expires_ms),
                ended_ms: None,
                metadata: origin.map_or_else(
                    || vm.spec.metadata.clone(),
                    |record| record.metadata.clone(),
                ),
                snapshot_id: match origin {
                    Some(record) => record.snapshot_id.clone(),
                    None => vm.snapshot,
                },
                parked_in: None,
                hibernated: false,
                rewound: origin.and_then(|record| record.rewound.clone()),
                terminals: Vec::new(),
                options,
                aliases,
            };
            books.put(record.clone());
            (record, before)
        };
        match parked {
            Some(old) => {
                self.unpark(&old);
                self.tell(&record, "vm.resumed", false);
            }
            None => self.tell(&record, "vm.started", false),
        }
        record.options.lingers()
    }

    fn ended(&self, vm_id: &str, how: VmEnd) {
        let now = now_ms();
        let (status, reason, kind, by_itself) = match how {
            VmEnd::Killed => (Status::Terminated, None, "vm.terminated", false),
            VmEnd::Expired => {
                let reason = Some("its lifetime passed".to_owned());
                (Status::Terminated, reason, "vm.terminated", true)
            }
            VmEnd::Drained => {
                let reason = Some("the server shut down".to_owned());
                (Status::Terminated, reason, "vm.terminated", true)
            }
            VmEnd::Failed(reason) => (Status::Failed, Some(reason), "vm.failed", true),
            VmEnd::Suspended => (Status::Suspended, None, "vm.suspended", false),
        };
        let mut fresh = false;
        let record = self.change(vm_id, |record| {
            // Who suspended or ended it may have noted that already, and more may have happened since.
            fresh = matches!(record.status, Status::Creating | Status::Active);
            if fresh {
                record.close(status, reason, now);
            }
        });
        if let Some(record) = record.filter(|_| fresh) {
            self.tell(&record, kind, by_itself);
        }
    }

    fn expiring<'a>(
        &'a self,
        vm_id: &'a str,
        vm: &'a Arc<dyn Vm>,
        terminals: Vec<String>,
    ) -> BoxFuture<'a, Parting> {
        Box::pin(async move {
            let Some(record) = self.books().get(vm_id).cloned() else {
                return Parting::End;
            };
            if record.options.auto_suspend {
                let parked = self.freeze(&record, Kind::Suspended, None, vm.clone());
                match parked.await {
                    Ok(parked) => {
                        // Before the VM ends: a command that comes then must find this.
                        let suspended = self.change(vm_id, |record| {
                            record.parked_in = Some(parked.id);
                            record.terminals = terminals;
                            record.close(Status::Suspended, None, now_ms());
                        });
                        self.tell(&suspended.unwrap_or(record), "vm.suspended", true);
                        return Parting::Suspend;
                    }
                    Err(error) => {
                        tracing::warn!(vm = vm_id, "a VM is not suspended but ended: {error}");
                    }
                }
            }
            if record.options.snapshot_on_terminate {
                let name = record.options.snapshot_name.clone();
                if let Err(error) = self.freeze(&record, Kind::User, name, vm.clone()).await {
                    tracing::warn!(vm = vm_id, "no snapshot at the end of a lifetime: {error}");
                }
            }
            Parting::End
        })
    }

    fn before<'a>(&'a self, next: Next<'a>) -> Option<BoxFuture<'a, Option<Step>>> {
        let tape = self.tapes.of(next.session)?.tape;
        let record = self.books().get(next.vm_id).cloned()?;
        let vm = next.vm.clone();
        Some(Box::pin(self.before_step(tape, record, vm, next.command)))
    }

    fn after<'a>(&'a self, step: Step, outcome: &'a Outcome) -> BoxFuture<'a, ()> {
        Box::pin(self.after_step(step, outcome))
    }

    fn remaining(&self, vm_id: &str) -> Option<Duration> {
        let books = self.books();
        let record = books.get(vm_id).filter(|record| record.hibernated)?;
        let left = record.expires_ms?.saturating_sub(now_ms());
        Some(Duration::from_millis(u64::try_from(left).unwrap_or(0)))
    }

    fn is_suspended(&self, vm_id: &str) -> bool {
        let books = self.books();
        books
            .get(vm_id)
            .is_some_and(|record| record.status == Status::Suspended)
    }

    fn terminals(&self, vm_id: &str) -> Vec<String> {
        let record = self.books().get(vm_id).cloned();
        record.map(|record| record.terminals).unwrap_or_default()
    }

    fn wake<'a>(
        &'a self,
        vm_id: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<Frozen>>, SessionError>> {
        Box::pin(async move {
            let record = self.books().get(vm_id).cloned();
            let record = record.filter(|record| record.status == Status::Suspended);
            let Some(record) =
                record.filter(|record| record.options.auto_resume || record.hibernated)
            else {
                return Err(SessionError::Asleep(vm_id.to_owned()));
            };
            let parked = record.parked_in.clone().unwrap_or_default();
            let opened = self.snapshots.frozen(&record.owner(), &parked).await;
            match opened {
                Ok((frozen, _)) => Ok(Some(frozen)),
                // Nobody asked for it to sleep, so nobody need know why it does not wake: an upgrade, another image.
                Err(error @ SnapshotError::Unfit { .. }) if record.hibernated => {
                    tracing::warn!(vm = vm_id, "a hibernated VM is lost: {error}");
                    let reason = "it hibernated, and cannot be restored by this server";
                    let lost = self.change(vm_id, |record| {
                        record.close(Status::Failed, Some(reason.to_owned()), now_ms());
                    });
                    self.unpark(&record);
                    self.tell(&lost.unwrap_or(record), "vm.failed", true);
                    Ok(None)
                }
                Err(error) => Err(SessionError::Conflict(error.to_string())),
            }
        })
    }
}
