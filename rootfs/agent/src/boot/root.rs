//! The root: a compressed read-only image with memory on top.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use super::mounts::{make_directory, mount_at};
use super::{BootError, Step};
use crate::sys::device;

/// The image in the initramfs.
const IMAGE: &str = "/root.squashfs";

const LOWER: &str = "/thaw/lower";
const UPPER: &str = "/thaw/upper";
const ROOT: &str = "/thaw/root";

/// Leaves the initramfs for the image. Without an image the initramfs stays the root.
pub(super) fn switch() -> Result<(), BootError> {
    if !Path::new(IMAGE).exists() {
        return Ok(());
    }
    let device = loop_device()?;
    for at in [LOWER, UPPER, ROOT] {
        make_directory(at)?;
    }
    mount(
        Some(device.as_str()),
        LOWER,
        Some("squashfs"),
        MsFlags::MS_RDONLY,
        None::<&str>,
    )
    .step(|| format!("mounting {IMAGE}"))?;
    mount_at(
        "tmpfs",
        UPPER,
        MsFlags::empty(),
        Some("mode=0755,size=100%"),
    )?;
    for part in ["data", "work"] {
        make_directory(&format!("{UPPER}/{part}"))?;
    }
    let options = format!("lowerdir={LOWER},upperdir={UPPER}/data,workdir={UPPER}/work");
    mount(
        Some("overlay"),
        ROOT,
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    )
    .step(|| "mounting the overlay".into())?;
    for kept in ["proc", "sys", "dev"] {
        let to = format!("{ROOT}/{kept}");
        make_directory(&to)?;
        mount(
            Some(format!("/{kept}").as_str()),
            to.as_str(),
            None::<&str>,
            MsFlags::MS_MOVE,
            None::<&str>,
        )
        .step(|| format!("moving /{kept}"))?;
    }
    // The loop device holds the image's file open; everything else of the initramfs is memory to free.
    for gone in [IMAGE, "/init"] {
        free(fs::remove_file(gone), gone);
    }
    free(fs::remove_dir_all("/modules"), "/modules");
    chdir(ROOT).step(|| ROOT.into())?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .step(|| "moving the root".into())?;
    chroot(".").step(|| "entering the root".into())?;
    chdir("/").step(|| "/".into())
}

fn free(result: io::Result<()>, what: &str) {
    if let Err(error) = result
        && error.kind() != io::ErrorKind::NotFound
    {
        crate::console::say(&format!("{what} stays in memory: {error}"));
    }
}

/// Puts the image behind a loop device; the device's path.
fn loop_device() -> Result<String, BootError> {
    let control = File::open("/dev/loop-control").step(|| "/dev/loop-control".into())?;
    let number = device::free_loop(&control).step(|| "finding a loop device".into())?;
    let path = format!("/dev/loop{number}");
    let device = File::open(&path).step(|| path.clone())?;
    let image = File::open(IMAGE).step(|| IMAGE.into())?;
    device::configure_loop(&device, &image).step(|| format!("configuring {path}"))?;
    // Dropping `device` here would be fine for a mount that follows, and one does.
    Ok(path)
}
