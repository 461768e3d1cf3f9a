//! The two bells: how the agent calls the host and is called by it.
//!
//! The bell towards the host is a port on every machine. The one towards the agent is whatever
//! interrupt the machine can raise that the stock kernel hands to a process.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use thaw_wire::layout::WIRE_VIRQ;

use crate::sys::device;

/// The machine that this kernel runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// Entered at its Xen entry.
    Pv,
    /// Entered at its ordinary one.
    Hvm,
}

impl Machine {
    /// Finds out; sysfs must be mounted.
    #[must_use]
    pub fn here() -> Self {
        match std::fs::read_to_string("/sys/hypervisor/type") {
            Ok(kind) if kind.trim() == "xen" => Self::Pv,
            _ => Self::Hvm,
        }
    }

    /// Its name, as people write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pv => "pv",
            Self::Hvm => "hvm",
        }
    }
}

/// The bells of the machine that this is.
#[derive(Debug)]
pub enum Bells {
    /// Those of the `pv` machine.
    Xen(Xen),
    /// Those of the `hvm` machine.
    ParallelPort(ParallelPort),
}

impl Bells {
    /// Opens both.
    ///
    /// # Errors
    /// The machine lacks one of them.
    pub fn open() -> io::Result<Self> {
        device::allow_doorbell(true)?;
        match Machine::here() {
            Machine::Pv => Xen::open().map(Self::Xen),
            Machine::Hvm => ParallelPort::open().map(Self::ParallelPort),
        }
    }

    /// Readable when the host rang.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Xen(xen) => xen.evtchn.as_fd(),
            Self::ParallelPort(port) => port.port.as_fd(),
        }
    }

    /// Hushes the host's ring and arms the bell again.
    ///
    /// # Errors
    /// The device's failure.
    pub fn acknowledge(&mut self) -> io::Result<()> {
        match self {
            Self::Xen(xen) => xen.acknowledge(),
            // Whatever it counted: one look at the ring is for all of them.
            Self::ParallelPort(port) => {
                device::take_parallel_interrupts(port.port.as_fd()).map(drop)
            }
        }
    }

    /// Rings at the host: a word as [`thaw_wire::layout`] defines it.
    pub fn ring(&self, word: u32) {
        device::ring_doorbell(word);
    }
}

/// The agent's bell on the `hvm` machine: the interrupt of a parallel port with nothing on it.
#[derive(Debug)]
pub struct ParallelPort {
    port: File,
}

impl ParallelPort {
    const DEVICE: &str = "/dev/parport0";

    fn open() -> io::Result<Self> {
        let path = Path::new(Self::DEVICE);
        if !path.exists() {
            make_node(path, Path::new("/sys/class/ppdev/parport0/dev"))?;
        }
        let port = OpenOptions::new().read(true).write(true).open(path)?;
        device::claim_parallel_port(port.as_fd())?;
        Ok(Self { port })
    }
}

/// The agent's bell on the `pv` machine: a Xen event channel.
#[derive(Debug)]
pub struct Xen {
    evtchn: File,
}

impl Xen {
    /// Where udev would put the device; devtmpfs does it by itself.
    const DEVICE: &str = "/dev/xen/evtchn";

    fn open() -> io::Result<Self> {
        let path = Path::new(Self::DEVICE);
        if !path.exists() {
            make_node(path, Path::new("/sys/class/misc/xen!evtchn/dev"))?;
        }
        let evtchn = OpenOptions::new().read(true).write(true).open(path)?;
        device::bind_virq(evtchn.as_fd(), WIRE_VIRQ)?;
        Ok(Self { evtchn })
    }

    fn acknowledge(&mut self) -> io::Result<()> {
        // A read gives the port that fired, already masked; writing it back unmasks it.
        let mut port = [0; 4];
        self.evtchn.read_exact(&mut port)?;
        self.evtchn.write_all(&port)
    }
}

/// Makes a character device node as sysfs describes it.
fn make_node(path: &Path, described: &Path) -> io::Result<()> {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let text = std::fs::read_to_string(described)?;
    let numbers: Vec<u64> = text
        .trim()
        .split(':')
        .filter_map(|n| n.parse().ok())
        .collect();
    let [major, minor] = numbers[..] else {
        return Err(io::Error::other(format!(
            "{} says {text:?}",
            described.display()
        )));
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    mknod(
        path,
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o600),
        makedev(major, minor),
    )?;
    Ok(())
}
