//! Who may have another VM: the tenant's plan, the host's count, the host's memory.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::config::SessionConfig;
use super::line::lock;
use super::types::{PlanLimits, SessionError, TenantId};

/// How long a full host is given to finish closing VMs before a newcomer is refused.
const CLOSING_WAIT: Duration = Duration::from_secs(1);

/// How old a reading of the host's memory may be. Reading costs some 30 us.
const MEMORY_READING_AGE: Duration = Duration::from_millis(200);

/// Reads the host's available memory in MiB; `None` if the host does not say.
pub(crate) type MemoryGauge = fn() -> Option<u64>;

/// `MemAvailable` of `/proc/meminfo`.
pub(crate) fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib / 1024)
}

/// All limits on VMs.
#[derive(Debug)]
pub(crate) struct Limits {
    tenants: Arc<Mutex<HashMap<TenantId, u32>>>,
    host: Arc<Semaphore>,
    max_vms: u32,
    closing: Arc<AtomicUsize>,
    memory: Mutex<Memory>,
}

#[derive(Debug)]
struct Memory {
    gauge: MemoryGauge,
    floor_mib: u64,
    per_vm_mib: u64,
    read_at: Option<Instant>,
    available_mib: u64,
}

impl Limits {
    pub(crate) fn new(config: &SessionConfig, gauge: MemoryGauge) -> Self {
        Self {
            tenants: Arc::default(),
            host: Arc::new(Semaphore::new(config.max_vms as usize)),
            max_vms: config.max_vms,
            closing: Arc::default(),
            memory: Mutex::new(Memory {
                gauge,
                floor_mib: config.memory_floor_mib,
                per_vm_mib: config.memory_per_vm_mib,
                read_at: None,
                available_mib: 0,
            }),
        }
    }

    /// Admits one more VM of this tenant. The plan is asked first, so that a full host does not hide it.
    pub(crate) async fn admit(
        &self,
        tenant: &TenantId,
        plan: PlanLimits,
    ) -> Result<(PlanPermit, HostPermit), SessionError> {
        let plan = self.plan_permit(tenant, plan)?;
        let host = self.host_permit().await?;
        self.admit_memory()?;
        Ok((plan, host))
    }

    /// VMs that this tenant has.
    #[cfg(test)]
    pub(crate) fn held(&self, tenant: &TenantId) -> u32 {
        lock(&self.tenants).get(tenant).copied().unwrap_or(0)
    }

    fn plan_permit(&self, tenant: &TenantId, plan: PlanLimits) -> Result<PlanPermit, SessionError> {
        let mut tenants = lock(&self.tenants);
        let held = tenants.entry(tenant.clone()).or_insert(0);
        if *held >= plan.max_vms {
            if *held == 0 {
                tenants.remove(tenant);
            }
            return Err(SessionError::PlanFull {
                limit: plan.max_vms,
            });
        }
        *held += 1;
        Ok(PlanPermit {
            tenants: self.tenants.clone(),
            tenant: tenant.clone(),
        })
    }

    async fn host_permit(&self) -> Result<HostPermit, SessionError> {
        let full = SessionError::HostFull {
            limit: self.max_vms,
        };
        let permit = match self.host.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) if self.closing.load(Ordering::Relaxed) == 0 => return Err(full),
            Err(_) => {
                let acquired = self.host.clone().acquire_owned();
                match tokio::time::timeout(CLOSING_WAIT, acquired).await {
                    Ok(Ok(permit)) => permit,
                    _ => return Err(full),
                }
            }
        };
        Ok(HostPermit {
            _permit: permit,
            closing: self.closing.clone(),
            is_closing: false,
        })
    }

    /// The next one is admitted by what the host says then, not by an earlier reading.
    pub(crate) fn read_memory_anew(&self) {
        lock(&self.memory).read_at = None;
    }

    fn admit_memory(&self) -> Result<(), SessionError> {
        let mut memory = lock(&self.memory);
        let now = Instant::now();
        if memory
            .read_at
            .is_none_or(|at| now.duration_since(at) > MEMORY_READING_AGE)
        {
            // A host that does not say is not held against its tenants.
            memory.available_mib = (memory.gauge)().unwrap_or(u64::MAX);
            memory.read_at = Some(now);
        }
        let after = memory.available_mib.saturating_sub(memory.per_vm_mib);
        if after < memory.floor_mib {
            return Err(SessionError::NoMemory);
        }
        memory.available_mib = after;
        Ok(())
    }
}

