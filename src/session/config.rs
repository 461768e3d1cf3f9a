//! Every key of the `[session]` section and its `[session.pool]` table.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::vm::Shape;
use thaw_vmm::machine::MachineKind;

/// How sessions behave. The defaults fit a host with 2 cores and 4 GiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SessionConfig {
    /// Most VMs that sessions of all tenants may have at once, being closed included. Parked
    /// VMs of the pool come on top.
    pub max_vms: u32,
    /// Memory (MiB, `MemAvailable`) that must stay free: below it no further VM starts.
    pub memory_floor_mib: u64,
    /// Memory (MiB) that a VM just started is expected to need beyond its template, until the
    /// kernel's own figure shows it.
    pub memory_per_vm_mib: u64,
    /// Guest memory sizes (MiB) that templates exist for. A session gets the next size up from
    /// what it asked for. Sizes that the image cannot run in are left out.
    pub sizes_mib: Vec<u32>,
    /// Most vCPUs a VM gets; a session that asks for more gets this many, each of more weight. 0: what its machine is
    /// good for ([`Self::fit_machine`]).
    pub max_vcpus: u32,
    /// Most commands that may wait in one session behind the one that runs.
    pub max_waiting: usize,
    /// Most sessions one tenant may have. At the limit the ones longest unused, without a running VM, are
    /// forgotten first.
    pub max_sessions_per_tenant: usize,
    /// A session unused and without a VM for this many seconds is forgotten.
    pub forget_after_s: u64,
    /// Bytes of each of a command's two outputs that are kept; what comes later is counted.
    pub output_bytes: usize,
    /// Bytes of output of all running commands together that are kept.
    pub output_total_bytes: usize,
    /// Milliseconds after a command's deadline at which the host interrupts it itself, because
    /// the agent, whose deadline it was, has not. A synchronous caller is answered then.
    pub interrupt_after_ms: u64,
    /// Milliseconds after its interrupt at which a command's processes are killed.
    pub kill_after_ms: u64,
    /// Milliseconds after that at which the VM is ended, because nothing else has helped.
    pub end_after_ms: u64,
    /// Longest wait in milliseconds for a VM to be had, building its template not included.
    pub claim_wait_ms: u64,
    /// Longest wait in milliseconds for a restored VM to confirm its new identity.
    pub renew_wait_ms: u64,
    /// VMs that are ended at the same time; more wait. Ending costs processor time (unmapping).
    pub reaper_concurrency: usize,
    /// The pool.
    pub pool: PoolConfig,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            max_vms: 256,
            memory_floor_mib: 256,
            memory_per_vm_mib: 16,
            sizes_mib: vec![256, 512, 1024, 2048, 4096, 8192],
            max_vcpus: 0,
            max_waiting: 64,
            max_sessions_per_tenant: 10_000,
            forget_after_s: 7 * 24 * 3600,
            output_bytes: 8 << 20,
            output_total_bytes: 256 << 20,
            interrupt_after_ms: 150,
            kill_after_ms: 2_000,
            end_after_ms: 2_000,
            claim_wait_ms: 10_000,
            renew_wait_ms: 2_000,
            reaper_concurrency: 2,
            pool: PoolConfig::default(),
        }
    }
}

/// How many VMs are kept restored ahead of need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolConfig {
    /// Guest memory (MiB) of parked VMs; one of `sizes_mib`. Sessions of another size are
    /// restored when they need it.
    pub memory_mib: u32,
    /// vCPUs of parked VMs.
    pub vcpus: u32,
    /// With fewer parked than this, the pool refills at once.
    pub low: usize,
    /// Between `low` and this many, the pool refills while the host's cores are not all busy
    /// with commands. 0 turns the pool off.
    pub high: usize,
    /// Take a restored VM through a renewal and an empty command before it is parked, so that what
    /// those touch is mapped when a session takes it: a fraction of the time to its first result, for about a MiB
    /// and a few milliseconds of processor time in advance. The session's own renewal still comes.
    pub rehearse: bool,
    /// VMs that are restored at the same time.
    pub restore_concurrency: usize,
    /// First pause in milliseconds after a failed restore; doubles with each further failure.
    pub backoff_ms: u64,
    /// Longest pause in milliseconds between tries.
    pub backoff_max_ms: u64,
    /// Failures in a row after which sessions are refused at once, with the reason, until a
    /// try in the background succeeds.
    pub breaker_failures: u32,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            memory_mib: 512,
            vcpus: 1,
            low: 4,
            high: 8,
            rehearse: true,
            restore_concurrency: 2,
            backoff_ms: 100,
            backoff_max_ms: 30_000,
            breaker_failures: 3,
        }
    }
}

