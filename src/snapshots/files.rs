//! A snapshot's files, and what is on the shelf for them.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context;
use thaw_vmm::snapshot::PageMap;

use super::manifest::{Ground, MAP, Manifest};
use super::{archive, snapshots_dir};
use crate::image::manifest::Part;
use crate::image::scratch;
use crate::layers::{Layers, PAGE, Shelf};
use crate::template::manifest::{FILE, STATE, read_json};

/// Opens a snapshot by what its manifest says now, if it can be run here.
pub(super) fn open_now(
    dir: &Path,
    ground: &Ground,
    shelf: &Shelf,
) -> anyhow::Result<(Manifest, File, Layers)> {
    let manifest = manifest_in(dir)?;
    manifest.check(ground)?;
    let (state, memory) = open(dir, &manifest, shelf)?;
    Ok((manifest, state, memory))
}

/// Opens a snapshot's files, each compared with what its manifest says.
pub(super) fn open(
    dir: &Path,
    manifest: &Manifest,
    shelf: &Shelf,
) -> anyhow::Result<(File, Layers)> {
    let damaged = "its files are damaged; delete it and make another";
    let open = |name: &str, part: &Part| {
        let path = dir.join(name);
        let whole = Part::of_file(&path)? == *part;
        anyhow::ensure!(whole, "{damaged}: {name}");
        File::open(&path).with_context(|| format!("its {name} cannot be opened"))
    };
    let state = open(STATE, &manifest.state)?;
    let map = PageMap::read(&open(MAP, &manifest.memory.map)?)?;
    let chunks = &manifest.memory.chunks;
    let sound =
        map.pages() * PAGE as u64 == manifest.memory.bytes && map.files() as usize == chunks.len();
    anyhow::ensure!(sound, "{damaged}: map");
    let base = shelf.open_base(&manifest.memory.base).context(damaged)?;
    let files = chunks.iter().map(|chunk| shelf.open_chunk(&chunk.sha256));
    let files = files.collect::<anyhow::Result<Vec<_>>>().context(damaged)?;
    Ok((state, Layers::new(base, files, map)))
}

/// Removes a snapshot's directory, its manifest first: without one it is nothing.
pub(super) fn remove(dir: &Path) -> anyhow::Result<()> {
    let gone = |done: std::io::Result<()>| match done {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    };
    gone(std::fs::remove_file(dir.join(FILE)))?;
    gone(std::fs::remove_dir_all(dir))
}

/// Directories that are named as snapshots are.
pub(super) fn directories(snapshots: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let cannot = || format!("cannot read {}", snapshots.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(snapshots).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        let name = entry.file_name();
        if name
            .to_str()
            .is_some_and(|name| uuid::Uuid::parse_str(name).is_ok())
        {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The manifest of the snapshot in a directory.
pub(super) fn manifest_in(dir: &Path) -> anyhow::Result<Manifest> {
    let manifest = Manifest::read(&dir.join(FILE))?;
    let own = dir.file_name().is_some_and(|name| *name == *manifest.id);
    anyhow::ensure!(own, "it says that it is snapshot {}", manifest.id);
    Ok(manifest)
}

/// Names of the bases and chunks that the snapshots on the disk need. One whose manifest cannot be read may
/// need any of them.
pub(super) fn named(snapshots: &Path) -> anyhow::Result<HashSet<String>> {
    let mut names = HashSet::new();
    for dir in directories(snapshots)? {
        let manifest = dir.join(FILE);
        if !manifest.exists() {
            continue;
        }
        let said: serde_json::Value = read_json(&manifest)?;
        // Those of the first format hold all of their memory themselves.
        if said["format"] == 1 {
            continue;
        }
        let said = Manifest::read(&manifest)?;
        names.insert(said.memory.base);
        let chunks = said.memory.chunks.into_iter();
        names.extend(chunks.map(|chunk| String::from(chunk.sha256)));
    }
    Ok(names)
}

/// Removes what no snapshot on the disk names. Nothing depends on it: what cannot be removed now is for the next time,
/// and nothing is while it cannot be known what is needed. `false`: the shelf was held.
pub(super) fn sweep(shelf: &Shelf, data_dir: &Path) -> bool {
    if let Err(error) = scratch::sweep(data_dir) {
        tracing::warn!("what killed processes have left is still there: {error:#}");
    }
    let snapshots = snapshots_dir(data_dir);
    if let Err(error) = archive::sweep(&snapshots, false) {
        tracing::warn!("what imports have left is still there: {error:#}");
    }
    match shelf.sweep(false, || named(&snapshots)) {
        Ok(Some(swept)) if swept.files > 0 => tracing::info!(
            files = swept.files,
            bytes = swept.bytes,
            "what no snapshot needs is removed"
        ),
        Ok(Some(_)) => {}
        Ok(None) => return false,
        Err(error) => tracing::warn!("what no snapshot needs is still there: {error:#}"),
    }
    true
}
