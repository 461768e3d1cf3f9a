//! What is measured about sessions and the pool.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// From 50 us, a warm command's order, to 100 s.
const BUCKETS: [f64; 16] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0,
    10.0, 60.0, 600.0,
];

/// A part of a command's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Phase {
    /// Waiting for its turn.
    Queue,
    /// Getting a restored VM.
    Claim,
    /// Giving the VM its identity.
    Renew,
    /// Running in the guest.
    Exec,
    /// Restoring a VM, for the pool or on the spot.
    Restore,
}

/// Something that works, but not as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Degradation {
    /// A session found the pool empty.
    PoolEmpty,
    /// A VM could not be restored.
    RestoreFailed,
    /// A VM did not confirm its new identity and was ended.
    RenewFailed,
    /// A parked VM died.
    ParkedDied,
    /// A session's VM died by itself.
    VmDied,
    /// A command overran its deadline.
    TimedOut,
    /// A VM had to be ended because a command did not.
    VmUnstoppable,
    /// Output was thrown away.
    Truncated,
    /// A session, plan, host or memory limit refused somebody.
    Refused,
    /// A session's row could not be written.
    StoreFailed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: Phase,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: Degradation,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Metrics {
    queue: Histogram,
    claim: Histogram,
    renew: Histogram,
    exec: Histogram,
    restore: Histogram,
    degradations: Family<KindLabel, Counter>,
    /// VMs parked in the pool.
    pub(crate) parked: Gauge,
    /// VMs that sessions have.
    pub(crate) vms: Gauge,
    /// Sessions known.
    pub(crate) sessions: Gauge,
    /// Commands that run.
    pub(crate) running: Gauge,
    /// VMs being ended.
    pub(crate) reaping: Gauge,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("session");
        let phases =
            Family::<PhaseLabel, Histogram>::new_with_constructor(|| Histogram::new(BUCKETS));
        let of = |phase| phases.get_or_create(&PhaseLabel { phase }).clone();
        // Looked up once: a family's look-up takes a lock.
        let metrics = Self {
            queue: of(Phase::Queue),
            claim: of(Phase::Claim),
            renew: of(Phase::Renew),
            exec: of(Phase::Exec),
            restore: of(Phase::Restore),
            degradations: Family::default(),
            parked: Gauge::default(),
            vms: Gauge::default(),
            sessions: Gauge::default(),
            running: Gauge::default(),
            reaping: Gauge::default(),
        };
        registry.register_with_unit(
            "phase",
            "Time of each phase of a command",
            Unit::Seconds,
            phases,
        );
        registry.register(
            "degradations",
            "Things that went otherwise than they should",
            metrics.degradations.clone(),
        );
        let gauges = [
            ("pool_parked", "VMs restored and waiting", &metrics.parked),
            ("vms", "VMs that sessions have", &metrics.vms),
            ("known", "Sessions known", &metrics.sessions),
            ("running", "Commands that run", &metrics.running),
            ("reaping", "VMs being ended", &metrics.reaping),
        ];
        for (name, help, gauge) in gauges {
            registry.register(name, help, gauge.clone());
        }
        metrics
    }

    pub(crate) fn phase(&self, phase: Phase, took: std::time::Duration) {
        let histogram = match phase {
            Phase::Queue => &self.queue,
            Phase::Claim => &self.claim,
            Phase::Renew => &self.renew,
            Phase::Exec => &self.exec,
            Phase::Restore => &self.restore,
        };
        histogram.observe(took.as_secs_f64());
    }

    pub(crate) fn degraded(&self, kind: Degradation) {
        self.degradations.get_or_create(&KindLabel { kind }).inc();
    }

    #[cfg(test)]
    pub(crate) fn degradations(&self, kind: Degradation) -> u64 {
        self.degradations.get_or_create(&KindLabel { kind }).get()
    }
}