impl SessionConfig {
    /// Says what is wrong with the values, if anything.
    ///
    /// # Errors
    /// One sentence that names the key.
    pub fn check(&self) -> Result<(), String> {
        let at_least_one = [
            ("max_vms", self.max_vms as usize),
            ("max_sessions_per_tenant", self.max_sessions_per_tenant),
            ("reaper_concurrency", self.reaper_concurrency),
            ("pool.restore_concurrency", self.pool.restore_concurrency),
            ("pool.vcpus", self.pool.vcpus as usize),
            ("pool.breaker_failures", self.pool.breaker_failures as usize),
            ("sizes_mib", self.sizes_mib.len()),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return Err(format!("session.{key} must not be zero or empty"));
        }
        if self.pool.low > self.pool.high {
            return Err("session.pool.low is above session.pool.high".into());
        }
        if !self.sizes_mib.contains(&self.pool.memory_mib) {
            return Err(format!(
                "session.pool.memory_mib ({}) is not in session.sizes_mib",
                self.pool.memory_mib
            ));
        }
        Ok(())
    }

    /// Takes out sizes that an image cannot run in, so that what is told of a VM is what it has.
    pub fn fit(&mut self, least_mib: u32) {
        self.sizes_mib.retain(|size| *size >= least_mib);
        if self.sizes_mib.is_empty() {
            self.sizes_mib.push(least_mib);
        }
        self.pool.memory_mib = self.shape(self.pool.memory_mib, 1).memory_mib;
    }

    /// Settles how many vCPUs VMs get at most, on a machine of this kind and a host with so many processors.
    ///
    /// On `hvm`, unless the configuration says otherwise, as many as the host has. On `pv` one: there, guest kernels
    /// hold locks in code that the host may stop anywhere, so that two vCPUs without two free cores wait for each
    /// other for milliseconds. More must be asked for.
    ///
    /// # Errors
    /// More than the machine can have; the message says so.
    pub fn fit_machine(&mut self, machine: MachineKind, processors: u32) -> Result<(), String> {
        let most = machine.max_vcpus();
        if self.max_vcpus == 0 {
            self.max_vcpus = match machine {
                MachineKind::Pv => 1,
                MachineKind::Hvm => processors.clamp(1, most),
            };
        }
        let wanted = self.max_vcpus.max(self.pool.vcpus);
        if wanted > most {
            return Err(format!(
                "session.max_vcpus or session.pool.vcpus is {wanted}: on the {} machine a VM has up to {most}",
                machine.name()
            ));
        }
        Ok(())
    }

    /// The shape of VM that serves a session which asked for this.
    pub fn shape(&self, memory_mib: u32, vcpus: u32) -> Shape {
        let fits = self.sizes_mib.iter().copied().filter(|s| *s >= memory_mib);
        let largest = self.sizes_mib.iter().copied().max().unwrap_or(memory_mib);
        Shape {
            memory_mib: fits.min().unwrap_or(largest),
            vcpus: vcpus.clamp(1, self.max_vcpus.max(1)),
        }
    }

    /// The shape of parked VMs.
    pub fn pool_shape(&self) -> Shape {
        Shape {
            memory_mib: self.pool.memory_mib,
            vcpus: self.pool.vcpus,
        }
    }

    pub(crate) fn claim_wait(&self) -> Duration {
        Duration::from_millis(self.claim_wait_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_sound_and_an_empty_table_is_the_defaults() {
        SessionConfig::default().check().unwrap();
        let empty: SessionConfig = toml::from_str("").unwrap();
        assert_eq!(empty, SessionConfig::default());
    }

    #[test]
    fn the_next_size_up_is_used_and_the_largest_when_there_is_none() {
        let config = SessionConfig::default();
        let memory = |asked| config.shape(asked, 2).memory_mib;
        assert_eq!([memory(128), memory(257), memory(513)], [256, 512, 1024]);
        assert_eq!(
            config.shape(9000, 8),
            Shape {
                memory_mib: 8192,
                vcpus: 1
            }
        );
    }

    #[test]
    fn a_machine_says_how_many_vcpus_there_are() {
        let fit = |max_vcpus, machine, processors| {
            let mut config = SessionConfig {
                max_vcpus,
                ..SessionConfig::default()
            };
            config.fit_machine(machine, processors)?;
            Ok::<u32, String>(config.shape(512, 8).vcpus)
        };
        assert_eq!(fit(0, MachineKind::Hvm, 4), Ok(4));
        assert_eq!(fit(0, MachineKind::Hvm, 64), Ok(8));
        assert_eq!(fit(2, MachineKind::Hvm, 1), Ok(2));
        assert_eq!(fit(0, MachineKind::Pv, 64), Ok(1));
        assert_eq!(fit(2, MachineKind::Pv, 64), Ok(2));
        let refused = fit(9, MachineKind::Pv, 64).unwrap_err();
        assert!(
            refused.contains("pv machine") && refused.contains("up to 8"),
            "{refused}"
        );
    }

    #[test]
    fn a_nonsensical_value_is_named() {
        let mut config = SessionConfig::default();
        config.pool.low = 9;
        assert!(config.check().unwrap_err().contains("pool.low"));
    }
}
