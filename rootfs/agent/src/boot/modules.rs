//! Kernel modules.

use std::fs::{self, File};
use std::path::Path;

use super::{BootError, Step};
use crate::sys::device;

/// Loads the modules that the file `order` names, one file name a line, each with its parameters, in that order.
///
/// # Errors
/// A module that exists does not load. No such file means no modules.
pub(super) fn load(directory: &Path, order: &str) -> Result<(), BootError> {
    let order = directory.join(order);
    if !order.exists() {
        return Ok(());
    }
    let names = fs::read_to_string(&order).step(|| order.display().to_string())?;
    for line in names
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let (name, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let path = directory.join(name);
        let file = File::open(&path).step(|| path.display().to_string())?;
        match device::load_module(&file, parameters) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            // A module that finds no hardware of its kind is of no use, and no harm.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                crate::console::say(&format!("module {name} is not for this machine"));
            }
            other => other.step(|| format!("module {name}"))?,
        }
    }
    Ok(())
}
