//! Building a template: boot, warm, freeze, then prove that a clone of it works.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use rand::Rng;
use thaw_vmm::protocol::{Boot, Restore, Tuning};
use thaw_wire::message::{Language, Ready, Renew};

use super::manifest::{self, FORMAT, Manifest};
use super::vm::{Ran, TrialVm};
use super::{Inner, Shape, Template, cpu::Cpu, directory_name, generation, memory, templates_dir};
use crate::image::manifest::Part;
use crate::image::scratch::Scratch;

/// Longest wait for any one step. A boot takes a second or two, importing numpy as long; a host
/// that needs a minute is not fit to serve.
const STEP: Duration = Duration::from_secs(60);

/// Run before freezing, so that their paths are warm. They leave nothing in the session.
const TRIALS: &[(Language, &str, &str)] = &[
    (Language::Python, "print(1)", "1\n"),
    (Language::Bash, "echo 1", "1\n"),
    (Language::Python, "print(1)", "1\n"),
];

/// What every clone is tried with, and whose pages are the working set.
const PROOF: (Language, &str, &str) = (Language::Python, "print(1)", "1\n");

/// The template of a shape: from disk when it is there and sound, else built.
pub(super) async fn load_or_build(
    inner: &Inner,
    shape: Shape,
    fresh: bool,
) -> anyhow::Result<(Template, bool)> {
    let parent = templates_dir(&inner.data_dir);
    let name = directory_name(&inner.image.manifest.digest, shape);
    let dir = parent.join(&name);
    if !fresh && let Some(template) = load(&dir).await? {
        return Ok((template, true));
    }
    // Another process may be building the same: one at a time, and whoever comes second finds it made.
    let _lock = blocking({
        let (parent, name) = (parent.clone(), name.clone());
        move || lock(&parent, &name)
    })
    .await?;
    if !fresh && let Some(template) = load(&dir).await? {
        return Ok((template, true));
    }
    let started = Instant::now();
    tracing::info!(template = name, "building a template");
    build(inner, shape, &dir).await.with_context(|| {
        format!(
            "cannot build template {name} of image {}",
            inner.image.manifest.name
        )
    })?;
    let template = blocking(move || Template::load(&dir)).await?;
    tracing::info!(
        template = name,
        ms = started.elapsed().as_millis(),
        pages = template.manifest.memory.pages,
        "template built"
    );
    Ok((template, false))
}

