//! Which kernel modules a guest gets, and in what order they load.
//!
//! A kernel package holds no `modules.dep` (the installing system makes it), so dependencies are
//! read where that file's come from: the `depends=` line of each module's `.modinfo` section.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use thaw_wire::layout::{BELL_LINE, BELL_PORT};

/// A module that is neither a file nor built in.
#[derive(Debug, thiserror::Error)]
#[error(
    "the kernel has no module {0}; the image needs a kernel of the ordinary (not the cloud) flavour"
)]
pub struct MissingModule(pub String);

/// What every guest needs: its root (loop, squashfs, overlay), the wire's interrupt (xen-evtchn on the `pv` machine,
/// the parallel port's drivers on `hvm`), and, for what streams over the wire later, tun and fuse.
pub const WANTED: [&str; 8] = [
    "loop",
    "squashfs",
    "overlay",
    "xen-evtchn",
    "parport_pc",
    "ppdev",
    "tun",
    "fuse",
];

/// Modules for one machine alone; the others are for all.
const PV: &[&str] = &["xen_evtchn"];
const HVM: &[&str] = &["parport", "parport_pc", "ppdev"];

/// Parameters of a module: with the port named, the parallel port's driver does not search the bus for others.
fn parameters(module: &str) -> String {
    match module {
        "parport_pc" => format!(" io={BELL_PORT:#x} irq={BELL_LINE}"),
        _ => String::new(),
    }
}

/// A module that goes into the initramfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// File name, ending in `.ko`.
    pub file: String,
    /// Its bytes, uncompressed.
    pub bytes: Vec<u8>,
}

impl Module {
    /// Its normal name.
    fn name(&self) -> String {
        normal(self.file.trim_end_matches(".ko"))
    }
}

/// The lists that the agent loads modules by, with their names: first that of every machine.
pub fn orders(modules: &[Module]) -> [(&'static str, String); 3] {
    let mut orders = ["order", "order.pv", "order.hvm"].map(|name| (name, String::new()));
    for module in modules {
        let name = module.name();
        let list = match name.as_str() {
            name if PV.contains(&name) => 1,
            name if HVM.contains(&name) => 2,
            _ => 0,
        };
        let text = &mut orders[list].1;
        text.push_str(&module.file);
        text.push_str(&parameters(&name));
        text.push('\n');
    }
    orders
}

/// Whether all that a guest needs is among these files; what is built into the kernel counts as missing.
pub fn complete(files: &[String]) -> bool {
    WANTED.iter().all(|wanted| {
        files
            .iter()
            .any(|file| normal(file.trim_end_matches(".ko")) == normal(wanted))
    })
}

/// Modules found under a kernel's module directory, by normal name, and those built in.
#[derive(Debug)]
pub struct Tree {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// `-` and `_` mean the same in a module's name.
pub(super) fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// A module's name, from the name of its file.
pub(super) fn stem(file: &str) -> Option<&str> {
    let file = file
        .strip_suffix(".xz")
        .or(file.strip_suffix(".zst"))
        .unwrap_or(file);
    file.strip_suffix(".ko")
}

impl Tree {
    /// Looks through `lib/modules/<release>`.
    ///
    /// # Errors
    /// The directory or its `modules.builtin` cannot be read.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let list = dir.join("modules.builtin");
        let text = std::fs::read_to_string(&list)
            .with_context(|| format!("cannot read {}", list.display()))?;
        let builtin = text
            .lines()
            .filter_map(|line| stem(line.rsplit('/').next()?).map(normal))
            .collect();
        let mut files = BTreeMap::new();
        let mut pending = vec![dir.to_path_buf()];
        while let Some(dir) = pending.pop() {
            for entry in
                std::fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?
            {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    pending.push(entry.path());
                } else if let Some(name) = entry.file_name().to_str().and_then(stem) {
                    files.insert(normal(name), entry.path());
                }
            }
        }
        Ok(Self { files, builtin })
    }

    /// The wanted modules with all they depend on, each after what it depends on. Those built
    /// into the kernel are left out.
    ///
    /// # Errors
    /// One exists neither as a file nor built in, cannot be read, or they depend on each other in a circle.
    pub fn closure(&self, wanted: &[&str]) -> anyhow::Result<Vec<Module>> {
        order(wanted, |name| self.load(name))
    }

    fn load(&self, name: &str) -> anyhow::Result<Option<Module>> {
        if self.builtin.contains(&normal(name)) {
            return Ok(None);
        }
        let Some(path) = self.files.get(&normal(name)) else {
            return Err(MissingModule(name.to_owned()).into());
        };
        let raw = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let bytes = match path.extension().and_then(|ext| ext.to_str()) {
            Some("xz") => {
                let mut bytes = Vec::new();
                std::io::copy(&mut liblzma::read::XzDecoder::new(&raw[..]), &mut bytes)
                    .with_context(|| format!("{} is damaged", path.display()))?;
                bytes
            }
            Some("zst") => zstd::decode_all(&raw[..])
                .with_context(|| format!("{} is damaged", path.display()))?,
            _ => raw,
        };
        let base = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(stem)
            .unwrap_or(name);
        Ok(Some(Module {
            file: format!("{base}.ko"),
            bytes,
        }))
    }
}

