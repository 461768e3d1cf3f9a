//! Building an image: from a recipe to `images/sha256-<hex>/`.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};

use super::host_tools::{self, Cancel, IMAGE_TOOLS};
use super::kernel::Kernel;
use super::manifest::{self, FORMAT, Manifest, Part};
use super::progress::Progress;
use super::scratch::Scratch;
use super::{Image, cpio, embedded, images_dir, kernel, recipe, root};

/// Raised when the same inputs give another image than before.
const BUILDER: &str = "3";
/// Name of the root file system in the initramfs.
const ROOT_SQUASHFS: &str = "root.squashfs";
/// Steps of a build, for the progress bar.
pub const STEPS: u64 = 5;
/// Largest agent binary that is taken: it is unpacked into every guest's memory.
const MAX_AGENT: u64 = 64 << 20;

/// What to build and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where images live.
    pub data_dir: PathBuf,
    /// A built-in recipe's name or the path of a `.toml` file.
    pub recipe: String,
    /// The agent's binary; looked for when absent, see [`find_agent`].
    pub agent: Option<PathBuf>,
    /// Whether missing host tools may be installed.
    pub install: bool,
    /// Build even when an image of the same inputs exists.
    pub force: bool,
}

/// How a build went.
#[derive(Debug)]
pub struct Built {
    /// The image.
    pub image: Image,
    /// It existed: nothing was built.
    pub cached: bool,
    /// How long it took.
    pub took: Duration,
}

/// Builds an image, or finds that it exists.
///
/// # Errors
/// Says what failed, why and what to do; nothing half-made is left.
pub fn build(options: &Options, cancel: &Cancel, progress: &mut Progress) -> anyhow::Result<Built> {
    let source = recipe::find(&options.recipe)?;
    let agent = Agent::read(options.agent.as_deref())?;
    let runner: Vec<(&str, &[u8])> = embedded::RUNNER.to_vec();
    let runner_key = manifest::key(&runner);
    let recipe = &source.recipe;
    let root_key = manifest::key(&[
        ("builder", BUILDER.as_bytes()),
        ("suite", recipe.suite.as_bytes()),
        (
            "mirror",
            recipe.mirror.as_deref().unwrap_or_default().as_bytes(),
        ),
        ("packages", recipe.packages.join(",").as_bytes()),
        ("runner", runner_key.as_bytes()),
    ]);
    let recipe_key = manifest::key(&[
        ("root", root_key.as_bytes()),
        ("recipe", source.text.as_bytes()),
        ("agent", &agent.bytes),
    ]);
    let existing = Image::open(&options.data_dir, &source.recipe.name).ok();
    if let Some(image) = &existing
        && image.manifest.recipe_key == recipe_key
        && !options.force
    {
        return Ok(Built {
            image: image.clone(),
            cached: true,
            took: progress.elapsed(),
        });
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "building an image needs root (it unpacks a Debian system with its owners and devices); run it with sudo"
        );
    }
    host_tools::require(IMAGE_TOOLS, options.install, cancel, progress)?;
    let scratch = Scratch::new(&options.data_dir)?;
    // Only the agent changed: root file system and kernel are taken from the image that is there.
    let reusable = existing.filter(|image| {
        let manifest = &image.manifest;
        manifest.root_key == root_key
            && super::modules::complete(&manifest.modules)
            && !options.force
    });
    let parts = match reusable {
        Some(image) => {
            progress.step("reusing the root file system and kernel of the image that is there");
            Parts::from_image(&image, scratch.path())?
        }
        None => Parts::build(&options.data_dir, recipe, &scratch, cancel, progress)?,
    };
    progress.step("writing the initramfs");
    let out = scratch.path().join("image");
    std::fs::create_dir(&out).context("cannot make the image's directory")?;
    let vmlinux = out.join(manifest::VMLINUX);
    write_synced(&vmlinux, &parts.kernel.vmlinux)?;
    let initramfs = out.join(manifest::INITRAMFS);
    write_initramfs(&initramfs, &agent, &parts)?;
    cancel.check()?;
    let mut manifest = Manifest {
        format: FORMAT,
        digest: String::new(),
        name: source.recipe.name.clone(),
        description: source.recipe.description.clone(),
        recipe_key,
        root_key,
        created_at: now(),
        thaw: env!("CARGO_PKG_VERSION").to_owned(),
        suite: source.recipe.suite.clone(),
        kernel: parts.kernel.package.clone(),
        vmlinux: Part::of_file(&vmlinux)?,
        initramfs: Part::of_file(&initramfs)?,
        root: Part::of_file(&parts.squashfs)?,
        agent: Part::of_bytes(&agent.bytes),
        modules: parts
            .kernel
            .modules
            .iter()
            .map(|module| module.file.clone())
            .collect(),
        packages: parts.packages,
        warm: source.recipe.warm.clone(),
        min_memory_mib: source.recipe.min_memory_mib,
    };
    manifest.digest = manifest.compute_digest();
    manifest.write(&out.join(manifest::FILE))?;
    publish(&options.data_dir, &out, &manifest, scratch.path())?;
    Ok(Built {
        image: Image::open(&options.data_dir, &manifest.name)?,
        cached: false,
        took: progress.elapsed(),
    })
}

