//! A set of timed runs and what is reported of it.

use std::time::Duration;

use serde_json::{Value, json};

/// Times of one thing, done again and again.
#[derive(Clone, Debug)]
pub struct Samples {
    name: String,
    micros: Vec<u64>,
}

impl Samples {
    /// An empty set. The name goes into the report.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            micros: Vec::new(),
        }
    }

    /// Adds one run.
    pub fn add(&mut self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let place = self.micros.partition_point(|&other| other <= micros);
        self.micros.insert(place, micros);
    }

    /// How many runs there are.
    pub fn len(&self) -> usize {
        self.micros.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.micros.is_empty()
    }

    /// The smallest sample that at least `percent` of all are not above (nearest rank), in
    /// microseconds.
    ///
    /// # Errors
    /// There is no sample: a benchmark that measured nothing must not print a number.
    pub fn percentile(&self, percent: usize) -> anyhow::Result<u64> {
        let rank = (self.micros.len() * percent).div_ceil(100).max(1);
        self.micros
            .get(rank - 1)
            .copied()
            .ok_or_else(|| anyhow::anyhow!("{}: nothing was measured", self.name))
    }

    /// The result as one JSON object: `name`, `n`, `p50_us`, `p99_us`, `max_us`.
    ///
    /// # Errors
    /// As [`Self::percentile`].
    pub fn json(&self) -> anyhow::Result<Value> {
        Ok(json!({
            "name": self.name,
            "n": self.len(),
            "p50_us": self.percentile(50)?,
            "p99_us": self.percentile(99)?,
            "max_us": self.percentile(100)?,
        }))
    }

    /// The result as one line of text, in milliseconds.
    ///
    /// # Errors
    /// As [`Self::percentile`].
    pub fn line(&self) -> anyhow::Result<String> {
        let ms = |percent| {
            self.percentile(percent)
                .map(|micros| micros as f64 / 1000.0)
        };
        Ok(format!(
            "{:<44} N={:<5} p50 {:>8.3} ms   p99 {:>8.3} ms   max {:>8.3} ms",
            self.name,
            self.len(),
            ms(50)?,
            ms(99)?,
            ms(100)?
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank_whatever_the_order_of_arrival() {
        let mut samples = Samples::new("x");
        for n in (1..=200).rev() {
            samples.add(Duration::from_micros(n));
        }
        assert_eq!(samples.percentile(50).unwrap(), 100);
        assert_eq!(samples.percentile(99).unwrap(), 198);
        assert_eq!(samples.percentile(100).unwrap(), 200);
    }

    #[test]
    fn one_sample_is_every_percentile() {
        let mut samples = Samples::new("x");
        samples.add(Duration::from_micros(7));
        assert_eq!(samples.json().unwrap()["p99_us"], 7);
    }

    #[test]
    fn nothing_measured_is_an_error() {
        assert!(Samples::new("x").line().is_err());
    }
}