/// Depth-first order over `depends=`; `load` gives `None` for what is built in.
fn order(
    wanted: &[&str],
    mut load: impl FnMut(&str) -> anyhow::Result<Option<Module>>,
) -> anyhow::Result<Vec<Module>> {
    enum Step {
        Enter(String),
        Leave(Option<Module>),
    }
    let mut done = BTreeSet::new();
    let mut open = BTreeSet::new();
    let mut result = Vec::new();
    for first in wanted {
        let mut steps = vec![Step::Enter((*first).to_owned())];
        while let Some(step) = steps.pop() {
            match step {
                Step::Leave(module) => {
                    if let Some(module) = module {
                        let name = normal(module.file.trim_end_matches(".ko"));
                        open.remove(&name);
                        done.insert(name);
                        result.push(module);
                    }
                }
                Step::Enter(name) => {
                    if done.contains(&normal(&name)) {
                        continue;
                    }
                    if !open.insert(normal(&name)) {
                        bail!("kernel module {name} depends on itself");
                    }
                    let module = load(&name)?;
                    let needs = match &module {
                        Some(module) => depends(&module.bytes)
                            .with_context(|| format!("kernel module {name} is malformed"))?,
                        None => {
                            open.remove(&normal(&name));
                            done.insert(normal(&name));
                            continue;
                        }
                    };
                    steps.push(Step::Leave(module));
                    // Reversed, so that they load in the order in which they are named.
                    steps.extend(needs.into_iter().rev().map(Step::Enter));
                }
            }
        }
    }
    Ok(result)
}

/// What a module's `.modinfo` says it depends on.
///
/// # Errors
/// It is not a 64-bit little-endian ELF file with that section.
fn depends(elf: &[u8]) -> anyhow::Result<Vec<String>> {
    let info = section(elf, b".modinfo").context("there is no .modinfo section")?;
    Ok(info
        .split(|byte| *byte == 0)
        .find_map(|line| line.strip_prefix(b"depends="))
        .map(|list| {
            String::from_utf8_lossy(list)
                .split(',')
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .collect()
        })
        .unwrap_or_default())
}

