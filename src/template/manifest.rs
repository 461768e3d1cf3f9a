//! A template's `manifest.json`.

use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thaw_vmm::machine::MachineKind;

use super::cpu::Cpu;
use crate::image::manifest::Part;

/// Name of the manifest in a template's directory.
pub const FILE: &str = "manifest.json";
/// Name of the state in a template's directory.
pub const STATE: &str = "state";
/// Name of the memory in a template's directory.
pub const MEMORY: &str = "memory";
/// Name of the working set in a template's directory.
pub const WORKING_SET: &str = "working_set";
/// Version of the manifest and of the directory's layout.
pub const FORMAT: u32 = 1;
/// Fingerprint of this build's machines.
pub const SOURCES: &str = env!("THAW_VMM_SOURCES");
/// Largest manifest that is read.
const MAX_BYTES: u64 = 1 << 20;

/// Guest memory, by content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPart {
    /// Apparent length.
    pub bytes: u64,
    /// Pages of 4 KiB that hold anything but zeroes.
    pub pages: u64,
    /// SHA-256 over those pages: each one's number (little-endian `u64`), then its bytes.
    pub sha256: String,
}

/// What a template is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Digest of the image.
    pub image: String,
    /// Name that the image had.
    pub image_name: String,
    /// The machine that it runs on.
    pub machine: MachineKind,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u32,
    /// Version of thaw that froze it.
    pub thaw: String,
    /// Fingerprint of the sources of the machine that froze it, whose code is partly in its memory.
    #[serde(default)]
    pub sources: String,
    /// Version of the wire that its agent speaks.
    pub wire: u32,
    /// The guest's kernel release.
    pub kernel: String,
    /// Processor that it was frozen on.
    pub cpu: Cpu,
    /// Seconds since the Unix epoch.
    pub created_at: u64,
    /// Milliseconds from the worker's start to the agent being ready.
    pub boot_ms: u64,
    /// Milliseconds that the whole build took.
    pub build_ms: u64,
    /// Python modules that are warm.
    pub warm: Vec<String>,
    /// Everything but memory.
    pub state: Part,
    /// Guest memory.
    pub memory: MemoryPart,
    /// The pages that a fresh clone writes before its first result.
    pub working_set: Part,
}

impl Manifest {
    /// Reads a manifest.
    ///
    /// # Errors
    /// It is missing, malformed or of another format.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let manifest: Self = read_json(path)?;
        if manifest.format != FORMAT {
            bail!(
                "{} has format {}, this thaw reads {FORMAT}",
                path.display(),
                manifest.format
            );
        }
        Ok(manifest)
    }

    /// Whether this thaw on this host can run it faithfully.
    ///
    /// # Errors
    /// It cannot; says why.
    pub fn check_host(&self) -> anyhow::Result<()> {
        let facts = Facts {
            wire: self.wire,
            thaw: &self.thaw,
            sources: &self.sources,
            cpu: &self.cpu,
        };
        facts.check_host()
    }

    /// Writes the manifest and forces it to disk.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        write_json(self, path)
    }
}

/// What decides whether a frozen VM can run here, of templates and snapshots alike.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Version of the wire that its agent speaks.
    pub wire: u32,
    /// Version of thaw that froze it.
    pub thaw: &'a str,
    /// Fingerprint of the sources of the machine that froze it.
    pub sources: &'a str,
    /// Processor that it was frozen on.
    pub cpu: &'a Cpu,
}

impl Facts<'_> {
    /// Whether this thaw on this host can run it faithfully.
    ///
    /// # Errors
    /// It cannot; says why.
    pub fn check_host(&self) -> anyhow::Result<()> {
        let ours = thaw_wire::layout::VERSION;
        if self.wire != ours {
            bail!(
                "its agent speaks version {} of the wire, this thaw {ours}",
                self.wire
            );
        }
        if self.thaw != env!("CARGO_PKG_VERSION") {
            bail!(
                "thaw {} made it, this is {}",
                self.thaw,
                env!("CARGO_PKG_VERSION")
            );
        }
        if self.sources != SOURCES {
            bail!("another build of thaw {} made it", self.thaw);
        }
        if let Some(missing) = self.cpu.missing_on(&Cpu::host()?) {
            bail!("it needs {missing}, which this host lacks");
        }
        Ok(())
    }
}

/// Reads a manifest of whatever kind.
///
/// # Errors
/// It is missing or malformed.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut text = String::new();
    file.take(MAX_BYTES)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not a manifest", path.display()))
}

/// Writes a manifest of whatever kind and forces it to disk.
///
/// # Errors
/// It cannot be written.
pub fn write_json(manifest: &impl Serialize, path: &Path) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec_pretty(manifest).context("cannot encode the manifest")?;
    text.push(b'\n');
    let mut file =
        std::fs::File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    file.write_all(&text)
        .and_then(|()| file.sync_all())
        .with_context(|| format!("cannot write {}", path.display()))
}

impl Part {
    /// Compares a file with what a manifest says of it.
    ///
    /// # Errors
    /// It differs or cannot be read.
    pub fn check(&self, path: &Path) -> anyhow::Result<()> {
        if Self::of_file(path)? != *self {
            bail!(
                "{} is damaged: its content is not what was written; remove the template and build it again",
                path.display()
            );
        }
        Ok(())
    }
}
