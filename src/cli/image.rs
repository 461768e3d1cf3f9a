//! `thaw image`: building, listing and inspecting images.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde_json::json;

use super::table::{Table, human_bytes, human_date};
use super::{DataDir, exit};
use crate::image::build::{self, Options};
use crate::image::host_tools::Cancel;
use crate::image::progress::Progress;
use crate::image::{self, Image, recipe};

/// Build, list and inspect guest images.
#[derive(Debug, Args)]
#[command(after_help = "\
An image is a guest root file system plus a kernel, built from Debian packages by a recipe.
  thaw image build                  the small image that comes with thaw (minimal)
  thaw image build standard         Python with numpy, pandas and matplotlib, Node.js, git, curl
  thaw image build ./mine.toml      your own recipe: name, suite, packages, warm
A second build of the same recipe is instant.")]
pub struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Build an image from a recipe (needs root, and Debian's package archive).
    Build(BuildArgs),
    /// List the images of this data directory.
    List(ListArgs),
    /// Say what is in an image.
    Inspect(InspectArgs),
    /// Remove an image.
    Remove(RemoveArgs),
}

#[derive(Debug, Args)]
struct BuildArgs {
    /// A recipe that comes with thaw (minimal, numpy, standard), or the path of a .toml file.
    #[arg(default_value = "minimal", value_name = "NAME|PATH.toml")]
    recipe: String,
    #[command(flatten)]
    data: DataDir,
    /// The guest's agent, a static executable; found beside thaw when absent.
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
    /// Name missing host tools instead of installing them with apt-get.
    #[arg(long)]
    no_install: bool,
    /// Build again even though nothing changed (takes newer package versions).
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
struct InspectArgs {
    /// An image's name or digest.
    name: String,
    #[command(flatten)]
    data: DataDir,
    /// Print the manifest as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct RemoveArgs {
    /// An image's name.
    name: String,
    #[command(flatten)]
    data: DataDir,
}

/// Runs the command.
///
/// # Errors
/// What failed, why, and what to do.
pub fn run(args: ImageArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        ImageCommand::Build(args) => run_build(args),
        ImageCommand::List(args) => run_list(&args),
        ImageCommand::Inspect(args) => run_inspect(&args),
        ImageCommand::Remove(args) => {
            image::remove(&args.data.path(), &args.name)?;
            println!("image {} is removed", args.name);
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn run_build(args: BuildArgs) -> anyhow::Result<ExitCode> {
    let cancel = cancel_on_signal()?;
    let mut progress = Progress::new(build::STEPS);
    let built = build::build(
        &Options {
            data_dir: args.data.path(),
            recipe: args.recipe,
            agent: args.agent,
            install: !args.no_install,
            force: args.force,
        },
        &cancel,
        &mut progress,
    )
    .map_err(|error| exit::with(exit::IMAGE, error))?;
    drop(progress);
    let manifest = &built.image.manifest;
    if args.json {
        println!(
            "{}",
            json!({
                "name": manifest.name, "digest": manifest.digest, "cached": built.cached,
                "seconds": built.took.as_secs_f64(), "dir": built.image.dir(),
                "root_bytes": manifest.root.bytes, "bytes": built.image.bytes(),
            })
        );
    } else if built.cached {
        println!(
            "image {} is up to date ({}); nothing to build",
            manifest.name,
            short(&manifest.digest)
        );
    } else {
        println!(
            "image {} built in {:.1} s: {} root file system, kernel {}, {}",
            manifest.name,
            built.took.as_secs_f64(),
            human_bytes(manifest.root.bytes),
            manifest.kernel,
            short(&manifest.digest),
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// The part of a digest that people compare.
fn short(digest: &str) -> &str {
    digest.get(..19).unwrap_or(digest)
}

/// A [`Cancel`] that SIGINT and SIGTERM set.
///
/// # Errors
/// The signals cannot be watched.
pub fn cancel_on_signal() -> anyhow::Result<Cancel> {
    let cancel = Cancel::default();
    let watched = cancel.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("cannot watch for signals")?;
    let (mut interrupt, mut terminate) = runtime
        .block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            std::io::Result::Ok((
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
            ))
        })
        .context("cannot watch for signals")?;
    // Never joined: it waits for a signal as long as the process lives.
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
            });
            watched.cancel();
        })
        .context("cannot start a thread")?;
    Ok(cancel)
}

fn run_list(args: &ListArgs) -> anyhow::Result<ExitCode> {
    let images = image::list(&args.data.path())?;
    let mut table = Table::new(&["NAME", "SIZE", "ROOT", "KERNEL", "BUILT", "DIGEST"]);
    for listed in &images {
        match &listed.image {
            Ok(image) if args.json => println!(
                "{}",
                json!({
                    "name": listed.name, "digest": image.manifest.digest, "bytes": image.bytes(),
                    "root_bytes": image.manifest.root.bytes, "kernel": image.manifest.kernel,
                    "created_at": image.manifest.created_at, "dir": image.dir(),
                })
            ),
            Err(error) if args.json => println!(
                "{}",
                json!({"name": listed.name, "error": format!("{error:#}")})
            ),
            Ok(image) => table.row([
                listed.name.clone(),
                human_bytes(image.bytes()),
                human_bytes(image.manifest.root.bytes),
                image
                    .manifest
                    .kernel
                    .split('=')
                    .next_back()
                    .unwrap_or_default()
                    .to_owned(),
                human_date(image.manifest.created_at),
                short(&image.manifest.digest).to_owned(),
            ]),
            Err(error) => eprintln!("{}: {error:#}", listed.name),
        }
    }
    if args.json {
        return Ok(ExitCode::SUCCESS);
    }
    if images.is_empty() {
        println!(
            "no images in {}; build one with `thaw image build`",
            args.data.path().display()
        );
    } else {
        print!("{table}");
    }
    Ok(ExitCode::SUCCESS)
}

fn run_inspect(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let image = Image::open(&args.data.path(), &args.name)
        .map_err(|error| exit::with(exit::IMAGE, error))?;
    let manifest = &image.manifest;
    if args.json {
        println!(
            "{}",
            serde_json::to_string(manifest).context("cannot encode the manifest")?
        );
        return Ok(ExitCode::SUCCESS);
    }
    let current = recipe::find(&manifest.name).is_ok();
    let mut table = Table::new(&[]);
    for (label, value) in [
        ("name", manifest.name.clone()),
        ("description", manifest.description.clone()),
        (
            "recipe",
            if current {
                "comes with thaw".into()
            } else {
                "your own".to_owned()
            },
        ),
        ("digest", manifest.digest.clone()),
        (
            "built",
            format!(
                "{} by thaw {}",
                human_date(manifest.created_at),
                manifest.thaw
            ),
        ),
        ("directory", image.dir().display().to_string()),
        ("Debian", manifest.suite.clone()),
        (
            "kernel",
            format!(
                "{} ({})",
                manifest.kernel,
                human_bytes(manifest.vmlinux.bytes)
            ),
        ),
        ("initramfs", human_bytes(manifest.initramfs.bytes)),
        (
            "root",
            format!("{} compressed", human_bytes(manifest.root.bytes)),
        ),
        ("agent", human_bytes(manifest.agent.bytes)),
        ("modules", manifest.modules.join(" ")),
        ("warm", manifest.warm.join(" ")),
        ("least memory", format!("{} MiB", manifest.min_memory_mib)),
        (
            "packages",
            format!("{} (list them with --json)", manifest.packages.len()),
        ),
    ] {
        table.row([label.to_owned(), value]);
    }
    print!("{table}");
    Ok(ExitCode::SUCCESS)
}
