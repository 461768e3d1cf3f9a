//! Images: a guest root file system plus a kernel, built from Debian packages and addressed by
//! their content.
//!
//! On disk, below the data directory:
//!
//! * `images/sha256-<hex>/` holds `manifest.json`, `vmlinux` (ELF, uncompressed) and `initramfs`;
//! * `images/<name>` is a symbolic link to one of those;
//! * `tmp/` holds builds under way.
//!
//! There is no disk device in a guest: the root file system is a squashfs *inside* the initramfs.

pub mod build;
pub mod bzimage;
pub mod cpio;
pub mod embedded;
pub mod host_tools;
pub mod kernel;
pub mod manifest;
pub mod modules;
pub mod progress;
pub mod recipe;
pub mod root;
pub mod scratch;

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

pub use manifest::Manifest;
pub use recipe::Recipe;

/// Directory of the images below the data directory.
pub fn images_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("images")
}

/// An image that is complete on disk.
#[derive(Clone, Debug)]
pub struct Image {
    dir: PathBuf,
    /// What its manifest says.
    pub manifest: Manifest,
}

impl Image {
    /// Opens an image by its recipe's name or its digest (`sha256-<hex>`).
    ///
    /// # Errors
    /// The name is malformed, there is no such image, or it is incomplete.
    pub fn open(data_dir: &Path, name: &str) -> anyhow::Result<Self> {
        if recipe::check_name(name).is_err() && manifest::check_digest(name).is_err() {
            bail!("{name:?} is neither an image's name nor a digest");
        }
        let link = images_dir(data_dir).join(name);
        let dir = std::fs::canonicalize(&link).with_context(|| {
            format!(
                "there is no image {name} in {}; build it with `thaw image build {name}`",
                data_dir.display()
            )
        })?;
        let manifest = Manifest::read(&dir.join(manifest::FILE))?;
        let image = Self { dir, manifest };
        for (path, part) in [
            (image.kernel_path(), &image.manifest.vmlinux),
            (image.initramfs_path(), &image.manifest.initramfs),
        ] {
            let found = std::fs::metadata(&path)
                .with_context(|| format!("image {name} lacks {}", path.display()))?
                .len();
            if found != part.bytes {
                bail!(
                    "{} has {found} bytes, its manifest says {}; remove {} and build the image again",
                    path.display(),
                    part.bytes,
                    image.dir.display()
                );
            }
        }
        Ok(image)
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its kernel, an ELF file.
    pub fn kernel_path(&self) -> PathBuf {
        self.dir.join(manifest::VMLINUX)
    }

    /// Its initramfs, an uncompressed cpio archive.
    pub fn initramfs_path(&self) -> PathBuf {
        self.dir.join(manifest::INITRAMFS)
    }

    /// Opens the kernel for reading.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn kernel(&self) -> anyhow::Result<File> {
        open(&self.kernel_path())
    }

    /// Opens the initramfs for reading.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn initramfs(&self) -> anyhow::Result<File> {
        open(&self.initramfs_path())
    }

    /// Bytes that its files take on disk.
    pub fn bytes(&self) -> u64 {
        self.manifest.vmlinux.bytes + self.manifest.initramfs.bytes
    }
}

fn open(path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// What [`list`] found under one name.
#[derive(Debug)]
pub struct Listed {
    /// The name.
    pub name: String,
    /// The image, or why it cannot be used.
    pub image: anyhow::Result<Image>,
}

/// All named images, in order of their names. A data directory without images gives none.
///
/// # Errors
/// The directory exists but cannot be read.
pub fn list(data_dir: &Path) -> anyhow::Result<Vec<Listed>> {
    let dir = images_dir(data_dir);
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", dir.display())),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", dir.display()))?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if recipe::check_name(&name).is_ok() && entry.file_type()?.is_symlink() {
            let image = Image::open(data_dir, &name);
            found.push(Listed { name, image });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Takes a name away, and the image's files when no other name has them.
///
/// # Errors
/// There is no such name, or its files cannot be removed.
pub fn remove(data_dir: &Path, name: &str) -> anyhow::Result<()> {
    recipe::check_name(name)?;
    let link = images_dir(data_dir).join(name);
    let target = std::fs::read_link(&link).with_context(|| format!("there is no image {name}"))?;
    std::fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
    remove_if_unnamed(data_dir, &target)
}

/// Removes the files of the image that a name's link pointed to, unless another name does.
fn remove_if_unnamed(data_dir: &Path, target: &Path) -> anyhow::Result<()> {
    let dir = images_dir(data_dir);
    let Some(digest) = target.file_name().and_then(|name| name.to_str()) else {
        return Ok(());
    };
    manifest::check_digest(digest)?;
    for entry in
        std::fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?
    {
        let path = entry?.path();
        if std::fs::read_link(&path).is_ok_and(|other| other.ends_with(digest)) {
            return Ok(());
        }
    }
    let files = dir.join(digest);
    std::fs::remove_dir_all(&files).with_context(|| format!("cannot remove {}", files.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_image_names_the_next_step() {
        let dir = tempfile::tempdir().unwrap();
        let error = Image::open(dir.path(), "minimal").unwrap_err();
        assert!(
            format!("{error:#}").contains("thaw image build minimal"),
            "{error:#}"
        );
        assert!(list(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["../x", "/etc", "a/b", "", ".", "a\0b"] {
            assert!(Image::open(dir.path(), name).is_err(), "{name:?}");
            assert!(remove(dir.path(), name).is_err(), "{name:?}");
        }
    }
}