/// Loads what is on disk. One that cannot be used counts as none: it is built again.
async fn load(dir: &Path) -> anyhow::Result<Option<Template>> {
    if !dir.join(manifest::FILE).exists() {
        return Ok(None);
    }
    let dir = dir.to_path_buf();
    blocking(move || match Template::load(&dir) {
        Ok(template) => Ok(Some(template)),
        Err(error) => {
            tracing::warn!(
                "template {} cannot be used and is built again: {error:#}",
                dir.display()
            );
            Ok(None)
        }
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .context("a background job was cut short")?
}

fn lock(parent: &Path, name: &str) -> anyhow::Result<File> {
    std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let path = parent.join(format!(".{name}.lock"));
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.lock()
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

async fn build(inner: &Inner, shape: Shape, dir: &Path) -> anyhow::Result<()> {
    let started = Instant::now();
    let scratch = blocking({
        let data_dir = inner.data_dir.clone();
        move || Scratch::new(&data_dir)
    })
    .await?;
    let out = scratch.path().join("template");
    std::fs::create_dir(&out).context("cannot make the template's directory")?;

    let (ready, boot_ms) = freeze(inner, shape, &out)
        .await
        .context("booting and freezing failed")?;
    let measured = measure(&out).await?;
    let pages = prove(inner, &out, measured.memory.bytes)
        .await
        .context("a clone of it does not work, so it is not used")?;
    tracing::debug!(pages, "working set recorded");
    let manifest = Manifest {
        format: FORMAT,
        image: inner.image.manifest.digest.clone(),
        image_name: inner.image.manifest.name.clone(),
        machine: shape.machine,
        memory_mib: shape.memory_mib,
        vcpus: shape.vcpus,
        thaw: env!("CARGO_PKG_VERSION").to_owned(),
        sources: manifest::SOURCES.to_owned(),
        wire: thaw_wire::layout::VERSION,
        kernel: ready.kernel,
        cpu: Cpu::host()?,
        created_at: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        boot_ms,
        build_ms: millis(started),
        warm: inner.image.manifest.warm.clone(),
        state: measured.state,
        memory: measured.memory,
        working_set: Part::of_file(&out.join(manifest::WORKING_SET))?,
    };
    let dir = dir.to_path_buf();
    blocking(move || publish(&scratch, &out, &manifest, &dir)).await
}

/// Boots, warms and freezes; gives what the agent said and how long it took to say it.
async fn freeze(inner: &Inner, shape: Shape, out: &Path) -> anyhow::Result<(Ready, u64)> {
    let boot = Boot {
        memory_mib: shape.memory_mib,
        vcpus: shape.vcpus,
        cmdline: shape.machine.cmdline().to_owned(),
        machine: Some(shape.machine),
        tuning: Tuning::default(),
    };
    let started = Instant::now();
    let mut vm = within(
        "boot",
        inner
            .vms
            .boot(inner.image.kernel()?, inner.image.initramfs()?, boot),
    )
    .await?;
    let boot_ms = millis(started);
    let ready = vm.ready().clone();
    let modules = inner.image.manifest.warm.clone();
    let missing = within("warm", vm.warm(modules)).await?;
    if !missing.is_empty() {
        bail!("these modules of the recipe cannot be imported: {missing:?}");
    }
    for trial in TRIALS {
        try_command(&mut *vm, *trial).await?;
    }
    within("quiesce", vm.quiesce()).await?;
    let state = create(&out.join(manifest::STATE))?;
    let memory = create(&out.join(manifest::MEMORY))?;
    within("save", vm.save(state, memory)).await?;
    vm.end().await;
    Ok((ready, boot_ms))
}

struct Measured {
    state: Part,
    memory: manifest::MemoryPart,
}

async fn measure(out: &Path) -> anyhow::Result<Measured> {
    let out = out.to_path_buf();
    blocking(move || {
        Ok(Measured {
            state: Part::of_file(&out.join(manifest::STATE))?,
            memory: memory::measure(&open(&out.join(manifest::MEMORY))?)?,
        })
    })
    .await
}

/// Restores a clone as a server would, makes it an individual, runs a command, and records the
/// pages that it wrote: the working set. Gives their number.
async fn prove(inner: &Inner, out: &Path, bytes: u64) -> anyhow::Result<u64> {
    let sealed = blocking({
        let path = out.join(manifest::MEMORY);
        move || memory::seal(&open(&path)?, bytes)
    })
    .await?;
    let generation = generation();
    let restore = Restore {
        generation,
        working_set: false,
        overlays: None,
        tuning: Tuning::default(),
    };
    let state = open(&out.join(manifest::STATE))?;
    let mut vm = within("restore", inner.vms.restore(state, sealed, None, restore)).await?;
    if vm.ready().generation != generation {
        bail!(
            "the clone's agent says generation {}, it was given {generation}",
            vm.ready().generation
        );
    }
    within("renew", vm.renew(identity(generation))).await?;
    try_command(&mut *vm, PROOF).await?;
    let list = create(&out.join(manifest::WORKING_SET))?;
    let pages = within("list of written pages", vm.touched(list)).await?;
    vm.end().await;
    Ok(pages)
}

/// A throw-away identity.
fn identity(generation: u64) -> Renew {
    let mut rng = rand::rng();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Renew {
        generation,
        seed: hex::encode(rng.random::<[u8; 32]>()),
        wall_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        hostname: "thaw-trial".to_owned(),
        machine_id: hex::encode(rng.random::<[u8; 16]>()),
        env: BTreeMap::new(),
        terminals: Vec::new(),
    }
}

async fn try_command(vm: &mut dyn TrialVm, trial: (Language, &str, &str)) -> anyhow::Result<()> {
    let (language, code, expected) = trial;
    let command = crate::worker::command(language, code, STEP);
    let Ran {
        stdout,
        stderr,
        exit,
    } = within(code, vm.execute(command)).await?;
    if exit.exit_code != 0 || stdout != expected.as_bytes() {
        bail!(
            "`{code}` ended with code {} and wrote {:?} (expected {expected:?}), errors: {:?}",
            exit.exit_code,
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr),
        );
    }
    Ok(())
}

async fn within<T>(what: &str, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::time::timeout(STEP, work)
        .await
        .with_context(|| format!("{what}: no answer within {} s", STEP.as_secs()))?
        .with_context(|| format!("{what} failed"))
}

/// Gives the finished directory its name. A template of the same name makes way.
fn publish(scratch: &Scratch, out: &Path, manifest: &Manifest, dir: &Path) -> anyhow::Result<()> {
    for name in [manifest::STATE, manifest::MEMORY, manifest::WORKING_SET] {
        open(&out.join(name))?
            .sync_all()
            .with_context(|| format!("cannot flush {name}"))?;
    }
    manifest.write(&out.join(manifest::FILE))?;
    if dir.exists() {
        let old: PathBuf = scratch.path().join("old");
        std::fs::rename(dir, &old)
            .with_context(|| format!("cannot move {} out of the way", dir.display()))?;
    }
    std::fs::rename(out, dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let parent = dir.parent().unwrap_or(dir);
    open(parent)?
        .sync_all()
        .with_context(|| format!("cannot flush {}", parent.display()))
}

fn create(path: &Path) -> anyhow::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("cannot make {}", path.display()))
}

fn open(path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

fn millis(since: Instant) -> u64 {
    millis_of(since.elapsed())
}

fn millis_of(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
