//! `thaw snapshot`: snapshots as files, looked at, checked, compared and carried.

mod carry;
mod check;
mod look;
mod run;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use super::remote::Remote;
use super::{DataDir, exit};
use crate::config::SnapshotConfig;
use crate::snapshots::Catalog;

/// List, inspect, verify, compare and carry snapshots, and see how they descend.
#[derive(Debug, Args)]
#[command(after_help = "\
Snapshots share what they have in common. create, exec and bisect ask a running server; the others read the data
directory, whether or not a server runs.
  thaw snapshot create VM            freeze a copy of a VM or a session that runs; it goes on running
  thaw snapshot exec A -- CMD        run a command on a snapshot and throw the result away
  thaw snapshot bisect A..B -- CMD   the first snapshot after A where a command fails
  thaw snapshot list                 what there is, and what each alone takes
  thaw snapshot tree                 which came from which
  thaw snapshot verify               read every byte; a corrupt page is named
  thaw snapshot diff A B             how much memory differs
  thaw snapshot gc --dry-run         what no snapshot needs
  thaw snapshot rebase A             over the template that new VMs have now, so that an old one can go
  thaw snapshot export A a.thaw      one file, for another host; goes on where it broke off
  thaw snapshot import a.thaw        a running server offers it at once
A snapshot is called by its id, the beginning of that, or its name.")]
pub struct SnapshotArgs {
    #[command(flatten)]
    data: DataDir,
    /// Print JSON: one object a line.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// List snapshots, oldest first.
    List {
        /// Suspended VMs, too.
        #[arg(short, long)]
        all: bool,
    },
    /// Say what a snapshot is.
    Inspect {
        /// The snapshot.
        snapshot: String,
    },
    /// Read every byte and compare digests; without a snapshot: of all.
    Verify {
        /// The snapshot.
        snapshot: Option<String>,
    },
    /// Compare the memory of two snapshots, and their files if a server is asked.
    Diff {
        /// The first.
        a: String,
        /// The second.
        b: String,
        /// Which pages of memory, too, by their addresses in the guest.
        #[arg(long)]
        pages: bool,
        /// The files in the guests, too; a server restores both for a moment.
        #[arg(long)]
        files: bool,
        #[command(flatten)]
        remote: Remote,
    },
    /// Freeze a copy of a VM that runs, memory included.
    Create(run::CreateArgs),
    /// Run a command on a snapshot and throw the result away; its exit code is this one's.
    Exec(run::ExecArgs),
    /// Find the first snapshot of a lineage where a command fails.
    Bisect(run::BisectArgs),
    /// Draw which snapshot's VM came from which.
    Tree,
    /// Remove chunks and bases that no snapshot needs.
    Gc {
        /// Only say what would be removed.
        #[arg(long)]
        dry_run: bool,
    },
    /// Lay snapshots over another base, such as the template that new VMs have now.
    Rebase {
        /// The snapshots.
        #[arg(required = true)]
        snapshots: Vec<String>,
        /// Another snapshot, whose base it is to be [default: the template of the snapshot's image and size]
        #[arg(long, value_name = "SNAPSHOT")]
        onto: Option<String>,
        /// Disk space that stays free, MiB.
        #[arg(long, value_name = "MIB", default_value_t = SnapshotConfig::default().disk_floor_mib)]
        disk_floor_mib: u64,
    },
    /// Write a snapshot and all that it needs as one file.
    Export(carry::ExportArgs),
    /// Put a snapshot from a file among those that are here.
    Import(carry::ImportArgs),
}

/// Runs the command.
///
/// # Errors
/// What failed, why, and what to do.
pub fn run(args: &SnapshotArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        SnapshotCommand::Import(import) => return carry::import(&args.data, import, args.json),
        SnapshotCommand::Create(create) => return run::create(create, args.json),
        SnapshotCommand::Exec(exec) => return run::exec(exec, args.json),
        SnapshotCommand::Bisect(bisect) => return run::bisect(bisect, args.json),
        _ => {}
    }
    let catalog =
        Catalog::open(&args.data.path()).map_err(|error| exit::with(exit::DATA_DIR, error))?;
    for (path, why) in &catalog.unreadable {
        eprintln!("{} is left alone: {why}", path.display());
    }
    match &args.command {
        SnapshotCommand::List { all } => look::list(&catalog, *all, args.json),
        SnapshotCommand::Inspect { snapshot } => {
            look::inspect(&catalog, catalog.find(snapshot)?, args.json);
        }
        SnapshotCommand::Verify { snapshot } => {
            return check::verify(&catalog, snapshot.as_deref(), args.json);
        }
        SnapshotCommand::Diff {
            a,
            b,
            pages,
            files,
            remote,
        } => {
            let remote = files.then_some(remote);
            check::diff(&catalog, (a, b), *pages, remote, args.json)?;
        }
        SnapshotCommand::Tree => look::tree(&catalog, args.json),
        SnapshotCommand::Gc { dry_run } => check::gc(&catalog, *dry_run, args.json)?,
        SnapshotCommand::Rebase {
            snapshots,
            onto,
            disk_floor_mib,
        } => {
            let data_dir = args.data.path();
            let onto = onto.as_deref();
            check::rebase(
                &catalog,
                &data_dir,
                snapshots,
                onto,
                *disk_floor_mib,
                args.json,
            )?;
        }
        SnapshotCommand::Export(export) => carry::export(&catalog, export, args.json)?,
        // These need no data directory, or no snapshots in it.
        SnapshotCommand::Import(_)
        | SnapshotCommand::Create(_)
        | SnapshotCommand::Exec(_)
        | SnapshotCommand::Bisect(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// As much of an id as people compare.
fn short(id: &str) -> String {
    id.chars().take(8).collect()
}

/// A bar for so many bytes; none without a terminal.
fn bar(bytes: u64) -> ProgressBar {
    let bar = match std::io::stderr().is_terminal() {
        true => ProgressBar::new(bytes),
        false => ProgressBar::hidden(),
    };
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {msg}") {
        bar.set_style(style);
    }
    bar
}
