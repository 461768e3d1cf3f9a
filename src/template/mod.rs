//! Templates: images booted once with everything warm, then frozen. New VMs are restored from them.
//!
//! On disk, below the data directory, `templates/<image>-<mem>m-<vcpu>c-<machine>/` holds
//!
//! * `manifest.json`: what it is, what it needs, the digests of the rest;
//! * `state`: everything but memory, a few KiB;
//! * `memory`: guest memory, sparse;
//! * `working_set`: the pages that a fresh clone writes before its first result.
//!
//! While it is served, `memory` lives in a sealed memfd: nobody can change it, and a cold page
//! cache never shows.

mod build;
pub mod cpu;
pub mod manifest;
pub mod memory;
pub mod vm;
pub mod workers;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use thaw_vmm::machine::MachineKind;

pub use manifest::Manifest;

use crate::image::Image;
use crate::layers::Base;

/// Guest memory sizes that templates exist for, MiB.
pub const SIZES_MIB: [u32; 7] = [128, 256, 512, 1024, 2048, 4096, 8192];

/// Directory of the templates below the data directory.
pub fn templates_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("templates")
}

/// The next template size up from what was asked for; the largest one for more than that.
pub fn round_up(memory_mib: u32) -> u32 {
    SIZES_MIB
        .into_iter()
        .find(|size| *size >= memory_mib)
        .unwrap_or(SIZES_MIB[SIZES_MIB.len() - 1])
}

/// What a template is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Guest memory, MiB; one of [`SIZES_MIB`].
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u32,
    /// The machine that runs it.
    pub machine: MachineKind,
}

/// A template that is ready to be restored from.
#[derive(Debug)]
pub struct Template {
    /// What its manifest says.
    pub manifest: Manifest,
    /// Where it is on disk.
    pub dir: PathBuf,
    /// Everything but memory.
    pub state: File,
    /// Guest memory: a sealed memfd, to be mapped privately.
    pub memory: Arc<File>,
    /// Pages to prefault: little-endian `u64` page numbers.
    pub working_set: File,
}

impl Template {
    /// Loads a template from its directory. Lengths and the digests of state and working set are
    /// checked; that of the memory, which takes longer, only by [`verify`].
    ///
    /// # Errors
    /// It is missing, damaged, or made for another host or thaw.
    pub fn load(dir: &Path) -> anyhow::Result<Self> {
        let manifest = Manifest::read(&dir.join(manifest::FILE))?;
        manifest.check_host()?;
        let open = |name: &str| {
            let path = dir.join(name);
            File::open(&path).with_context(|| format!("cannot open {}", path.display()))
        };
        manifest.state.check(&dir.join(manifest::STATE))?;
        manifest
            .working_set
            .check(&dir.join(manifest::WORKING_SET))?;
        let memory = memory::seal(&open(manifest::MEMORY)?, manifest.memory.bytes)
            .with_context(|| format!("cannot load the memory of {}", dir.display()))?;
        Ok(Self {
            state: open(manifest::STATE)?,
            working_set: open(manifest::WORKING_SET)?,
            memory: Arc::new(memory),
            dir: dir.to_path_buf(),
            manifest,
        })
    }
}

impl Template {
    /// Its memory, for others to be laid over.
    pub fn base(&self) -> Arc<Base> {
        Arc::new(Base {
            file: self.memory.clone(),
            sha256: self.manifest.memory.sha256.clone(),
            path: Some(self.dir.join(manifest::MEMORY)),
        })
    }
}

/// All of one image's templates: found, loaded, or built when they are first needed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Templates {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    data_dir: PathBuf,
    image: Image,
    machine: MachineKind,
    vms: Arc<dyn vm::Vms>,
    slots: Mutex<HashMap<Shape, Arc<tokio::sync::Mutex<Slot>>>>,
}

/// One shape's template, or how the last attempt at it failed.
#[derive(Debug, Default)]
struct Slot {
    ready: Option<Arc<Template>>,
    failed: Option<(Instant, String)>,
}

