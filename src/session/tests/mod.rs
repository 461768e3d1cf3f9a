//! Sessions on fake VMs, on tokio's paused clock where time matters.

mod chaos;
mod commands;
pub(crate) mod fake;
mod lives;
mod pooling;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;

use super::*;
use fake::Source;

pub(super) const PLAN: PlanLimits = PlanLimits { max_vms: 1000 };

pub(super) fn tenant() -> TenantId {
    TenantId("tenant".into())
}

pub(super) fn spec() -> SessionSpec {
    SessionSpec {
        lifetime: Duration::from_secs(300),
        memory_mib: 512,
        vcpus: 2,
        metadata: BTreeMap::new(),
        env: BTreeMap::new(),
    }
}

/// No pool: every start of a VM is a session's doing.
pub(crate) fn unpooled() -> SessionConfig {
    let mut config = SessionConfig::default();
    config.pool.low = 0;
    config.pool.high = 0;
    config.pool.rehearse = false;
    config.memory_floor_mib = 0;
    config
}

pub(super) fn pooled(low: usize, high: usize) -> SessionConfig {
    let mut config = unpooled();
    config.pool.low = low;
    config.pool.high = high;
    config
}

pub(super) async fn start(config: SessionConfig) -> (Sessions, Arc<Source>) {
    let source = Arc::new(Source::default());
    let mut metrics = Registry::default();
    let sessions = Sessions::with_source(config, Arc::new(NoRows), source.clone(), &mut metrics);
    (sessions.await.unwrap(), source)
}

pub(super) fn command(code: &str) -> Command {
    Command {
        context: None,
        live: false,
        language: Language::Python,
        code: code.into(),
        timeout: Duration::from_secs(60),
        answer_within: None,
    }
}

impl Sessions {
    pub(super) async fn make(&self) -> SessionId {
        self.create(&tenant(), PLAN, spec()).await.unwrap()
    }

    pub(super) async fn try_say(
        &self,
        id: &SessionId,
        command: Command,
    ) -> Result<Outcome, SessionError> {
        self.execute(&tenant(), PLAN, id, command, Attached::default())
            .await
    }

    pub(crate) async fn say_as(
        &self,
        tenant: &TenantId,
        id: &SessionId,
        code: &str,
    ) -> Result<Outcome, SessionError> {
        self.execute(tenant, PLAN, id, command(code), Attached::default())
            .await
    }

    pub(super) async fn say(&self, id: &SessionId, code: &str) -> Outcome {
        self.try_say(id, command(code)).await.unwrap()
    }

    /// Begins a command in its own task, accepted before this returns.
    pub(super) fn begin(
        &self,
        id: &SessionId,
        command: Command,
    ) -> tokio::task::JoinHandle<Result<Outcome, SessionError>> {
        let accepted = self.accept(&tenant(), id).unwrap();
        let sessions = self.clone();
        tokio::spawn(async move {
            sessions
                .run(accepted, PLAN, command, Attached::default())
                .await
        })
    }
}

pub(super) async fn sleep_ms(ms: u64) {
    tokio::time::sleep(Duration::from_millis(ms)).await;
}
