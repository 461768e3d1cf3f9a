//! `thaw bench peer`: restores by thaw and by Firecracker, in turn, of guests with the same kernel, initramfs, memory and
//! number of vCPUs.
//!
//! Firecracker's guest has brought up the same root file system and is idle. thaw's is its
//! template, which holds a warm interpreter besides: it is no lighter. Both memory files are in the page cache. The
//! time of each ends when the VM runs: thaw's worker says so, Firecracker answers the request to load and resume.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use thaw_vmm::machine::MachineKind;
use thaw_wire::layout::IDLE;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::restore::{self, first_generation};
use super::samples::Samples;
use crate::image::Image;
use crate::template::Templates;
use crate::worker::Launcher;

/// The guests' memory.
const MEMORY_MIB: u32 = 512;
/// Longest wait for Firecracker's guest to come up: it may run on emulated hardware.
const BOOT: Duration = Duration::from_secs(180);
/// Longest wait for an answer of Firecracker's.
const ANSWER: Duration = Duration::from_secs(60);
/// Pause between two rounds, so that tearing one VM down does not slow the next one's start.
const REST: Duration = Duration::from_millis(100);
/// How often to look for Firecracker's socket.
const LOOK: Duration = Duration::from_micros(200);
/// Firecracker's guest, by its command line: thaw's own agent, which there does nothing.
const CMDLINE: &str = "console=ttyS0 mitigations=off quiet reboot=k panic=-1 pci=off i8042.noaux i8042.nokbd \
     8250.nr_uarts=1 tsc=reliable -- --idle";

/// What was measured.
#[derive(Debug)]
pub struct Compared {
    /// thaw, from the start of the worker's process.
    pub thaw: Samples,
    /// Firecracker, from the start of its process.
    pub peer: Samples,
    /// thaw, from the order to the worker.
    pub thaw_load: Samples,
    /// Firecracker, from the request to load.
    pub peer_load: Samples,
    /// Firecracker's version, as it says it.
    pub version: String,
}

/// Restores `runs` VMs with each.
///
/// # Errors
/// This host's machine is not `hvm`, `firecracker` is none or does not work here, or a VM cannot be restored.
pub fn measure(
    data_dir: &Path,
    image: &str,
    firecracker: &Path,
    arguments: &[String],
    runs: usize,
) -> anyhow::Result<Compared> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let templates = Templates::open(data_dir, image)?;
        if templates.machine() != MachineKind::Hvm {
            bail!(
                "this host has no hardware virtualization, without which Firecracker does not start"
            );
        }
        let version = version(firecracker).await?;
        let dir = tempfile::tempdir().context("cannot make a temporary directory")?;
        let peer = Peer {
            program: firecracker.to_path_buf(),
            arguments: arguments.to_vec(),
            dir: dir.path().to_path_buf(),
        };
        peer.freeze(templates.image())
            .await
            .context("Firecracker's snapshot could not be made")?;
        let template = templates.get(MEMORY_MIB, 1).await?;
        let launcher = Launcher::this_program()?;
        let mut compared = Compared {
            thaw: Samples::new("thaw, process start to VM running"),
            peer: Samples::new("Firecracker, process start to VM running"),
            thaw_load: Samples::new("thaw, order to VM running"),
            peer_load: Samples::new("Firecracker, request to VM running"),
            version,
        };
        let first = first_generation()?;
        // The first round of each brings programs and memory into the page cache.
        for run in 0..=runs as u64 {
            let restored = restore::once(&launcher, &template, first + run).await?;
            restored.worker.end().await;
            tokio::time::sleep(REST).await;
            let peer = peer
                .load()
                .await
                .context("Firecracker did not load its snapshot")?;
            tokio::time::sleep(REST).await;
            if run > 0 {
                compared.thaw.add(restored.running);
                compared
                    .thaw_load
                    .add(restored.running.saturating_sub(restored.ordered));
                compared.peer.add(peer.total);
                compared.peer_load.add(peer.load);
            }
        }
        Ok(compared)
    })
}

async fn version(program: &Path) -> anyhow::Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .await
        .with_context(|| format!("cannot run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if line.starts_with("Firecracker") => Ok(line.to_owned()),
        _ => bail!(
            "{} is not Firecracker: it answers --version with {text:?}",
            program.display()
        ),
    }
}

