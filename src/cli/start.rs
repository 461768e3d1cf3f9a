//! From an image to sessions: what `thaw serve` needs before it can take requests.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use prometheus_client::registry::Registry;
use thaw_vmm::machine::MachineKind;
use thaw_vmm::protocol::Tuning;

use super::exit;
use crate::audit::Audit;
use crate::config::Config;
use crate::image::Image;
use crate::session::{Sessions, Workers};
use crate::snapshots::{Ground, Snapshots};
use crate::store::Store;
use crate::template::Templates;
use crate::vms::{Ledger, Vms};
use crate::worker::Launcher;

/// Images that are tried in this order when none is named.
const IMAGES: [&str; 2] = ["standard", "minimal"];

/// Sessions, and what the ready line says about them.
pub(super) struct Started {
    pub(super) sessions: Sessions,
    pub(super) vms: Vms,
    pub(super) facts: String,
    /// How VMs run their kernel.
    pub(super) machine: &'static str,
}

/// What can be told at once to be missing or wrong, before anything is made that cannot be made again.
///
/// # Errors
/// There is no image that can be used, or the machine has no such name; the exit code says so.
pub(super) fn check(config: &Config) -> anyhow::Result<()> {
    let data_dir = &config.server.data_dir;
    let image = image(data_dir, &config.server.image)?;
    machine(&config.vm.machine)?;
    match Image::open(data_dir, &image) {
        Ok(_) => Ok(()),
        Err(error) => Err(exit::with(exit::IMAGE, error)),
    }
}

/// Opens the image, makes or finds its template, and begins to fill the pool.
///
/// # Errors
/// There is no image, or no template can be made of it; the exit code says so.
pub(super) async fn sessions(
    config: &Config,
    store: &Store,
    registry: &mut Registry,
) -> anyhow::Result<Started> {
    let data_dir = &config.server.data_dir;
    let image = image(data_dir, &config.server.image)?;
    let chosen = machine(&config.vm.machine)?;
    let (dir, name) = (data_dir.clone(), image.clone());
    // The probe and the image's files are read on a thread that may block.
    let templates = tokio::task::spawn_blocking(move || match chosen {
        Some(machine) => Templates::open_on(&dir, &name, machine),
        None => Templates::open(&dir, &name),
    })
    .await
    .context("opening the image was cut short")?
    .map_err(|error| exit::with(exit::IMAGE, error))?;

    let mut session = config.session.clone();
    session.fit(crate::template::round_up(
        templates.image().manifest.min_memory_mib,
    ));
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    session
        .fit_machine(
            templates.machine(),
            u32::try_from(processors).unwrap_or(u32::MAX),
        )
        .map_err(|why| exit::with(exit::CONFIG, anyhow!(why)))?;
    if templates.machine() == MachineKind::Pv && session.max_vcpus > 1 {
        tracing::warn!(
            max_vcpus = session.max_vcpus,
            "VMs may have several vCPUs on the pv machine: programs that compute on them gain, those whose threads wake one another lose (docs/design.md)"
        );
    }
    let shape = session.pool_shape();
    let template = templates
        .get(shape.memory_mib, shape.vcpus)
        .await
        .with_context(|| format!("no template can be made of the image {image}"))
        .map_err(|error| exit::with(exit::IMAGE, error))?;
    let machine = template.manifest.machine.name();
    let facts = format!(
        "image {image}, kernel {}, machine {machine}, {} MiB",
        template.manifest.kernel, template.manifest.memory_mib,
    );
    let ground = Ground {
        image: template.manifest.image.clone(),
        image_name: template.manifest.image_name.clone(),
        machine: template.manifest.machine,
    };
    let ledger = ledger(config, store, ground)
        .await
        .map_err(|error| exit::with(exit::DATA_DIR, error))?;
    let launcher = Launcher::this_program().context("cannot tell where this program is")?;
    let workers = Workers::new(launcher, templates, Tuning::default());
    let sessions = Sessions::start(session, store.clone(), workers, ledger.clone(), registry)
        .await
        .map_err(|error| exit::with(exit::DATA_DIR, error))?;
    let suspend_wait = Duration::from_secs(config.snapshot.suspend_wait_s);
    let vms = Vms::new(sessions.clone(), ledger, suspend_wait);
    let idle = Duration::from_secs(config.snapshot.hibernate_after_s);
    if !idle.is_zero() {
        tokio::spawn(vms.clone().hibernate_idle(idle));
    }
    tokio::spawn(vms.clone().expire_tapes());
    let idle = Duration::from_secs(config.snapshot.pressure_idle_s);
    if !idle.is_zero() {
        let wanted = sessions.room_wanted();
        tokio::spawn(vms.clone().hibernate_for_room(idle, wanted));
    }
    Ok(Started {
        sessions,
        vms,
        facts,
        machine,
    })
}

/// The records of VMs, and the snapshots that they may be frozen in.
async fn ledger(config: &Config, store: &Store, ground: Ground) -> anyhow::Result<Arc<Ledger>> {
    let (dir, snapshot) = (config.server.data_dir.clone(), config.snapshot.clone());
    let snapshots = tokio::task::spawn_blocking(move || Snapshots::open(&dir, ground, snapshot))
        .await
        .context("looking for snapshots was cut short")??;
    let audit = Audit::start(store.clone(), config.audit.clone());
    let keep = config.vm.keep_records;
    let snapshots = Arc::new(snapshots);
    tokio::spawn(snapshots.clone().keep_swept());
    Ok(Ledger::open(store.clone(), audit, snapshots, keep).await?)
}

/// The image's name: the configured one, else the first that is built.
fn image(data_dir: &Path, configured: &str) -> anyhow::Result<String> {
    if !configured.is_empty() {
        return Ok(configured.to_owned());
    }
    IMAGES
        .into_iter()
        .find(|name| Image::open(data_dir, name).is_ok())
        .map(str::to_owned)
        .ok_or_else(|| {
            exit::with(
                exit::IMAGE,
                anyhow!(
                    "there is no image in {}; build one with `thaw image build minimal`",
                    data_dir.display()
                ),
            )
        })
}

/// The machine that the configuration names; `None` for the one that the probe finds.
fn machine(configured: &str) -> anyhow::Result<Option<MachineKind>> {
    match configured {
        "auto" => Ok(None),
        "pv" => Ok(Some(MachineKind::Pv)),
        "hvm" => Ok(Some(MachineKind::Hvm)),
        other => Err(exit::with(
            exit::CONFIG,
            anyhow!("vm.machine is {other:?}: it must be auto, pv or hvm"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_an_image_nothing_is_begun() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.server.data_dir = dir.path().into();
        for name in ["", "mine"] {
            config.server.image = name.into();
            let error = check(&config).unwrap_err();
            assert_eq!(exit::code(&error), exit::IMAGE.into(), "{error:#}");
        }
    }
}
