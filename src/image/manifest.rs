//! What an image's `manifest.json` says, and how digests are made.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Name of the manifest in an image's directory.
pub const FILE: &str = "manifest.json";
/// Name of the kernel in an image's directory.
pub const VMLINUX: &str = "vmlinux";
/// Name of the initramfs in an image's directory.
pub const INITRAMFS: &str = "initramfs";
/// Version of the manifest and of the directory's layout.
pub const FORMAT: u32 = 1;
/// Largest manifest that is read: the longest list of packages is a few dozen KiB.
const MAX_BYTES: u64 = 1 << 20;

/// One file, by content.
#[derive(Default, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its SHA-256, 64 hexadecimal digits.
    pub sha256: String,
    /// Its length.
    pub bytes: u64,
}

impl Part {
    /// Measures a file.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn of_file(path: &Path) -> anyhow::Result<Self> {
        let mut file =
            File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut bytes = 0;
        loop {
            let count = file
                .read(&mut buffer)
                .with_context(|| format!("cannot read {}", path.display()))?;
            if count == 0 {
                break;
            }
            hash.update(&buffer[..count]);
            bytes += count as u64;
        }
        Ok(Self {
            sha256: hex::encode(hash.finalize()),
            bytes,
        })
    }

    /// Measures bytes.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self {
            sha256: hex::encode(Sha256::digest(bytes)),
            bytes: bytes.len() as u64,
        }
    }
}

/// What an image is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// `sha256-<hex>`: see [`Manifest::compute_digest`].
    pub digest: String,
    /// The recipe's name.
    pub name: String,
    /// The recipe's description.
    pub description: String,
    /// Everything that went in, hashed before building: a recipe with the same key is not built again.
    pub recipe_key: String,
    /// What went into the root file system alone; see [`super::build`].
    pub root_key: String,
    /// Seconds since the Unix epoch. Not part of the digest.
    pub created_at: u64,
    /// Version of thaw that built it.
    pub thaw: String,
    /// Debian release.
    pub suite: String,
    /// Kernel package and its version, `package=version`.
    pub kernel: String,
    /// The kernel.
    pub vmlinux: Part,
    /// The initramfs, with everything below in it.
    pub initramfs: Part,
    /// The root file system within it.
    pub root: Part,
    /// The agent within it.
    pub agent: Part,
    /// Kernel modules within it, in the order of their loading.
    pub modules: Vec<String>,
    /// Debian packages of the root file system, `package=version`.
    pub packages: Vec<String>,
    /// Python modules that a template imports.
    pub warm: Vec<String>,
    /// Least guest memory that boots it, MiB.
    pub min_memory_mib: u32,
}

impl Manifest {
    /// The digest that names the image: SHA-256 over its parts' digests and what a template does with them.
    pub fn compute_digest(&self) -> String {
        let mut hash = Sha256::new();
        for (label, value) in [
            ("format", self.format.to_string()),
            ("vmlinux", self.vmlinux.sha256.clone()),
            ("initramfs", self.initramfs.sha256.clone()),
            ("warm", self.warm.join(",")),
            ("min_memory_mib", self.min_memory_mib.to_string()),
        ] {
            hash.update(format!("{label} {value}\n"));
        }
        format!("sha256-{}", hex::encode(hash.finalize()))
    }

    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// It is missing, malformed, of another format, or its digest is not that of its parts.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut text = String::new();
        file.take(MAX_BYTES)
            .read_to_string(&mut text)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let manifest: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a manifest", path.display()))?;
        if manifest.format != FORMAT {
            bail!(
                "{} has format {}, this thaw reads {FORMAT}; build the image again with `thaw image build {}`",
                path.display(),
                manifest.format,
                manifest.name
            );
        }
        if manifest.digest != manifest.compute_digest() {
            bail!(
                "{} has been altered: its digest is not that of its parts",
                path.display()
            );
        }
        Ok(manifest)
    }

    /// Writes the manifest and forces it to disk.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut text = serde_json::to_vec_pretty(self).context("cannot encode the manifest")?;
        text.push(b'\n');
        let mut file =
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        file.write_all(&text)
            .and_then(|()| file.sync_all())
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Whether `digest` has the form `sha256-<64 hexadecimal digits>`.
///
/// # Errors
/// It has not.
pub fn check_digest(digest: &str) -> anyhow::Result<()> {
    match digest.strip_prefix("sha256-") {
        Some(hex)
            if hex.len() == 64
                && hex
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) =>
        {
            Ok(())
        }
        _ => bail!("{digest:?} is not a digest"),
    }
}

/// A key over labelled inputs; lengths are hashed too, so inputs cannot flow into each other.
pub fn key(inputs: &[(&str, &[u8])]) -> String {
    let mut hash = Sha256::new();
    for (label, bytes) in inputs {
        hash.update((label.len() as u64).to_le_bytes());
        hash.update(label);
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    hex::encode(hash.finalize())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Manifest {
        let part = Part::of_bytes(b"x");
        let mut manifest = Manifest {
            format: FORMAT,
            digest: String::new(),
            name: "minimal".into(),
            description: String::new(),
            recipe_key: String::new(),
            root_key: String::new(),
            created_at: 1,
            thaw: String::new(),
            suite: "bookworm".into(),
            kernel: String::new(),
            vmlinux: part.clone(),
            initramfs: part.clone(),
            root: part.clone(),
            agent: part,
            modules: Vec::new(),
            packages: Vec::new(),
            warm: Vec::new(),
            min_memory_mib: 128,
        };
        manifest.digest = manifest.compute_digest();
        manifest
    }

    #[test]
    fn a_manifest_survives_the_disk_and_tampering_shows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut manifest = sample();
        manifest.write(&path).unwrap();
        assert_eq!(Manifest::read(&path).unwrap(), manifest);
        manifest.initramfs = Part::of_bytes(b"y");
        manifest.write(&path).unwrap();
        assert!(
            Manifest::read(&path)
                .unwrap_err()
                .to_string()
                .contains("altered")
        );
        std::fs::write(&path, b"{").unwrap();
        assert!(Manifest::read(&path).is_err());
    }

    #[test]
    fn the_digest_ignores_the_date_and_sees_the_parts() {
        let mut manifest = sample();
        manifest.created_at = 99;
        assert_eq!(manifest.compute_digest(), manifest.digest);
        manifest.vmlinux = Part::of_bytes(b"z");
        assert_ne!(manifest.compute_digest(), manifest.digest);
        check_digest(&manifest.digest).unwrap();
        assert!(check_digest("sha256-../../etc").is_err());
    }

    #[test]
    fn inputs_of_a_key_do_not_flow_into_each_other() {
        assert_ne!(key(&[("a", b"bc")]), key(&[("ab", b"c")]));
        assert_ne!(key(&[("a", b""), ("b", b"")]), key(&[("a", b"b")]));
    }

    #[test]
    fn a_file_and_its_bytes_measure_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"abc").unwrap();
        assert_eq!(Part::of_file(&path).unwrap(), Part::of_bytes(b"abc"));
        assert_eq!(
            Part::of_bytes(b"abc").sha256,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