/// The agent's binary.
struct Agent {
    bytes: Vec<u8>,
}

impl Agent {
    fn read(given: Option<&Path>) -> anyhow::Result<Self> {
        let path = find_agent(given)?;
        let bytes = std::fs::metadata(&path)
            .with_context(|| format!("cannot read the agent {}", path.display()))?
            .len();
        if bytes > MAX_AGENT {
            bail!(
                "{} has {bytes} bytes; an agent has at most {MAX_AGENT}",
                path.display()
            );
        }
        let bytes = std::fs::read(&path)
            .with_context(|| format!("cannot read the agent {}", path.display()))?;
        check_static(&bytes).with_context(|| format!("{} cannot be the agent", path.display()))?;
        Ok(Self { bytes })
    }
}

/// Where the agent's binary is: the path given, else `THAW_AGENT`, else where `make build` puts
/// it, else beside the `thaw` executable. In that order, because in a checkout the one beside it
/// is what the agent's tests run on: a dynamic one, of no use in a guest.
///
/// # Errors
/// It is at none of these places.
pub fn find_agent(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path.to_path_buf());
    }
    if let Some(path) = std::env::var_os("THAW_AGENT") {
        return Ok(PathBuf::from(path));
    }
    let exe = std::env::current_exe().context("cannot tell where thaw's own executable is")?;
    let beside = exe.parent().unwrap_or(Path::new("/"));
    let candidates = [
        beside.join("../x86_64-unknown-linux-gnu/guest/thaw-agent"),
        beside.join("../../x86_64-unknown-linux-gnu/guest/thaw-agent"),
        beside.join("thaw-agent"),
    ];
    candidates.iter().find(|path| path.is_file()).cloned().with_context(|| {
        format!(
            "the guest's agent is not beside thaw in {}; build it with `make build`, or name it with --agent PATH",
            beside.display()
        )
    })
}

/// PID 1 runs before any library can be found: a binary with an interpreter would never start.
fn check_static(elf: &[u8]) -> anyhow::Result<()> {
    const PT_INTERP: u32 = 3;
    const X86_64: u16 = 62;
    let u16_at = |at: usize| {
        Some(u16::from_le_bytes(
            elf.get(at..at.checked_add(2)?)?.try_into().ok()?,
        ))
    };
    let u32_at = |at: usize| {
        Some(u32::from_le_bytes(
            elf.get(at..at.checked_add(4)?)?.try_into().ok()?,
        ))
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") || u16_at(0x12) != Some(X86_64) {
        bail!("it is not an x86-64 ELF executable");
    }
    let table = elf
        .get(0x20..0x28)
        .and_then(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?)))
        .and_then(|offset| usize::try_from(offset).ok())
        .context("it is cut short")?;
    let (size, count) = u16_at(0x36).zip(u16_at(0x38)).context("it is cut short")?;
    for index in 0..usize::from(count) {
        let kind = index
            .checked_mul(usize::from(size))
            .and_then(|offset| table.checked_add(offset))
            .and_then(u32_at)
            .context("it is cut short")?;
        if kind == PT_INTERP {
            bail!(
                "it is dynamically linked; build it with RUSTFLAGS='-C target-feature=+crt-static'"
            );
        }
    }
    Ok(())
}

/// What goes into the initramfs beside the agent.
struct Parts {
    kernel: Kernel,
    squashfs: PathBuf,
    packages: Vec<String>,
}