/// One VM's place in its tenant's plan, given back by dropping it.
#[derive(Debug)]
pub(crate) struct PlanPermit {
    tenants: Arc<Mutex<HashMap<TenantId, u32>>>,
    tenant: TenantId,
}

impl Drop for PlanPermit {
    fn drop(&mut self) {
        let mut tenants = lock(&self.tenants);
        if let Some(held) = tenants.get_mut(&self.tenant) {
            *held = held.saturating_sub(1);
            if *held == 0 {
                tenants.remove(&self.tenant);
            }
        }
    }
}

/// One VM's place on the host: kept until its process is gone.
#[derive(Debug)]
pub(crate) struct HostPermit {
    _permit: OwnedSemaphorePermit,
    closing: Arc<AtomicUsize>,
    is_closing: bool,
}

impl HostPermit {
    /// Says that the place will be free soon.
    pub(crate) fn closing(mut self) -> Self {
        if !self.is_closing {
            self.is_closing = true;
            self.closing.fetch_add(1, Ordering::Relaxed);
        }
        self
    }
}

impl Drop for HostPermit {
    fn drop(&mut self) {
        if self.is_closing {
            self.closing.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(max_vms: u32, gauge: MemoryGauge) -> Limits {
        let config = SessionConfig {
            max_vms,
            ..SessionConfig::default()
        };
        Limits::new(&config, gauge)
    }

    fn tenant(name: &str) -> TenantId {
        TenantId(name.into())
    }

    #[tokio::test]
    async fn a_plan_is_counted_exactly_and_by_tenant() {
        let limits = limits(10, || Some(100_000));
        let plan = PlanLimits { max_vms: 2 };
        let first = limits.admit(&tenant("a"), plan).await.unwrap();
        let _second = limits.admit(&tenant("a"), plan).await.unwrap();
        let refused = limits.admit(&tenant("a"), plan).await.unwrap_err();
        assert!(matches!(refused, SessionError::PlanFull { limit: 2 }));
        let _other = limits.admit(&tenant("b"), plan).await.unwrap();
        drop(first);
        assert_eq!(limits.held(&tenant("a")), 1);
        let _third = limits.admit(&tenant("a"), plan).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_host_refuses_at_once_but_waits_for_a_vm_being_closed() {
        let limits = limits(1, || Some(100_000));
        let plan = PlanLimits { max_vms: 9 };
        let (_, host) = limits.admit(&tenant("a"), plan).await.unwrap();
        let refused = limits.admit(&tenant("b"), plan).await.unwrap_err();
        assert!(matches!(refused, SessionError::HostFull { limit: 1 }));
        assert_eq!(limits.held(&tenant("b")), 0);
        let host = host.closing();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            drop(host);
        });
        limits.admit(&tenant("b"), plan).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn scarce_memory_refuses_and_a_burst_is_charged_before_the_kernel_shows_it() {
        // 300 MiB free, 256 to keep, 16 for each: two fit.
        let limits = limits(10, || Some(300));
        let plan = PlanLimits { max_vms: 9 };
        let _a = limits.admit(&tenant("a"), plan).await.unwrap();
        let _b = limits.admit(&tenant("a"), plan).await.unwrap();
        let refused = limits.admit(&tenant("a"), plan).await.unwrap_err();
        assert!(matches!(refused, SessionError::NoMemory));
        tokio::time::advance(Duration::from_secs(1)).await;
        limits.admit(&tenant("a"), plan).await.unwrap();
    }
}
