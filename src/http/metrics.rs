//! The front end's metrics, registered under `http`.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Served {
    pub(super) route: &'static str,
    pub(super) status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Route {
    pub(super) route: &'static str,
}

/// What is counted.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) requests: Family<Served, Counter>,
    pub(super) seconds: Family<Route, Histogram, fn() -> Histogram>,
    pub(super) in_flight: Gauge,
    pub(super) connections: Gauge,
    pub(super) refused: Counter,
    pub(super) rate_limited: Counter,
    pub(super) cut: Counter,
}

/// From a warm command (half a millisecond) to the longest time-out (600 s).
fn histogram() -> Histogram {
    Histogram::new([
        0.000_25, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
        60.0, 600.0,
    ])
}

impl Metrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(histogram),
            in_flight: Gauge::default(),
            connections: Gauge::default(),
            refused: Counter::default(),
            rate_limited: Counter::default(),
            cut: Counter::default(),
        };
        let registry = registry.sub_registry_with_prefix("http");
        let served = "Requests answered, by route and status";
        registry.register("requests", served, metrics.requests.clone());
        let seconds = "Time from a request's head to its answer";
        registry.register("request_seconds", seconds, metrics.seconds.clone());
        let in_flight = "Requests being answered";
        registry.register("in_flight", in_flight, metrics.in_flight.clone());
        let connections = "Open connections";
        registry.register("connections", connections, metrics.connections.clone());
        let refused = "Requests without valid credentials";
        registry.register("refused", refused, metrics.refused.clone());
        let limited = "Requests beyond their plan's rate";
        registry.register("rate_limited", limited, metrics.rate_limited.clone());
        let cut = "Connections ended because their peer was too slow or broke the protocol";
        registry.register("connections_cut", cut, metrics.cut.clone());
        metrics
    }
}