/// What was done to have a template.
#[derive(Debug)]
pub struct Built {
    /// The template.
    pub template: Arc<Template>,
    /// It was there already.
    pub cached: bool,
}

impl Templates {
    /// Opens an image, whose templates run in workers on the machine that this host's KVM can run.
    /// Blocks for some milliseconds: it tries that out.
    ///
    /// # Errors
    /// There is no such image, or this host can run no machine.
    pub fn open(data_dir: &Path, image: &str) -> anyhow::Result<Self> {
        let probe = thaw_vmm::machine::probe();
        let Some(machine) = probe.kind else {
            bail!(
                "this host cannot run VMs: {}; `thaw doctor` says more",
                probe.facts.join("; ")
            );
        };
        Self::open_on(data_dir, image, machine)
    }

    /// As [`Self::open`], on a machine that somebody chose.
    ///
    /// # Errors
    /// There is no such image.
    pub fn open_on(data_dir: &Path, image: &str, machine: MachineKind) -> anyhow::Result<Self> {
        Self::with(
            data_dir,
            image,
            machine,
            Arc::new(workers::Workers::this_program()?),
        )
    }

    /// As [`Self::open`], on `machine` in VMs that `vms` makes.
    ///
    /// # Errors
    /// There is no such image.
    pub fn with(
        data_dir: &Path,
        image: &str,
        machine: MachineKind,
        vms: Arc<dyn vm::Vms>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            inner: Arc::new(Inner {
                data_dir: data_dir.to_path_buf(),
                image: Image::open(data_dir, image)?,
                machine,
                vms,
                slots: Mutex::default(),
            }),
        })
    }

    /// The template of a shape, if it has been loaded; never waits.
    pub fn loaded(&self, memory_mib: u32, vcpus: u32) -> Option<Arc<Template>> {
        let shape = self.shape(memory_mib, vcpus).ok()?;
        let slot = {
            let slots = self.inner.slots.lock();
            let slots = slots.unwrap_or_else(PoisonError::into_inner);
            slots.get(&shape)?.clone()
        };
        slot.try_lock().ok()?.ready.clone()
    }

    /// The machine that they are made for.
    pub fn machine(&self) -> MachineKind {
        self.inner.machine
    }

    /// The image that these are templates of.
    pub fn image(&self) -> &Image {
        &self.inner.image
    }

    /// The template of the next size up, built first when there is none. Callers that ask at the
    /// same time share one build, which goes on when they stop waiting.
    ///
    /// # Errors
    /// There is none and it cannot be built; everybody who waited learns the same reason.
    pub async fn get(&self, memory_mib: u32, vcpus: u32) -> anyhow::Result<Arc<Template>> {
        Ok(self.get_or_build(memory_mib, vcpus, false).await?.template)
    }

    /// As [`Self::get`]; `fresh` builds even when there is one.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn get_or_build(
        &self,
        memory_mib: u32,
        vcpus: u32,
        fresh: bool,
    ) -> anyhow::Result<Built> {
        let shape = self.shape(memory_mib, vcpus)?;
        let inner = self.inner.clone();
        tokio::spawn(async move { inner.ready(shape, fresh).await })
            .await
            .context("building the template was cut short")?
    }

    /// The shape that serves a wish.
    fn shape(&self, memory_mib: u32, vcpus: u32) -> anyhow::Result<Shape> {
        let most = self.inner.machine.max_vcpus();
        if !(1..=most).contains(&vcpus) {
            bail!(
                "a template with {vcpus} vCPUs was asked for; on the {} machine a VM has up to {most}",
                self.inner.machine.name()
            );
        }
        Ok(Shape {
            memory_mib: round_up(memory_mib.max(self.inner.image.manifest.min_memory_mib)),
            vcpus,
            machine: self.inner.machine,
        })
    }
}

