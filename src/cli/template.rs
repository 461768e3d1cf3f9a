//! `thaw template`: building, listing, inspecting, verifying and removing templates.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use thaw_vmm::machine::MachineKind;

use super::table::{Table, human_bytes, human_date};
use super::{DataDir, exit};
use crate::image::host_tools::Cancel;
use crate::template::{self, Listed, Manifest, Templates};

/// Build, list, inspect, verify and remove templates.
#[derive(Debug, Args)]
#[command(after_help = "\
A template is an image that was booted once, with its interpreter warm, and frozen; new VMs are
restored from it in milliseconds. `thaw serve` builds what it needs by itself.
  thaw template build minimal              the template that sessions use by default
  thaw template build standard -m 2048     one for VMs of 2 GiB
  thaw template verify NAME                read every byte and compare digests
NAME is a name from `thaw template list`, its beginning, or an image's name when that has one template.")]
pub struct TemplateArgs {
    #[command(subcommand)]
    command: TemplateCommand,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// Boot an image, warm it, freeze it, and prove that a clone of it works.
    Build(BuildArgs),
    /// List the templates of this data directory.
    List(ListArgs),
    /// Say what a template is.
    Inspect(NameArgs),
    /// Read every byte of a template and compare digests.
    Verify(NameArgs),
    /// Remove a template from the disk; running VMs are not disturbed.
    Remove(RemoveArgs),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MachineChoice {
    Auto,
    Pv,
    Hvm,
}

impl MachineChoice {
    fn kind(self) -> Option<MachineKind> {
        match self {
            Self::Auto => None,
            Self::Pv => Some(MachineKind::Pv),
            Self::Hvm => Some(MachineKind::Hvm),
        }
    }
}

#[derive(Debug, Args)]
struct BuildArgs {
    /// The image's name.
    #[arg(default_value = "minimal")]
    image: String,
    #[command(flatten)]
    data: DataDir,
    /// Guest memory in MiB; the next of 128, 256, ... 8192 is taken.
    #[arg(short, long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(128..=8192))]
    memory_mib: u32,
    /// vCPUs of the VM.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    vcpus: u32,
    /// The machine that runs it; auto tries out what this host's KVM can do.
    #[arg(long, value_enum, default_value = "auto")]
    machine: MachineChoice,
    /// Build again even though there is one.
    #[arg(long)]
    force: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    data: DataDir,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct NameArgs {
    /// The template.
    name: String,
    #[command(flatten)]
    data: DataDir,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct RemoveArgs {
    /// The template.
    name: String,
    #[command(flatten)]
    data: DataDir,
}

/// Runs the command.
///
/// # Errors
/// What failed, why, and what to do.
pub fn run(args: TemplateArgs) -> anyhow::Result<ExitCode> {
    let done = match args.command {
        TemplateCommand::Build(args) => run_build(&args),
        TemplateCommand::List(args) => run_list(&args),
        TemplateCommand::Inspect(args) => run_inspect(&args),
        TemplateCommand::Verify(args) => run_verify(&args),
        TemplateCommand::Remove(args) => {
            let found = template::find(&args.data.path(), &args.name)?;
            template::remove(&found.dir)?;
            println!("template {} is removed", found.name);
            Ok(())
        }
    };
    done.map_err(|error| exit::with(exit::IMAGE, error))?;
    Ok(ExitCode::SUCCESS)
}

fn run_build(args: &BuildArgs) -> anyhow::Result<()> {
    let data_dir = args.data.path();
    let started = Instant::now();
    let cancel = super::image::cancel_on_signal()?;
    let templates = match args.machine.kind() {
        Some(machine) => Templates::open_on(&data_dir, &args.image, machine)?,
        None => Templates::open(&data_dir, &args.image)?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let built = runtime.block_on(async {
        // Dropping the build on a signal ends its VM and removes what it wrote.
        tokio::select! {
            built = templates.get_or_build(args.memory_mib, args.vcpus, args.force) => built,
            stopped = cancelled(&cancel) => Err(stopped),
        }
    });
    // The build is a task of its own: the runtime's end drops it, and with it worker and files.
    drop(runtime);
    let built = built?;
    let manifest = &built.template.manifest;
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        println!(
            "{}",
            json!({
                "template": name(&built.template.dir), "cached": built.cached, "seconds": seconds,
                "boot_ms": manifest.boot_ms, "build_ms": manifest.build_ms,
                "memory_pages": manifest.memory.pages, "working_set_pages": manifest.working_set.bytes / 8,
            })
        );
    } else if built.cached {
        println!(
            "template {} is up to date; nothing to build",
            name(&built.template.dir)
        );
    } else {
        println!(
            "template {} built in {seconds:.1} s (agent ready after {:.2} s): {} of memory, {} pages in the working set",
            name(&built.template.dir),
            manifest.boot_ms as f64 / 1000.0,
            human_bytes(manifest.memory.pages * 4096),
            manifest.working_set.bytes / 8,
        );
    }
    Ok(())
}

async fn cancelled(cancel: &Cancel) -> anyhow::Error {
    loop {
        if let Err(error) = cancel.check() {
            return error;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

fn name(dir: &std::path::Path) -> String {
    dir.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn run_list(args: &ListArgs) -> anyhow::Result<()> {
    let data_dir = args.data.path();
    let templates = template::list(&data_dir)?;
    let mut table = Table::new(&[
        "NAME",
        "IMAGE",
        "MEMORY",
        "VCPUS",
        "MACHINE",
        "PAGES",
        "WORKING SET",
        "BUILT",
    ]);
    for Listed { name, manifest, .. } in &templates {
        match manifest {
            Ok(manifest) if args.json => println!("{}", summary(name, manifest)),
            Err(error) if args.json => {
                println!("{}", json!({"name": name, "error": format!("{error:#}")}))
            }
            Ok(manifest) => table.row([
                name.clone(),
                manifest.image_name.clone(),
                format!("{} MiB", manifest.memory_mib),
                manifest.vcpus.to_string(),
                manifest.machine.name().to_owned(),
                human_bytes(manifest.memory.pages * 4096),
                human_bytes(manifest.working_set.bytes / 8 * 4096),
                human_date(manifest.created_at),
            ]),
            Err(error) => eprintln!("{name}: {error:#}"),
        }
    }
    if templates.is_empty() && !args.json {
        println!(
            "no templates in {}; `thaw serve` builds what it needs, or `thaw template build` does",
            data_dir.display()
        );
    } else if !args.json {
        print!("{table}");
    }
    Ok(())
}

fn summary(name: &str, manifest: &Manifest) -> serde_json::Value {
    json!({
        "name": name, "image": manifest.image_name, "image_digest": manifest.image,
        "memory_mib": manifest.memory_mib, "vcpus": manifest.vcpus,
        "machine": manifest.machine.name(),
        "memory_pages": manifest.memory.pages, "working_set_pages": manifest.working_set.bytes / 8,
        "boot_ms": manifest.boot_ms, "build_ms": manifest.build_ms, "created_at": manifest.created_at,
    })
}

fn run_inspect(args: &NameArgs) -> anyhow::Result<()> {
    let found = template::find(&args.data.path(), &args.name)?;
    let manifest = found.manifest?;
    if args.json {
        println!(
            "{}",
            serde_json::to_string(&manifest).context("cannot encode the manifest")?
        );
        return Ok(());
    }
    let usable = match manifest.check_host() {
        Ok(()) => "yes".to_owned(),
        Err(error) => format!("no: {error:#}"),
    };
    let mut table = Table::new(&[]);
    for (label, value) in [
        ("name", found.name),
        ("directory", found.dir.display().to_string()),
        (
            "image",
            format!("{} ({})", manifest.image_name, manifest.image),
        ),
        ("machine", manifest.machine.name().to_owned()),
        ("memory", format!("{} MiB", manifest.memory_mib)),
        ("vCPUs", manifest.vcpus.to_string()),
        ("kernel", manifest.kernel),
        (
            "in use",
            format!(
                "{} in {} pages",
                human_bytes(manifest.memory.pages * 4096),
                manifest.memory.pages
            ),
        ),
        (
            "working set",
            format!("{} pages", manifest.working_set.bytes / 8),
        ),
        ("state", human_bytes(manifest.state.bytes)),
        ("warm", manifest.warm.join(" ")),
        ("processor", manifest.cpu.model),
        (
            "built",
            format!(
                "{} by thaw {}",
                human_date(manifest.created_at),
                manifest.thaw
            ),
        ),
        (
            "took",
            format!(
                "{} ms, agent ready after {} ms",
                manifest.build_ms, manifest.boot_ms
            ),
        ),
        ("usable here", usable),
    ] {
        table.row([label.to_owned(), value]);
    }
    print!("{table}");
    Ok(())
}

fn run_verify(args: &NameArgs) -> anyhow::Result<()> {
    let found = template::find(&args.data.path(), &args.name)?;
    let manifest = template::verify(&found.dir)?;
    if args.json {
        println!(
            "{}",
            json!({"name": found.name, "sound": true, "memory_pages": manifest.memory.pages})
        );
    } else {
        println!(
            "template {} is sound: state, working set and {} pages of memory are what was written",
            found.name, manifest.memory.pages
        );
    }
    Ok(())
}
