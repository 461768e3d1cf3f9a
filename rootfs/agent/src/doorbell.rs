//! The two bells: how the agent calls the host and is called by it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use thaw_wire::layout::WIRE_VIRQ;

use crate::sys::device;

/// The bells of one kind of machine.
pub trait Doorbell {
    /// Readable when the host rang.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Hushes the host's ring and arms the bell again.
    ///
    /// # Errors
    /// The device's failure.
    fn acknowledge(&mut self) -> io::Result<()>;
    /// Rings at the host: a word as [`thaw_wire::layout`] defines it.
    fn ring(&mut self, word: u32);
}

/// The bells of the `pv` machine: a port and a Xen event channel.
#[derive(Debug)]
pub struct Xen {
    evtchn: File,
}

impl Xen {
    /// Where udev would put the device; devtmpfs does it by itself.
    const DEVICE: &str = "/dev/xen/evtchn";

    /// Opens both bells.
    ///
    /// # Errors
    /// The machine lacks one of them.
    pub fn open() -> io::Result<Self> {
        device::allow_doorbell(true)?;
        let path = Path::new(Self::DEVICE);
        if !path.exists() {
            make_node(path, Path::new("/sys/class/misc/xen!evtchn/dev"))?;
        }
        let evtchn = OpenOptions::new().read(true).write(true).open(path)?;
        device::bind_virq(evtchn.as_fd(), WIRE_VIRQ)?;
        Ok(Self { evtchn })
    }
}

impl Doorbell for Xen {
    fn fd(&self) -> BorrowedFd<'_> {
        self.evtchn.as_fd()
    }

    fn acknowledge(&mut self) -> io::Result<()> {
        // A read gives the port that fired, already masked; writing it back unmasks it.
        let mut port = [0; 4];
        self.evtchn.read_exact(&mut port)?;
        self.evtchn.write_all(&port)
    }

    fn ring(&mut self, word: u32) {
        device::ring_doorbell(word);
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
