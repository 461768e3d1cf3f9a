//! A template that cannot be restored is not tried in a hot loop.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use super::config::PoolConfig;
use super::line::lock;

/// Counts failures in a row, spaces out tries, and refuses callers while it is open.
#[derive(Debug)]
pub(crate) struct Breaker {
    first: Duration,
    longest: Duration,
    opens_at: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    last_error: String,
    retry_at: Option<Instant>,
}

impl Breaker {
    pub(crate) fn new(config: &PoolConfig) -> Self {
        Self {
            first: Duration::from_millis(config.backoff_ms),
            longest: Duration::from_millis(config.backoff_max_ms),
            opens_at: config.breaker_failures,
            state: Mutex::default(),
        }
    }

    /// Whether a caller may try now.
    ///
    /// # Errors
    /// Why not: too many tries have failed.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let state = lock(&self.state);
        let Some(retry_at) = state.retry_at else {
            return Ok(());
        };
        let wait = retry_at.saturating_duration_since(Instant::now());
        if state.failures < self.opens_at || wait.is_zero() {
            return Ok(());
        }
        anyhow::bail!(
            "the last {} restores failed, next try in {} ms; the last error was: {}",
            state.failures,
            wait.as_millis(),
            state.last_error
        )
    }

    /// When the background may try again.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        lock(&self.state).retry_at
    }

    pub(crate) fn succeeded(&self) {
        let mut state = lock(&self.state);
        if state.failures >= self.opens_at {
            tracing::info!(failures = state.failures, "VMs can be restored again");
        }
        *state = State::default();
    }

    pub(crate) fn failed(&self, error: &str) {
        let mut state = lock(&self.state);
        let doublings = state.failures.min(16);
        state.failures = state.failures.saturating_add(1);
        let pause = (self.first * (1 << doublings)).min(self.longest);
        state.retry_at = Some(Instant::now() + pause);
        state.last_error = error.to_owned();
        tracing::warn!(
            failures = state.failures,
            pause_ms = pause.as_millis() as u64,
            error,
            "a VM could not be restored"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_lets_one_try_pass_and_closes_on_success() {
        let breaker = Breaker::new(&PoolConfig::default());
        breaker.failed("no kvm");
        breaker.failed("no kvm");
        breaker.check().unwrap();
        breaker.failed("no kvm");
        let reason = breaker.check().unwrap_err().to_string();
        assert!(reason.contains("3 restores failed"), "{reason}");
        assert!(reason.contains("no kvm"), "{reason}");
        tokio::time::advance(Duration::from_millis(401)).await;
        breaker.check().unwrap();
        breaker.succeeded();
        assert_eq!(breaker.retry_at(), None);
    }
}
