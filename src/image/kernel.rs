//! The guest's kernel: Debian's own, unmodified, from its package.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use super::bzimage;
use super::host_tools::{self, Cancel};
use super::modules::{self, MissingModule, Module, Tree};
use super::progress::Progress;

/// The package that depends on the newest kernel of the ordinary flavour (the one with both entries).
const META_PACKAGE: &str = "linux-image-amd64";

/// A kernel, ready to go into an image.
#[derive(Debug)]
pub struct Kernel {
    /// `package=version`.
    pub package: String,
    /// The ELF file.
    pub vmlinux: Vec<u8>,
    /// Its modules, in the order of their loading.
    pub modules: Vec<Module>,
}

/// Name of the kernel package and its version, as apt knows them now.
///
/// # Errors
/// apt knows of none.
pub fn newest(cancel: &Cancel) -> anyhow::Result<(String, String)> {
    let depends = host_tools::output(
        Command::new("apt-cache").args(["depends", META_PACKAGE]),
        cancel,
    )
    .context("cannot ask apt for its newest kernel")?;
    let Some(package) = package_from(&depends) else {
        bail!(
            "apt knows no kernel package that {META_PACKAGE} depends on; run `apt-get update` and see whether Debian's main archive is configured"
        );
    };
    let policy = host_tools::output(Command::new("apt-cache").args(["policy", &package]), cancel)?;
    let version = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .with_context(|| format!("apt has no version of {package} to install"))?;
    Ok((package, version.to_owned()))
}

fn package_from(depends: &str) -> Option<String> {
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| {
            name.starts_with("linux-image-")
                && name.ends_with("-amd64")
                && !name.contains("cloud")
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
        })
        .map(str::to_owned)
}

/// Downloads a kernel package, and takes kernel and modules out of it.
///
/// # Errors
/// The download or the package is bad.
pub fn fetch(
    package: &str,
    version: &str,
    dir: &Path,
    cancel: &Cancel,
    progress: &Progress,
) -> anyhow::Result<Kernel> {
    std::fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let name = format!("{package}={version}");
    host_tools::run(
        Command::new("apt-get")
            .args(["download", "-o", "APT::Sandbox::User=root", &name])
            .current_dir(dir),
        cancel,
        progress,
    )
    .with_context(|| format!("cannot download {name}"))?;
    let deb = only_entry(dir, |name| name.ends_with(".deb"))?;
    let package_tar = dir.join("package.tar");
    host_tools::run(
        Command::new("sh")
            .args(["-c", r#"dpkg-deb --fsys-tarfile "$1" >"$2""#, "sh"])
            .arg(&deb)
            .arg(&package_tar),
        cancel,
        progress,
    )
    .with_context(|| format!("cannot unpack {name}"))?;
    let tree = dir.join("tree");
    std::fs::create_dir(&tree).with_context(|| format!("cannot make {}", tree.display()))?;
    let mut wanted: Vec<String> = modules::WANTED
        .iter()
        .map(|name| (*name).to_owned())
        .collect();
    let modules = loop {
        unpack(&package_tar, &tree, &wanted, cancel)?;
        let release = only_entry(&tree.join("lib/modules"), |_| true)?;
        match Tree::open(&release)?.closure(&modules::WANTED) {
            Ok(modules) => break modules,
            // Not unpacked yet; or not in the package, when it was asked for already.
            Err(error) => match error.downcast::<MissingModule>()? {
                missing if wanted.contains(&missing.0) => {
                    return Err(missing).with_context(|| format!("cannot use {name}"));
                }
                missing => wanted.push(missing.0),
            },
        }
    };
    let bzimage = only_entry(&tree.join("boot"), |name| name.starts_with("vmlinuz-"))?;
    let bzimage =
        std::fs::read(&bzimage).with_context(|| format!("cannot read {}", bzimage.display()))?;
    let vmlinux =
        bzimage::extract(&bzimage).with_context(|| format!("cannot use the kernel of {name}"))?;
    Ok(Kernel {
        package: name,
        vmlinux,
        modules,
    })
}

/// Unpacks the kernel, its list of built-in modules, and these modules: the package's other four
/// thousand would cost half a GiB of disk for nothing.
fn unpack(
    package_tar: &Path,
    tree: &Path,
    wanted: &[String],
    cancel: &Cancel,
) -> anyhow::Result<()> {
    let names = host_tools::output(Command::new("tar").arg("-tf").arg(package_tar), cancel)?;
    host_tools::output(
        Command::new("tar")
            .arg("-xf")
            .arg(package_tar)
            .arg("-C")
            .arg(tree)
            .args(members(&names, wanted)),
        cancel,
    )
    .context("cannot unpack the kernel package")?;
    Ok(())
}

/// Those of a package's files that an image needs.
fn members<'a>(names: &'a str, wanted: &[String]) -> Vec<&'a str> {
    names
        .lines()
        .filter(|name| {
            let base = name.rsplit('/').next().unwrap_or_default();
            let is_wanted = |module: &str| {
                wanted
                    .iter()
                    .any(|name| modules::normal(name) == modules::normal(module))
            };
            name.starts_with("./boot/vmlinuz-")
                || base == "modules.builtin"
                || modules::stem(base).is_some_and(is_wanted)
        })
        .collect()
}

fn only_entry(dir: &Path, wanted: impl Fn(&str) -> bool) -> anyhow::Result<PathBuf> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(&wanted) {
            return Ok(entry.path());
        }
    }
    bail!(
        "the kernel package lacks what belongs into {}",
        dir.display()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ordinary_flavour_is_taken() {
        let text = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n  Conflicts: x\n";
        assert_eq!(
            package_from(text).as_deref(),
            Some("linux-image-6.1.0-56-amd64")
        );
        assert_eq!(
            package_from("  Depends: linux-image-6.1.0-56-cloud-amd64\n"),
            None
        );
        assert_eq!(package_from("  Depends: linux-image-$(x)-amd64\n"), None);
        assert_eq!(package_from(""), None);
    }

    #[test]
    fn only_what_is_needed_is_unpacked() {
        let names = "./boot/vmlinuz-6.1\n./boot/System.map-6.1\n./lib/modules/6.1/kernel/xen-evtchn.ko\n\
            ./lib/modules/6.1/kernel/tuner.ko\n./lib/modules/6.1/modules.builtin\n";
        assert_eq!(
            members(names, &["xen_evtchn".into(), "tun".into()]),
            [
                "./boot/vmlinuz-6.1",
                "./lib/modules/6.1/kernel/xen-evtchn.ko",
                "./lib/modules/6.1/modules.builtin"
            ]
        );
    }
}
