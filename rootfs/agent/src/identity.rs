//! Becoming a new individual after a restore: the part that the kernel plays.

use std::fs::{self, File};
use std::io::{self, Read};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use thaw_wire::message::Renew;

use crate::sys::device;

/// Why the VM cannot be an individual.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The order makes no sense.
    #[error("the order's {0} is malformed")]
    Malformed(&'static str),
    /// The system refused a step.
    #[error("{step}: {source}")]
    Step {
        /// Which step.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The generator gave the same bytes before and after.
    #[error("the kernel's random generator did not change")]
    NotReseeded,
}

/// Bytes from hexadecimal digits.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = (high << 4 | low) as u8;
    }
    Some(bytes)
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sample() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// What a renewal can prove.
#[derive(Debug)]
pub struct Proof {
    /// Wall clock after the step, nanoseconds since the Unix epoch.
    pub wall_ns: u64,
    /// What the reseeded generator gave, hexadecimal.
    pub sample: String,
}

/// Carries out the kernel's part of a renewal.
///
/// # Errors
/// Any step that did not take effect; the VM must not serve then.
pub fn renew(order: &Renew) -> Result<Proof, RenewError> {
    let seed = from_hex::<32>(&order.seed).ok_or(RenewError::Malformed("seed"))?;
    from_hex::<16>(&order.machine_id).ok_or(RenewError::Malformed("machine_id"))?;
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if order.hostname.is_empty()
        || order.hostname.len() > 63
        || !order.hostname.bytes().all(allowed)
    {
        return Err(RenewError::Malformed("hostname"));
    }
    let step = |step| move |source| RenewError::Step { step, source };

    let before = sample().map_err(step("/dev/urandom"))?;
    let random = File::options().write(true).open("/dev/urandom");
    let random = random.map_err(step("/dev/urandom"))?;
    device::reseed_kernel(&random, &seed).map_err(step("reseeding the kernel"))?;
    let sample = sample().map_err(step("/dev/urandom"))?;
    if sample == before {
        return Err(RenewError::NotReseeded);
    }

    let seconds = (order.wall_ns / 1_000_000_000) as i64;
    let nanoseconds = (order.wall_ns % 1_000_000_000) as i64;
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, nanoseconds))
        .map_err(|error| step("setting the clock")(error.into()))?;

    nix::unistd::sethostname(&order.hostname)
        .map_err(|error| step("setting the host name")(error.into()))?;
    fs::write("/etc/hostname", format!("{}\n", order.hostname)).map_err(step("/etc/hostname"))?;
    fs::write("/etc/machine-id", format!("{}\n", order.machine_id))
        .map_err(step("/etc/machine-id"))?;

    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Proof {
        wall_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        sample: to_hex(&sample),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_is_read_strictly() {
        assert_eq!(from_hex::<2>("00fF"), Some([0, 255]));
        assert_eq!(from_hex::<2>("00f"), None);
        assert_eq!(from_hex::<2>("00fg"), None);
        assert_eq!(from_hex::<1>("é"), None);
    }

    #[test]
    fn a_malformed_order_changes_nothing() {
        let order = Renew {
            generation: 1,
            seed: "00".into(),
            wall_ns: 0,
            hostname: "h".into(),
            machine_id: "0".repeat(32),
            env: Default::default(),
            terminals: Vec::new(),
        };
        assert!(matches!(renew(&order), Err(RenewError::Malformed("seed"))));
        let order = Renew {
            seed: "00".repeat(32),
            hostname: "../x".into(),
            ..order
        };
        assert!(matches!(
            renew(&order),
            Err(RenewError::Malformed("hostname"))
        ));
    }
}
