//! Laying a snapshot over another base: the memory stays what it is, what is stored of it changes.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::catalog::Catalog;
use super::make::{MIB, flush_dir, free_mib, write};
use super::manifest::Manifest;
use crate::image::scratch::Scratch;
use crate::layers::{Base, Frost, PAGE, memory_file};
use crate::template::manifest::MEMORY;

/// What a rebase did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Rebased {
    /// It was laid over that base already.
    pub was_there: bool,
    /// Pages that differ between the bases and were written.
    pub pages: u64,
    /// Bytes that were added to the disk.
    pub added_bytes: u64,
}

impl Catalog {
    /// The base of a snapshot.
    ///
    /// # Errors
    /// It is missing or damaged.
    pub fn base_of(&self, snapshot: &Manifest) -> anyhow::Result<Arc<Base>> {
        self.shelf.open_base(&snapshot.memory.base)
    }

    /// The base that new VMs of a snapshot's image and size have: the memory of their template.
    ///
    /// # Errors
    /// There is no template of that kind that this thaw can use, or it is damaged.
    pub fn template_base(&self, data_dir: &Path, snapshot: &Manifest) -> anyhow::Result<Arc<Base>> {
        let fits = |one: &crate::template::Manifest| {
            (&one.image, one.memory_mib, one.machine)
                == (&snapshot.image, snapshot.memory_mib, snapshot.machine)
                && one.memory.bytes == snapshot.memory.bytes
                && one.check_host().is_ok()
        };
        let templates = crate::template::list(data_dir)?;
        let found = templates.into_iter().find_map(|one| {
            one.manifest
                .ok()
                .filter(fits)
                .map(|manifest| (one.dir, manifest))
        });
        let (dir, manifest) = found.with_context(|| {
            format!(
                "there is no template of image {} with {} MiB that this thaw can use; start the server once, or give \
                 --onto with another snapshot",
                snapshot.image_name, snapshot.memory_mib
            )
        })?;
        let path = dir.join(MEMORY);
        let file = std::fs::File::open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let found = crate::template::memory::measure(&file)?;
        ensure!(
            found.sha256 == manifest.memory.sha256,
            "{} is damaged",
            path.display()
        );
        Ok(Arc::new(Base {
            file: Arc::new(file),
            sha256: found.sha256,
            path: Some(path),
        }))
    }

    /// Lays a snapshot over another base. Pages that are as in that are stored no more; those of the old base that differ are.
    /// `each` hears of the pages compared.
    ///
    /// # Errors
    /// The base is of another size, something is damaged, or the disk is too full; the snapshot is as it was then.
    pub fn rebase(
        &self,
        data_dir: &Path,
        snapshot: &Manifest,
        base: &Arc<Base>,
        disk_floor_mib: u64,
        mut each: impl FnMut(u64),
    ) -> anyhow::Result<Rebased> {
        if snapshot.memory.base == base.sha256 {
            let (was_there, pages, added_bytes) = (true, 0, 0);
            return Ok(Rebased {
                was_there,
                pages,
                added_bytes,
            });
        }
        let (state, old) = self.layers(snapshot)?;
        let length = base.file.metadata().context("cannot look at a base")?.len();
        ensure!(
            length == snapshot.memory.bytes,
            "that base is of a VM with another size of memory"
        );
        let pages = memory_file("thaw-rebase")?;
        let mut numbers = Vec::new();
        let (mut here, mut there) = ([0; PAGE], [0; PAGE]);
        let all = old.map.pages();
        for page in 0..all {
            if page % 4096 == 0 {
                each(4096.min(all - page));
            }
            // What lies in a chunk stays there, whatever is below.
            if old.map.find(page).is_some() {
                continue;
            }
            old.read(page, &mut here)?;
            base.file
                .read_exact_at(&mut there, page * PAGE as u64)
                .context("cannot read a base")?;
            if here != there {
                pages
                    .write_all_at(&here, numbers.len() as u64 * PAGE as u64)
                    .context("cannot gather pages")?;
                numbers.push(page);
            }
        }
        let count = numbers.len() as u64;
        let (need, free) = ((count * PAGE as u64).div_ceil(MIB), free_mib(data_dir)?);
        let wanted = need.saturating_add(disk_floor_mib);
        ensure!(
            wanted <= free,
            "the disk is {} MiB short: it may take {need} MiB, {free} MiB are free and {disk_floor_mib} MiB stay free",
            wanted.saturating_sub(free)
        );
        let frost = Frost {
            state: Arc::new(state),
            pages: Arc::new(pages),
            numbers,
            origin: Arc::new(old.over(base.clone())),
            pause: Duration::ZERO,
        };
        let hold = self.shelf.hold()?;
        let kept = frost.keep(&self.shelf)?;
        let mut manifest = snapshot.clone();
        let state = super::make::state_bytes(&frost)?;
        let map = kept.layers.map.encode();
        let before = manifest.disk_bytes;
        manifest.describe(&state, &map, &kept, &self.shelf)?;
        manifest.disk_bytes = before + kept.added;
        let scratch = Scratch::new(data_dir)?;
        let out = write(scratch.path(), &state, &map, &manifest)?;
        let dir = self.dir.join(&snapshot.id);
        // In one step: whoever opens the snapshot finds the one or the other. The old one goes with the scratch directory.
        renameat2(AT_FDCWD, &out, AT_FDCWD, &dir, RenameFlags::RENAME_EXCHANGE).with_context(
            || {
                format!(
                    "cannot put a new snapshot in the place of {}",
                    dir.display()
                )
            },
        )?;
        flush_dir(&self.dir)?;
        drop((hold, scratch));
        Ok(Rebased {
            was_there: false,
            pages: count,
            added_bytes: kept.added,
        })
    }
}
