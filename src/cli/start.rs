//! From an image to sessions: what `thaw serve` needs before it can take requests.

use std::path::Path;

use anyhow::{Context, anyhow};
use prometheus_client::registry::Registry;
use thaw_vmm::machine::MachineKind;
use thaw_vmm::protocol::Tuning;

use super::exit;
use crate::config::Config;
use crate::image::Image;
use crate::session::{Sessions, Workers};
use crate::store::Store;
use crate::template::Templates;
use crate::worker::Launcher;

/// Images that are tried in this order when none is named.
const IMAGES: [&str; 2] = ["standard", "minimal"];

/// Sessions, and what the ready line says about them.
pub(super) struct Started {
    pub(super) sessions: Sessions,
    pub(super) facts: String,
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
    let machine = machine(&config.vm.machine)?;
    let (dir, name) = (data_dir.clone(), image.clone());
    // The probe and the image's files are read on a thread that may block.
    let templates = tokio::task::spawn_blocking(move || match machine {
        Some(machine) => Templates::open_on(&dir, &name, machine),
        None => Templates::open(&dir, &name),
    })
    .await
    .context("opening the image was cut short")?
    .map_err(|error| exit::with(exit::IMAGE, error))?;

    let shape = config.session.pool_shape();
    let template = templates
        .get(shape.memory_mib, shape.vcpus)
        .await
        .with_context(|| format!("no template can be made of the image {image}"))
        .map_err(|error| exit::with(exit::IMAGE, error))?;
    let facts = format!(
        "image {image}, kernel {}, machine {}, {} MiB",
        template.manifest.kernel,
        crate::template::machine_name(template.manifest.machine),
        template.manifest.memory_mib,
    );
    let launcher = Launcher::this_program().context("cannot tell where this program is")?;
    let workers = Workers::new(launcher, templates, Tuning::default());
    let sessions = Sessions::start(config.session.clone(), store.clone(), workers, registry)
        .await
        .map_err(|error| exit::with(exit::DATA_DIR, error))?;
    Ok(Started { sessions, facts })
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