impl Inner {
    async fn ready(&self, shape: Shape, fresh: bool) -> anyhow::Result<Built> {
        let asked = Instant::now();
        let slot = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.entry(shape).or_default().clone()
        };
        let mut slot = slot.lock().await;
        if let Some(template) = &slot.ready
            && !fresh
        {
            return Ok(Built {
                template: template.clone(),
                cached: true,
            });
        }
        // Who waited for an attempt shares its failure: they do not all try again, one after the other.
        if let Some((when, why)) = &slot.failed
            && *when >= asked
        {
            bail!("{why}");
        }
        match build::load_or_build(self, shape, fresh).await {
            Ok((template, cached)) => {
                let template = Arc::new(template);
                slot.ready = Some(template.clone());
                slot.failed = None;
                Ok(Built { template, cached })
            }
            Err(error) => {
                slot.failed = Some((Instant::now(), format!("{error:#}")));
                Err(error)
            }
        }
    }
}

/// A template's directory name.
fn directory_name(image_digest: &str, shape: Shape) -> String {
    // 16 digits of the image's digest: 64 bits tell the images of one host apart.
    let digits = image_digest.strip_prefix("sha256-").unwrap_or(image_digest);
    format!(
        "{}-{}m-{}c-{}",
        digits.get(..16).unwrap_or(digits),
        shape.memory_mib,
        shape.vcpus,
        shape.machine.name()
    )
}

/// A generation number larger than any used before on this host: the time, in nanoseconds.
/// Builds alone use it; a server counts its own, which stay far below.
fn generation() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// What [`list`] found in one directory.
#[derive(Debug)]
pub struct Listed {
    /// The directory's name.
    pub name: String,
    /// Where it is.
    pub dir: PathBuf,
    /// What its manifest says, or why it cannot be read.
    pub manifest: anyhow::Result<Manifest>,
}

/// All templates, in order of their names.
///
/// # Errors
/// The directory exists but cannot be read.
pub fn list(data_dir: &Path) -> anyhow::Result<Vec<Listed>> {
    let parent = templates_dir(data_dir);
    let entries = match std::fs::read_dir(&parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", parent.display()));
        }
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", parent.display()))?;
        let dir = entry.path();
        if let Ok(name) = entry.file_name().into_string()
            && dir.is_dir()
        {
            let manifest = Manifest::read(&dir.join(manifest::FILE));
            found.push(Listed {
                name,
                dir,
                manifest,
            });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Finds one template by its directory's name or an unambiguous part of it.
///
/// # Errors
/// None or several match.
pub fn find(data_dir: &Path, name: &str) -> anyhow::Result<Listed> {
    let mut matching: Vec<Listed> = list(data_dir)?
        .into_iter()
        .filter(|listed| {
            let image = listed
                .manifest
                .as_ref()
                .map(|manifest| manifest.image_name.as_str());
            listed.name == name
                || listed.name.starts_with(name)
                || image.is_ok_and(|image| image == name)
        })
        .collect();
    match (matching.pop(), matching.len()) {
        (Some(found), 0) => Ok(found),
        (Some(found), _) if found.name == name => Ok(found),
        (None, _) => bail!("there is no template {name:?}; `thaw template list` names them"),
        (Some(_), more) => bail!(
            "{name:?} fits {} templates; use a name from `thaw template list`",
            more + 1
        ),
    }
}

/// Reads every byte of a template and compares digests.
///
/// # Errors
/// Something is damaged, or made for another host.
pub fn verify(dir: &Path) -> anyhow::Result<Manifest> {
    let manifest = Manifest::read(&dir.join(manifest::FILE))?;
    manifest.check_host()?;
    manifest.state.check(&dir.join(manifest::STATE))?;
    manifest
        .working_set
        .check(&dir.join(manifest::WORKING_SET))?;
    let path = dir.join(manifest::MEMORY);
    let found = memory::measure(
        &File::open(&path).with_context(|| format!("cannot open {}", path.display()))?,
    )?;
    if found != manifest.memory {
        bail!(
            "{} is damaged: its content is not what was written; remove the template and build it again",
            path.display()
        );
    }
    Ok(manifest)
}

/// Removes a template from the disk. VMs and servers that use it are not disturbed.
///
/// # Errors
/// It cannot be removed.
pub fn remove(dir: &Path) -> anyhow::Result<()> {
    std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}
