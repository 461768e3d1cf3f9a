//! Build script: lists the guest's files that the `thaw` binary carries, so that adding a
//! recipe or a runner module needs no second place to change; and fingerprints the sources that
//! a frozen VM depends on, so that none is thawed by code that does not fit it.

use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

/// Files directly in `dir` that end in one of the `extensions`, in order of their names.
fn files(dir: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    println!("cargo::rerun-if-changed={}", dir.display());
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            let found = path.extension().and_then(|found| found.to_str());
            found.is_some_and(|found| extensions.contains(&found))
        })
        .collect();
    found.sort();
    found
}

fn table(name: &str, doc: &str, files: &[PathBuf]) -> String {
    let mut text = format!("/// {doc}\npub static {name}: &[(&str, &[u8])] = &[\n");
    for file in files {
        let base = file
            .file_name()
            .and_then(|name| name.to_str())
            .expect("file names are UTF-8");
        writeln!(text, "    ({base:?}, include_bytes!({file:?})),").expect("writing to a string");
    }
    text.push_str("];\n");
    text
}

/// Feeds every file below `path`, in order of their names, to the hasher.
fn fingerprint(path: &Path, hasher: &mut impl Hasher) {
    if path.is_dir() {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(path)
            .expect("the sources are readable")
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .collect();
        entries.sort();
        for entry in entries {
            fingerprint(&entry, hasher);
        }
    } else {
        path.file_name().hash(hasher);
        std::fs::read(path)
            .expect("the sources are readable")
            .hash(hasher);
    }
}

fn main() {
    let workspace = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    // Not a digest against forgery: it tells apart what one person built at different times.
    let mut hasher = std::hash::DefaultHasher::new();
    for sources in ["vmm/src", "rootfs/wire/src"] {
        let sources = workspace.join(sources);
        println!("cargo::rerun-if-changed={}", sources.display());
        fingerprint(&sources, &mut hasher);
    }
    println!("cargo::rustc-env=THAW_VMM_SOURCES={:016x}", hasher.finish());
    let root = workspace.join("rootfs");
    let text = table(
        "RECIPES",
        "Recipes that come with thaw: file name and text.",
        &files(&root.join("recipes"), &["toml"]),
    ) + &table(
        "RUNNER",
        "The runners' modules: file name and text, in order of their names.",
        &files(&root.join("runner"), &["py", "js"]),
    );
    std::fs::write(out.join("embedded.rs"), text).expect("the output directory is writable");
}