impl Parts {
    fn build(
        data_dir: &Path,
        recipe: &super::Recipe,
        scratch: &Scratch,
        cancel: &Cancel,
        progress: &mut Progress,
    ) -> anyhow::Result<Self> {
        let since = SystemTime::now();
        progress.step("fetching the kernel");
        host_tools::refresh_lists(cancel, progress)?;
        let (package, version) = kernel::newest(cancel)?;
        let kernel =
            match kernel_of_an_image(data_dir, &format!("{package}={version}"), scratch.path()) {
                Some(kernel) => kernel,
                None => kernel::fetch(
                    &package,
                    &version,
                    &scratch.path().join("kernel"),
                    cancel,
                    progress,
                )?,
            };
        progress.step(&format!(
            "installing {} and the essential packages",
            count(recipe.packages.len())
        ));
        let tree = scratch.path().join("root");
        root::install(recipe, &tree, cancel, progress)?;
        progress.step("stripping it and adding the runner");
        let packages = root::packages(&tree)?;
        root::finish(&tree, since, cancel, progress)?;
        progress.step("packing the root file system");
        let squashfs = scratch.path().join(ROOT_SQUASHFS);
        root::pack(&tree, &squashfs, cancel, progress)?;
        Ok(Self {
            kernel,
            squashfs,
            packages,
        })
    }

    /// Takes the parts out of an image's initramfs again.
    fn from_image(image: &Image, dir: &Path) -> anyhow::Result<Self> {
        let squashfs = dir.join(ROOT_SQUASHFS);
        let mut modules = Vec::new();
        cpio::read(
            BufReader::with_capacity(1 << 20, image.initramfs()?),
            |entry, content| {
                if entry.name == ROOT_SQUASHFS {
                    std::io::copy(content, &mut File::create(&squashfs)?)?;
                } else if let Some(file) = entry
                    .name
                    .strip_prefix("modules/")
                    .filter(|name| name.ends_with(".ko"))
                {
                    let mut bytes = Vec::new();
                    content.read_to_end(&mut bytes)?;
                    modules.push(super::modules::Module {
                        file: file.to_owned(),
                        bytes,
                    });
                }
                Ok(())
            },
        )
        .with_context(|| format!("cannot read {}", image.initramfs_path().display()))?;
        if Part::of_file(&squashfs)? != image.manifest.root {
            bail!(
                "image {} is damaged; build it with --force",
                image.manifest.name
            );
        }
        let vmlinux =
            std::fs::read(image.kernel_path()).context("cannot read the image's kernel")?;
        Ok(Self {
            kernel: Kernel {
                package: image.manifest.kernel.clone(),
                vmlinux,
                modules,
            },
            squashfs,
            packages: image.manifest.packages.clone(),
        })
    }
}

/// The kernel of an image that has this very one: saves its download.
fn kernel_of_an_image(data_dir: &Path, package: &str, dir: &Path) -> Option<Kernel> {
    let image = super::list(data_dir)
        .ok()?
        .into_iter()
        .filter_map(|listed| listed.image.ok())
        .find(|image| {
            image.manifest.kernel == package && super::modules::complete(&image.manifest.modules)
        })?;
    // A damaged image is no reason to fail: the kernel is downloaded then.
    let sound =
        Part::of_file(&image.kernel_path()).is_ok_and(|part| part == image.manifest.vmlinux);
    let parts = sound
        .then(|| Parts::from_image(&image, dir).ok())
        .flatten()?;
    std::fs::remove_file(&parts.squashfs).ok()?;
    Some(parts.kernel)
}

fn count(packages: usize) -> String {
    match packages {
        1 => "1 package".to_owned(),
        other => format!("{other} packages"),
    }
}

fn write_initramfs(path: &Path, agent: &Agent, parts: &Parts) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> {
        let file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        let mut archive = cpio::Writer::new(file);
        for dir in [
            "dev", "proc", "sys", "run", "modules", "lower", "upper", "newroot",
        ] {
            archive.directory(dir, 0o755)?;
        }
        // What the kernel opens for the first process, before there is a devtmpfs.
        archive.character_device("dev/console", 0o600, 5, 1)?;
        archive.file(
            "init",
            0o755,
            agent.bytes.len() as u64,
            &mut &agent.bytes[..],
        )?;
        for module in &parts.kernel.modules {
            let name = format!("modules/{}", module.file);
            archive.file(
                &name,
                0o644,
                module.bytes.len() as u64,
                &mut &module.bytes[..],
            )?;
        }
        for (name, lines) in super::modules::orders(&parts.kernel.modules) {
            let name = format!("modules/{name}");
            archive.file(&name, 0o644, lines.len() as u64, &mut lines.as_bytes())?;
        }
        let mut squashfs = File::open(&parts.squashfs)?;
        let bytes = squashfs.metadata()?.len();
        archive.file(ROOT_SQUASHFS, 0o644, bytes, &mut squashfs)?;
        archive
            .finish()?
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)?
            .sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

