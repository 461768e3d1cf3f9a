//! A snapshot's `manifest.json`.

use std::path::Path;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use thaw_vmm::machine::MachineKind;

use crate::image::manifest::Part;
use crate::layers::Digest;
use crate::template::cpu::Cpu;
use crate::template::manifest::{Facts, SOURCES, read_json, write_json};

/// Version of the manifest and of the directory's layout.
pub const FORMAT: u32 = 2;

/// Name of the page map in a snapshot's directory.
pub const MAP: &str = "map";

/// What a snapshot is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Its owner asked for it; it stays until deleted.
    User,
    /// It is a suspended VM; it goes when that is resumed or ended.
    Suspended,
    /// It is a hibernating VM; it goes when that wakes or ends.
    Hibernated,
    /// It is the moment before a step of a recorded session; it goes when its tape has enough newer ones.
    Checkpoint,
    /// It is between a VM and its clone; it goes at once.
    Clone,
}

impl Kind {
    /// Whether it counts against the number of snapshots that a user may have. Others have bounds of their own: sessions
    /// that hibernate, and checkpoints of a tape.
    pub fn counts(self) -> bool {
        !matches!(self, Self::Hibernated | Self::Checkpoint)
    }

    /// Whether it is of use only as long as a VM's record, a tape, or who makes a clone, names it.
    pub fn is_fleeting(self) -> bool {
        match self {
            Self::User => false,
            Self::Suspended | Self::Hibernated | Self::Clone | Self::Checkpoint => true,
        }
    }
}

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Its id, and its directory's name.
    pub id: String,
    /// Who owns it.
    pub tenant: String,
    /// What its owner calls it.
    pub name: String,
    /// What it is there for.
    pub kind: Kind,
    /// The VM that was frozen.
    pub vm_id: String,
    /// That VM's session.
    pub session_id: String,
    /// Milliseconds since the Unix epoch.
    pub created_ms: i64,
    /// Digest of the image that the VM ran.
    pub image: String,
    /// Name that the image had.
    pub image_name: String,
    /// The machine that it runs on.
    pub machine: MachineKind,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// vCPUs that were asked for.
    pub vcpus: u32,
    /// vCPUs that the VM has.
    #[serde(default = "crate::vms::one_core")]
    pub cores: u32,
    /// Version of thaw that froze it.
    pub thaw: String,
    /// Fingerprint of the sources of the machine that froze it, whose code is partly in its memory.
    pub sources: String,
    /// Version of the wire that its agent speaks.
    pub wire: u32,
    /// Processor that it was frozen on.
    pub cpu: Cpu,
    /// Everything but memory.
    pub state: Part,
    /// Guest memory.
    pub memory: MemoryLayers,
    /// Bytes that it added to the disk when it was made.
    pub disk_bytes: u64,
    /// The snapshot that was made of its VM before it, else the one that the VM was restored from, if that was not a
    /// template.
    #[serde(default)]
    pub parent: Option<String>,
}

/// Where a snapshot's memory is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLayers {
    /// Length of the memory, bytes.
    pub bytes: u64,
    /// Digest of the base that everything is laid over.
    pub base: String,
    /// The chunks that the page map names, in its order.
    pub chunks: Vec<Chunk>,
    /// The page map.
    pub map: Part,
}

/// A chunk that a snapshot needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Its name.
    pub sha256: Digest,
    /// Its length.
    pub bytes: u64,
}

/// What VMs of this server run, which a snapshot must fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ground {
    /// Digest of the image.
    pub image: String,
    /// The image's name.
    pub image_name: String,
    /// The machine.
    pub machine: MachineKind,
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

    /// Writes the manifest and forces it to disk.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        write_json(self, path)
    }

    /// Whether this server on this host can run it faithfully.
    ///
    /// # Errors
    /// It cannot; says why.
    pub fn check(&self, ground: &Ground) -> anyhow::Result<()> {
        if self.machine != ground.machine {
            bail!(
                "it runs on machine {}, this server's is {}",
                self.machine.name(),
                ground.machine.name()
            );
        }
        if self.image != ground.image {
            bail!(
                "it runs image {} ({}), this server's is {} ({})",
                self.image_name,
                self.image,
                ground.image_name,
                ground.image
            );
        }
        let facts = Facts {
            wire: self.wire,
            thaw: &self.thaw,
            sources: &self.sources,
            cpu: &self.cpu,
        };
        facts.check_host().context("this host cannot run it")
    }

    /// The facts of a VM that is frozen here and now.
    pub(super) fn made_here(&mut self) -> anyhow::Result<()> {
        env!("CARGO_PKG_VERSION").clone_into(&mut self.thaw);
        SOURCES.clone_into(&mut self.sources);
        self.wire = thaw_wire::layout::VERSION;
        self.cpu = Cpu::host()?;
        Ok(())
    }
}