/// Firecracker, and a directory for its files.
struct Peer {
    program: PathBuf,
    arguments: Vec<String>,
    dir: PathBuf,
}

/// How long one load took.
struct Loaded {
    total: Duration,
    load: Duration,
}

/// A running Firecracker; dropped, it ends.
struct Running {
    process: Child,
    api: http1::SendRequest<Full<Bytes>>,
}

impl Peer {
    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    async fn start(&self, console: Stdio) -> anyhow::Result<Running> {
        let socket = self.dir.join("api.sock");
        if let Err(error) = std::fs::remove_file(&socket)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error).context("cannot remove the socket of the last run");
        }
        let process = Command::new(&self.program)
            .args(["--id", "thaw-bench", "--api-sock"])
            .arg(&socket)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(console)
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        let began = Instant::now();
        let stream = loop {
            match UnixStream::connect(&socket).await {
                Ok(stream) => break stream,
                Err(error) if began.elapsed() > ANSWER => {
                    return Err(error).context("Firecracker opens no socket");
                }
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        };
        let (api, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "Firecracker's socket");
            }
        });
        Ok(Running { process, api })
    }

    /// Boots a guest, waits until it is idle, and snapshots it.
    async fn freeze(&self, image: &Image) -> anyhow::Result<()> {
        // A file, which it can write to whether or not anybody reads.
        let console = self.dir.join("console");
        let file = std::fs::File::create(&console).context("cannot make a file for its console")?;
        let mut running = self.start(file.into()).await?;
        let boot = json!({
            "kernel_image_path": image.kernel_path(),
            "initrd_path": image.initramfs_path(),
            "boot_args": CMDLINE,
        });
        let machine = json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB });
        running
            .ask(Method::PUT, "/machine-config", &machine)
            .await?;
        running.ask(Method::PUT, "/boot-source", &boot).await?;
        running
            .ask(
                Method::PUT,
                "/actions",
                &json!({ "action_type": "InstanceStart" }),
            )
            .await?;
        let up = async {
            while !String::from_utf8_lossy(&std::fs::read(&console)?).contains(IDLE) {
                if let Some(status) = running.process.try_wait()? {
                    bail!("it ended: {status}");
                }
                tokio::time::sleep(REST).await;
            }
            Ok(())
        };
        tokio::time::timeout(BOOT, up)
            .await
            .context("its guest did not come up in time")??;
        tokio::time::sleep(Duration::from_secs(1)).await;
        running
            .ask(Method::PATCH, "/vm", &json!({ "state": "Paused" }))
            .await?;
        let create = json!({
            "snapshot_type": "Full",
            "snapshot_path": self.path("state"),
            "mem_file_path": self.path("memory"),
        });
        running
            .ask(Method::PUT, "/snapshot/create", &create)
            .await?;
        running.end().await
    }

    async fn load(&self) -> anyhow::Result<Loaded> {
        let start = Instant::now();
        let mut running = self.start(Stdio::null()).await?;
        let load = json!({
            "snapshot_path": self.path("state"),
            "mem_backend": { "backend_type": "File", "backend_path": self.path("memory") },
            "resume_vm": true,
        });
        let asked = Instant::now();
        running.ask(Method::PUT, "/snapshot/load", &load).await?;
        let loaded = Loaded {
            total: start.elapsed(),
            load: asked.elapsed(),
        };
        running.end().await?;
        Ok(loaded)
    }
}

impl Running {
    async fn ask(&mut self, method: Method, path: &str, body: &Value) -> anyhow::Result<()> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .header("Content-Type", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))?;
        let exchange = async {
            self.api.ready().await?;
            let answer = self.api.send_request(request).await?;
            let status = answer.status();
            let body = answer.into_body().collect().await?.to_bytes();
            anyhow::Ok((status, body))
        };
        let (status, body) = tokio::time::timeout(ANSWER, exchange)
            .await
            .with_context(|| format!("no answer to {path}"))?
            .with_context(|| format!("asking {path}"))?;
        if !status.is_success() {
            bail!("{path}: {status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(())
    }

    async fn end(mut self) -> anyhow::Result<()> {
        Ok(self.process.kill().await?)
    }
}
