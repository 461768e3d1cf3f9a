//! The host that a figure was measured on.

use serde_json::{Value, json};

/// What of a host decides the figures.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Processor model and number of CPUs.
    pub cpu: String,
    /// CPUs this process may use.
    pub cpus: usize,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// thaw's version.
    pub thaw: String,
}

impl Facts {
    /// Reads them.
    ///
    /// # Errors
    /// `/proc` does not say: a figure without its host is not a figure.
    pub fn read() -> anyhow::Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")?;
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let field = |text: &str, key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key))
                .and_then(|rest| rest.trim_start().strip_prefix(':'))
                .map(|value| value.trim().to_owned())
        };
        let memory_kib: u64 = field(&meminfo, "MemTotal")
            .and_then(|value| value.split(' ').next()?.parse().ok())
            .ok_or_else(|| anyhow::anyhow!("/proc/meminfo has no MemTotal"))?;
        Ok(Self {
            cpu: field(&cpuinfo, "model name").unwrap_or_else(|| "unknown CPU".to_owned()),
            cpus: std::thread::available_parallelism()?.get(),
            memory_mib: memory_kib / 1024,
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            thaw: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    /// As one JSON object.
    pub fn json(&self) -> Value {
        json!({
            "cpu": self.cpu, "cpus": self.cpus, "memory_mib": self.memory_mib,
            "kernel": self.kernel, "thaw": self.thaw,
        })
    }

    /// As one line of text.
    pub fn line(&self) -> String {
        format!(
            "host: {} x {}, {} MiB, Linux {}, thaw {}",
            self.cpus, self.cpu, self.memory_mib, self.kernel, self.thaw
        )
    }
}