fn write_synced(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    std::fs::write(path, bytes)
        .and_then(|()| File::open(path)?.sync_all())
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Gives the finished directory its final name, then points the image's name at it.
fn publish(data_dir: &Path, out: &Path, manifest: &Manifest, scratch: &Path) -> anyhow::Result<()> {
    let images = images_dir(data_dir);
    std::fs::create_dir_all(&images)
        .with_context(|| format!("cannot make {}", images.display()))?;
    let target = images.join(&manifest.digest);
    match std::fs::rename(out, &target) {
        Ok(()) => {}
        // The same image was there: same digest, same content, perhaps an older manifest.
        Err(_) if target.join(manifest::FILE).exists() => {
            std::fs::rename(out.join(manifest::FILE), target.join(manifest::FILE))
                .with_context(|| format!("cannot renew the manifest in {}", target.display()))?;
        }
        Err(error) => {
            return Err(error).with_context(|| format!("cannot make {}", target.display()));
        }
    }
    let link = images.join(&manifest.name);
    let before = std::fs::read_link(&link).ok();
    let fresh = scratch.join("link");
    std::os::unix::fs::symlink(&manifest.digest, &fresh)
        .and_then(|()| std::fs::rename(&fresh, &link))
        .with_context(|| format!("cannot point {} at the new image", link.display()))?;
    File::open(&images)
        .and_then(|dir| dir.sync_all())
        .with_context(|| format!("cannot flush {}", images.display()))?;
    match before {
        Some(before) if before != Path::new(&manifest.digest) => {
            super::remove_if_unnamed(data_dir, &before)
        }
        _ => Ok(()),
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(segment: u32) -> Vec<u8> {
        let mut elf = vec![0; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x12] = 62;
        elf[0x20] = 64;
        elf[0x36] = 56;
        elf[0x38] = 1;
        elf[64..68].copy_from_slice(&segment.to_le_bytes());
        elf
    }

    #[test]
    fn only_static_executables_can_be_the_agent() {
        check_static(&elf(1)).unwrap();
        let dynamic = check_static(&elf(3)).unwrap_err();
        assert!(dynamic.to_string().contains("crt-static"));
        assert!(check_static(b"#!/bin/sh").is_err());
        assert!(check_static(&elf(1)[..70]).is_ok());
        assert!(check_static(&elf(1)[..60]).is_err());
    }

    #[test]
    fn publishing_replaces_a_name_and_drops_what_nobody_names() {
        let data = tempfile::tempdir().unwrap();
        let make = |content: &[u8]| {
            let scratch = Scratch::new(data.path()).unwrap();
            let out = scratch.path().join("image");
            std::fs::create_dir(&out).unwrap();
            let mut manifest = super::super::manifest::tests::sample();
            std::fs::write(out.join(manifest::VMLINUX), content).unwrap();
            std::fs::write(out.join(manifest::INITRAMFS), content).unwrap();
            manifest.vmlinux = Part::of_bytes(content);
            manifest.initramfs = Part::of_bytes(content);
            manifest.digest = manifest.compute_digest();
            manifest.write(&out.join(manifest::FILE)).unwrap();
            publish(data.path(), &out, &manifest, scratch.path()).unwrap();
            manifest.digest
        };
        let first = make(b"one");
        assert_eq!(
            Image::open(data.path(), "minimal").unwrap().manifest.digest,
            first
        );
        assert_eq!(make(b"one"), first);
        let second = make(b"two");
        assert_eq!(
            Image::open(data.path(), "minimal").unwrap().manifest.digest,
            second
        );
        assert!(!images_dir(data.path()).join(&first).exists());
        assert_eq!(super::super::list(data.path()).unwrap().len(), 1);
        super::super::remove(data.path(), "minimal").unwrap();
        assert_eq!(
            std::fs::read_dir(images_dir(data.path())).unwrap().count(),
            0
        );
    }
}
