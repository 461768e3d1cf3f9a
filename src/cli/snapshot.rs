//! `thaw snapshot`: snapshots as files, looked at, checked and compared.

use std::collections::HashSet;
use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::table::{Table, human_bytes, human_date};
use super::{DataDir, exit};
use crate::snapshots::{Catalog, Kind, Manifest};
use crate::template::machine_name;

/// List, inspect, verify and compare snapshots, and see how they descend.
#[derive(Debug, Args)]
#[command(after_help = "\
Snapshots are made by the API (`POST /v1/vms/{id}/snapshot`) and share what they have in common. These
commands read the data directory; a server may run meanwhile.
  thaw snapshot list                 what there is, and what each alone takes
  thaw snapshot tree                 which came from which
  thaw snapshot verify               read every byte; a corrupt page is named
  thaw snapshot diff A B             how much memory differs
  thaw snapshot gc --dry-run         what no snapshot needs
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
    /// Compare the memory of two snapshots.
    Diff {
        /// The first.
        a: String,
        /// The second.
        b: String,
    },
    /// Draw which snapshot's VM came from which.
    Tree,
    /// Remove chunks and bases that no snapshot needs.
    Gc {
        /// Only say what would be removed.
        #[arg(long)]
        dry_run: bool,
    },
}

/// Runs the command.
///
/// # Errors
/// What failed, why, and what to do.
pub fn run(args: &SnapshotArgs) -> anyhow::Result<ExitCode> {
    let catalog =
        Catalog::open(&args.data.path()).map_err(|error| exit::with(exit::DATA_DIR, error))?;
    for (path, why) in &catalog.unreadable {
        eprintln!("{} is left alone: {why}", path.display());
    }
    match &args.command {
        SnapshotCommand::List { all } => list(&catalog, *all, args.json),
        SnapshotCommand::Inspect { snapshot } => {
            inspect(&catalog, catalog.find(snapshot)?, args.json);
        }
        SnapshotCommand::Verify { snapshot } => {
            return verify(&catalog, snapshot.as_deref(), args.json);
        }
        SnapshotCommand::Diff { a, b } => diff(&catalog, a, b, args.json)?,
        SnapshotCommand::Tree => tree(&catalog, args.json),
        SnapshotCommand::Gc { dry_run } => gc(&catalog, *dry_run, args.json)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn seconds(snapshot: &Manifest) -> u64 {
    u64::try_from(snapshot.created_ms / 1000).unwrap_or(0)
}

fn summary(catalog: &Catalog, one: &Manifest) -> serde_json::Value {
    json!({
        "id": one.id, "name": one.name, "kind": one.kind, "tenant": one.tenant, "parent": one.parent,
        "vm_id": one.vm_id, "session_id": one.session_id, "created_at": seconds(one),
        "image": one.image_name, "machine": machine_name(one.machine), "memory_mib": one.memory_mib,
        "added_bytes": one.disk_bytes, "own_bytes": catalog.own_bytes(one), "chunks": one.memory.chunks.len(),
    })
}

fn list(catalog: &Catalog, all: bool, as_json: bool) {
    let shown = |one: &&Manifest| all || one.kind == Kind::User;
    let mut table = Table::new(&[
        "ID", "NAME", "FROM", "IMAGE", "MEMORY", "ADDED", "ALONE", "MADE",
    ]);
    let mut count = 0;
    for one in catalog.snapshots.iter().filter(shown) {
        count += 1;
        if as_json {
            println!("{}", summary(catalog, one));
            continue;
        }
        let name = if one.name == one.id { "" } else { &one.name };
        table.row([
            short(&one.id),
            name.to_owned(),
            one.parent.as_deref().map(short).unwrap_or_default(),
            one.image_name.clone(),
            format!("{} MiB", one.memory_mib),
            human_bytes(one.disk_bytes),
            human_bytes(catalog.own_bytes(one)),
            human_date(seconds(one)),
        ]);
    }
    match (as_json, count) {
        (true, _) => {}
        (false, 0) => println!("no snapshots; `POST /v1/vms/{{id}}/snapshot` makes one"),
        (false, _) => print!("{table}"),
    }
}

/// As much of an id as people compare.
fn short(id: &str) -> String {
    id.chars().take(8).collect()
}

fn inspect(catalog: &Catalog, one: &Manifest, as_json: bool) {
    if as_json {
        let mut value = summary(catalog, one);
        value["manifest"] = json!(one);
        println!("{value}");
        return;
    }
    let mut table = Table::new(&[]);
    for (label, value) in [
        ("id", one.id.clone()),
        ("name", one.name.clone()),
        ("user", one.tenant.clone()),
        (
            "came from",
            one.parent
                .clone()
                .unwrap_or_else(|| "a template".to_owned()),
        ),
        ("VM", one.vm_id.clone()),
        ("session", one.session_id.clone()),
        ("image", format!("{} ({})", one.image_name, one.image)),
        ("machine", machine_name(one.machine).to_owned()),
        ("memory", format!("{} MiB", one.memory_mib)),
        ("base", one.memory.base.clone()),
        ("chunks", one.memory.chunks.len().to_string()),
        ("added when made", human_bytes(one.disk_bytes)),
        ("needed by it alone", human_bytes(catalog.own_bytes(one))),
        ("processor", one.cpu.model.clone()),
        (
            "made",
            format!("{} by thaw {}", human_date(seconds(one)), one.thaw),
        ),
    ] {
        table.row([label.to_owned(), value]);
    }
    print!("{table}");
}

fn verify(catalog: &Catalog, wanted: Option<&str>, as_json: bool) -> anyhow::Result<ExitCode> {
    let chosen: Vec<&Manifest> = match wanted {
        Some(wanted) => vec![catalog.find(wanted)?],
        None => catalog.snapshots.iter().collect(),
    };
    let bytes = chosen.iter().map(|one| {
        let chunks: u64 = one.memory.chunks.iter().map(|chunk| chunk.bytes).sum();
        chunks + one.state.bytes + one.memory.map.bytes
    });
    let bar = match std::io::stderr().is_terminal() {
        true => ProgressBar::new(bytes.sum()),
        false => ProgressBar::hidden(),
    };
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {msg}") {
        bar.set_style(style);
    }
    let mut bad = 0;
    for one in &chosen {
        bar.set_message(short(&one.id));
        let faults = catalog.verify(one, |bytes| bar.inc(bytes))?;
        bad += usize::from(!faults.is_empty());
        let said: Vec<String> = faults.iter().map(ToString::to_string).collect();
        bar.suspend(|| {
            if as_json {
                println!(
                    "{}",
                    json!({ "id": one.id, "sound": said.is_empty(), "faults": said })
                );
            } else if said.is_empty() {
                println!("snapshot {} is sound", one.id);
            }
            for fault in said.iter().filter(|_| !as_json) {
                println!("snapshot {}: {fault}", one.id);
            }
        });
    }
    bar.finish_and_clear();
    if bad > 0 {
        bail!(
            "{bad} of {} snapshots are damaged; they will not be restored: delete them, and look after the disk",
            chosen.len()
        );
    }
    if chosen.is_empty() && !as_json {
        println!("there are no snapshots");
    }
    Ok(ExitCode::SUCCESS)
}

fn diff(catalog: &Catalog, a: &str, b: &str, as_json: bool) -> anyhow::Result<()> {
    let (a, b) = (catalog.find(a)?, catalog.find(b)?);
    let found = catalog.diff(a, b)?;
    if as_json {
        println!("{}", json!({ "a": a.id, "b": b.id, "memory": found }));
        return Ok(());
    }
    println!(
        "{} of {} MiB of memory differ: {} pages, of which {} became zeroes and {} were zeroes",
        human_bytes(found.pages * 4096),
        a.memory_mib,
        found.pages,
        found.zeroed,
        found.filled
    );
    Ok(())
}

fn tree(catalog: &Catalog, as_json: bool) {
    let known: HashSet<&str> = catalog
        .snapshots
        .iter()
        .map(|one| one.id.as_str())
        .collect();
    let parent = |one: &Manifest| {
        let parent = one.parent.clone();
        parent.filter(|parent| known.contains(parent.as_str()))
    };
    let roots = catalog.snapshots.iter().filter(|one| parent(one).is_none());
    let mut left: Vec<(String, bool, usize, &Manifest)> = roots
        .rev()
        .map(|one| (String::new(), true, 0, one))
        .collect();
    // Depth first; a list of what is left instead of recursion, because a lineage may be long.
    while let Some((lead, last, depth, one)) = left.pop() {
        if as_json {
            println!(
                "{}",
                json!({ "id": one.id, "name": one.name, "parent": one.parent, "depth": depth })
            );
        } else {
            let branch = match (depth, last) {
                (0, _) => "",
                (_, true) => "└─ ",
                (_, false) => "├─ ",
            };
            let name = if one.name == one.id { "" } else { &one.name };
            let gone = match &one.parent {
                Some(parent) if depth == 0 => format!("  (from {}, which is gone)", short(parent)),
                _ => String::new(),
            };
            let line = format!("{lead}{branch}{} {name}", short(&one.id));
            println!(
                "{}  +{}{gone}",
                line.trim_end(),
                human_bytes(one.disk_bytes)
            );
        }
        let below = match (depth, last) {
            (0, _) => String::new(),
            (_, true) => format!("{lead}   "),
            (_, false) => format!("{lead}│  "),
        };
        let children: Vec<&Manifest> = catalog
            .snapshots
            .iter()
            .filter(|child| parent(child).is_some_and(|parent| parent == one.id))
            .collect();
        for (number, child) in children.iter().enumerate().rev() {
            let is_last = number + 1 == children.len();
            left.push((below.clone(), is_last, depth + 1, child));
        }
    }
}

fn gc(catalog: &Catalog, dry_run: bool, as_json: bool) -> anyhow::Result<()> {
    let Some(swept) = catalog.sweep(dry_run)? else {
        bail!("a snapshot is being made just now; try again when it is done");
    };
    if as_json {
        println!(
            "{}",
            json!({ "dry_run": dry_run, "files": swept.files, "bytes": swept.bytes })
        );
    } else {
        let done = if dry_run { "would be" } else { "were" };
        println!(
            "{} files with {} that no snapshot needs {done} removed",
            swept.files,
            human_bytes(swept.bytes)
        );
    }
    Ok(())
}
