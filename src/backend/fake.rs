//! Sessions without VMs, for tests: a command's code says what becomes of it.
//!
//! `sleep N` takes N milliseconds, `drip N MS` writes N numbers MS milliseconds apart, `full` finds the host full once per session, anything else is
//! echoed. Every run is counted.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use tokio::sync::OwnedMutexGuard;

use super::*;
use crate::session::{Output, VmStatus};

/// What a session was made with, and its line with a count of refusals.
type Known = (SessionSpec, Arc<tokio::sync::Mutex<u32>>);

#[derive(Debug, Default)]
pub(crate) struct FakeSessions {
    pub(crate) runs: Arc<AtomicUsize>,
    known: Mutex<HashMap<(TenantId, SessionId), Known>>,
}

impl FakeSessions {
    pub(crate) fn sessions(&self) -> usize {
        self.known.lock().unwrap().len()
    }

    pub(crate) fn add(&self, tenant: &TenantId, id: &SessionId, spec: SessionSpec) {
        let key = (tenant.clone(), id.clone());
        self.known
            .lock()
            .unwrap()
            .insert(key, (spec, Arc::default()));
    }
}

pub(crate) fn spec() -> SessionSpec {
    SessionSpec {
        lifetime: Duration::from_secs(300),
        memory_mib: 512,
        vcpus: 1,
        metadata: Default::default(),
        env: Default::default(),
    }
}

impl Backend for FakeSessions {
    fn create<'a>(
        &'a self,
        tenant: &'a TenantId,
        _limits: PlanLimits,
        spec: SessionSpec,
    ) -> BoxFuture<'a, Result<SessionId, SessionError>> {
        let id = SessionId::mint();
        self.add(tenant, &id, spec);
        Box::pin(async { Ok(id) })
    }

    fn view(&self, tenant: &TenantId, id: &SessionId) -> Result<SessionView, SessionError> {
        let known = self.known.lock().unwrap();
        let found = known.get(&(tenant.clone(), id.clone()));
        let (spec, _) = found.ok_or_else(|| SessionError::NotFound(id.clone()))?;
        Ok(SessionView {
            id: id.clone(),
            created_at: SystemTime::UNIX_EPOCH,
            spec: spec.clone(),
            vm: Some(("vm-1".into(), VmStatus::Active)),
            uptime: Some(Duration::from_secs(2)),
            expires_in: Some(Duration::from_secs(298)),
        })
    }

    fn accept(&self, tenant: &TenantId, id: &SessionId) -> Result<Box<dyn Ticket>, SessionError> {
        let known = self.known.lock().unwrap();
        let found = known.get(&(tenant.clone(), id.clone()));
        let (_, line) = found.ok_or_else(|| SessionError::NotFound(id.clone()))?;
        let place = tokio::spawn(line.clone().lock_owned());
        Ok(Box::new(FakeTicket {
            place: Some(place),
            turn: None,
            runs: self.runs.clone(),
        }))
    }

    fn open<'a>(
        &'a self,
        _tenant: &'a TenantId,
        _limits: PlanLimits,
        id: &'a SessionId,
        _process: Process,
    ) -> BoxFuture<'a, Result<ProcessHandle, SessionError>> {
        Box::pin(async { Err(SessionError::NoVm(id.clone())) })
    }

    fn wake<'a>(
        &'a self,
        _tenant: &'a TenantId,
        _limits: PlanLimits,
        _id: &'a SessionId,
    ) -> BoxFuture<'a, Result<(), SessionError>> {
        Box::pin(async { Ok(()) })
    }

    fn kill<'a>(
        &'a self,
        tenant: &'a TenantId,
        id: &'a SessionId,
    ) -> BoxFuture<'a, Result<String, SessionError>> {
        Box::pin(async { self.view(tenant, id).map(|_| "vm-1".into()) })
    }
}

struct FakeTicket {
    place: Option<tokio::task::JoinHandle<OwnedMutexGuard<u32>>>,
    turn: Option<OwnedMutexGuard<u32>>,
    runs: Arc<AtomicUsize>,
}

impl Ticket for FakeTicket {
    fn ready(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            if let Some(place) = self.place.take() {
                self.turn = Some(place.await.unwrap());
            }
        })
    }

    fn run(
        mut self: Box<Self>,
        _limits: PlanLimits,
        command: Command,
        attached: Attached,
    ) -> BoxFuture<'static, Result<Outcome, SessionError>> {
        Box::pin(async move {
            self.ready().await;
            let turn = self.turn.as_mut().unwrap();
            if command.code == "full" && **turn == 0 {
                **turn += 1;
                return Err(SessionError::HostFull { limit: 1 });
            }
            if let Some(witness) = &attached.witness {
                witness.starts().await.map_err(SessionError::Unavailable)?;
            }
            self.runs.fetch_add(1, Ordering::SeqCst);
            if let Some(drip) = command.code.strip_prefix("drip ") {
                let (count, ms) = drip.split_once(' ').unwrap();
                for drop in 0..count.parse::<u64>().unwrap() {
                    tokio::time::sleep(Duration::from_millis(ms.parse().unwrap())).await;
                    if let Some(feed) = &attached.feed {
                        feed.push(Output::Stdout, &format!("{drop} "));
                    }
                }
            } else if let Some(feed) = attached.feed {
                feed.push(Output::Stdout, "so far");
            }
            if let Some(ms) = command.code.strip_prefix("sleep ") {
                tokio::time::sleep(Duration::from_millis(ms.trim().parse().unwrap())).await;
            }
            Ok(Outcome {
                stdout: command.code,
                cpu_time: Duration::from_millis(1),
                ..Outcome::default()
            })
        })
    }
}