/// A section's bytes, by name, in a 64-bit little-endian ELF file.
fn section<'a>(elf: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let u64_at = |at: usize| {
        Some(u64::from_le_bytes(
            elf.get(at..at.checked_add(8)?)?.try_into().ok()?,
        ))
    };
    let u32_at = |at: usize| {
        Some(u32::from_le_bytes(
            elf.get(at..at.checked_add(4)?)?.try_into().ok()?,
        ))
    };
    let u16_at = |at: usize| {
        Some(u16::from_le_bytes(
            elf.get(at..at.checked_add(2)?)?.try_into().ok()?,
        ))
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = usize::try_from(u64_at(0x28)?).ok()?;
    let size = usize::from(u16_at(0x3a)?);
    let count = usize::from(u16_at(0x3c)?);
    let names = usize::from(u16_at(0x3e)?);
    let header = |index: usize| table.checked_add(index.checked_mul(size)?);
    let content = |at: usize| {
        let start = usize::try_from(u64_at(at.checked_add(0x18)?)?).ok()?;
        let length = usize::try_from(u64_at(at.checked_add(0x20)?)?).ok()?;
        elf.get(start..start.checked_add(length)?)
    };
    let names = content(header(names)?)?;
    (0..count).find_map(|index| {
        let at = header(index)?;
        let name = names.get(u32_at(at)? as usize..)?;
        let name = name.split(|byte| *byte == 0).next()?;
        if name == wanted { content(at) } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A minimal ELF object with a `.modinfo` section.
    fn object(depends: &str) -> Vec<u8> {
        let info = format!("license=GPL\0depends={depends}\0name=x\0").into_bytes();
        let names = b"\0.modinfo\0".to_vec();
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let info_at = elf.len();
        elf.extend_from_slice(&info);
        let names_at = elf.len();
        elf.extend_from_slice(&names);
        let table = elf.len() as u64;
        elf[0x28..0x30].copy_from_slice(&table.to_le_bytes());
        elf[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        elf[0x3c..0x3e].copy_from_slice(&2u16.to_le_bytes());
        elf[0x3e..0x40].copy_from_slice(&0u16.to_le_bytes());
        for (name, at, len) in [(0u32, names_at, names.len()), (1, info_at, info.len())] {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(len as u64).to_le_bytes());
            elf.extend_from_slice(&header);
        }
        elf
    }

    fn tree(modules: &[(&str, &str)], builtin: &str) -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("kernel/fs")).unwrap();
        for (name, needs) in modules {
            std::fs::write(
                dir.path().join("kernel/fs").join(format!("{name}.ko")),
                object(needs),
            )
            .unwrap();
        }
        std::fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        (dir, tree)
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.file.as_str()).collect()
    }

    #[test]
    fn modules_are_listed_by_machine_and_with_their_parameters() {
        let module = |file: &str| Module {
            file: file.to_owned(),
            bytes: Vec::new(),
        };
        let modules = ["loop.ko", "xen-evtchn.ko", "parport.ko", "parport_pc.ko"].map(module);
        let [all, pv, hvm] = orders(&modules);
        assert_eq!(all, ("order", "loop.ko\n".to_owned()));
        assert_eq!(pv, ("order.pv", "xen-evtchn.ko\n".to_owned()));
        let lines = "parport.ko\nparport_pc.ko io=0x378 irq=7\n";
        assert_eq!(hvm, ("order.hvm", lines.to_owned()));
        assert!(!complete(&["loop.ko".to_owned()]));
        let all = WANTED.map(|name| format!("{name}.ko"));
        assert!(complete(&all));
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let (_dir, tree) = tree(
            &[
                ("a", "b,c-d"),
                ("b", "e"),
                ("c_d", "e"),
                ("e", ""),
                ("other", ""),
            ],
            "kernel/fs/fuse.ko\n",
        );
        let found = tree.closure(&["a", "fuse", "e"]).unwrap();
        assert_eq!(names(&found), ["e.ko", "b.ko", "c_d.ko", "a.ko"]);
    }

    #[test]
    fn what_is_missing_or_circular_is_named() {
        let (_dir, tree) = tree(&[("a", "b"), ("b", "a"), ("c", "gone")], "");
        assert!(
            tree.closure(&["a"])
                .unwrap_err()
                .to_string()
                .contains("depends on itself")
        );
        assert!(
            tree.closure(&["c"])
                .unwrap_err()
                .to_string()
                .contains("gone")
        );
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        let (dir, _) = tree(&[], "");
        let packed = zstd::encode_all(&object("")[..], 1).unwrap();
        std::fs::write(dir.path().join("kernel/fs/tun.ko.zst"), packed).unwrap();
        let found = Tree::open(dir.path()).unwrap().closure(&["tun"]).unwrap();
        assert_eq!(
            found,
            [Module {
                file: "tun.ko".into(),
                bytes: object("")
            }]
        );
    }

    #[test]
    fn damaged_objects_are_errors() {
        assert!(depends(b"").is_err());
        let mut elf = object("");
        elf[0x28..0x30].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(depends(&elf).is_err());
        elf.truncate(70);
        assert!(depends(&elf).is_err());
    }
}
