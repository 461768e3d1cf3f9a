//! What of the host's processor a frozen VM depends on.

use std::collections::BTreeSet;

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// A processor, as the guest saw it when it was frozen: libraries in the guest have chosen their
/// code by its features and go on using it after a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Vendor, `AuthenticAMD` for instance.
    pub vendor: String,
    /// Name, for people.
    pub model: String,
    /// Feature flags, by the names of `/proc/cpuinfo`.
    pub flags: BTreeSet<String>,
}

impl Cpu {
    /// This host's.
    ///
    /// # Errors
    /// `/proc/cpuinfo` cannot be read.
    pub fn host() -> anyhow::Result<Self> {
        let text = std::fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let field = |name: &str| {
            text.lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(label, _)| label.trim() == name)
                .map(|(_, value)| value.trim().to_owned())
                .unwrap_or_default()
        };
        Self {
            vendor: field("vendor_id"),
            model: field("model name"),
            flags: field("flags")
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
        }
    }

    /// Features that this one has and `host` lacks, or another vendor: why a VM frozen here cannot run there.
    pub fn missing_on(&self, host: &Self) -> Option<String> {
        if self.vendor != host.vendor {
            return Some(format!("a processor by {}", self.vendor));
        }
        let missing: Vec<&str> = self
            .flags
            .difference(&host.flags)
            .map(String::as_str)
            .collect();
        (!missing.is_empty()).then(|| format!("the processor features {}", missing.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_must_have_every_feature() {
        let text = "processor\t: 0\nvendor_id\t: V\nmodel name\t: M 1\nflags\t\t: a b c\n\nprocessor\t: 1\nflags\t: z\n";
        let cpu = Cpu::parse(text);
        assert_eq!(cpu.model, "M 1");
        assert_eq!(cpu.flags.len(), 3);
        let mut host = cpu.clone();
        host.flags.insert("more".into());
        assert_eq!(cpu.missing_on(&host), None);
        host.flags.remove("b");
        assert!(cpu.missing_on(&host).unwrap().contains('b'));
        host.vendor = "W".into();
        assert!(cpu.missing_on(&host).unwrap().contains('V'));
        assert!(!Cpu::host().unwrap().flags.is_empty());
    }
}
