//! Checking and comparing snapshots, and removing what none needs.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::super::remote::Remote;
use super::super::table::{Table, human_bytes};
use super::{bar, short};
use crate::snapshots::{Catalog, Manifest};

/// Two guests list their files, each within a minute.
const LISTING: Duration = Duration::from_secs(150);

pub(super) fn verify(
    catalog: &Catalog,
    wanted: Option<&str>,
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    let chosen: Vec<&Manifest> = match wanted {
        Some(wanted) => vec![catalog.find(wanted)?],
        None => catalog.snapshots.iter().collect(),
    };
    let bytes = chosen.iter().map(|one| {
        let chunks: u64 = one.memory.chunks.iter().map(|chunk| chunk.bytes).sum();
        chunks + one.state.bytes + one.memory.map.bytes
    });
    let bar = bar(bytes.sum());
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

pub(super) fn diff(
    catalog: &Catalog,
    (a, b): (&str, &str),
    pages: bool,
    remote: Option<&Remote>,
    as_json: bool,
) -> anyhow::Result<()> {
    let (a, b) = (catalog.find(a)?, catalog.find(b)?);
    let mut found = catalog.diff(a, b)?;
    if !pages {
        found.runs.clear();
    }
    let files = remote.map(|remote| {
        let path = format!("/v1/snapshots/{}/diff?to={}", a.id, b.id);
        remote.get_slow(&path, LISTING)
    });
    let files = files.transpose()?;
    if as_json {
        let mut said = json!({ "a": a.id, "b": b.id, "memory": found });
        if let Some(files) = files {
            said["files"] = files["changes"].clone();
        }
        println!("{said}");
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
    for (first, count) in &found.runs {
        let (from, to) = (first * 4096, (first + count) * 4096 - 1);
        println!("  {from:#014x}-{to:#014x}  {}", human_bytes(count * 4096));
    }
    if let Some(files) = files {
        show_files(&files);
    }
    Ok(())
}

/// A line a file, with its size before and after.
fn show_files(files: &Value) {
    let mut table = Table::new(&[]);
    for change in files["changes"].as_array().into_iter().flatten() {
        let text = |name: &str| change[name].as_str().unwrap_or_default().to_owned();
        let bytes = |name: &str| change[name].as_u64();
        let sign = match text("how").as_str() {
            "added" => "+",
            "removed" => "-",
            _ => "~",
        };
        let size = match (bytes("bytes_before"), bytes("bytes_after")) {
            _ if text("kind") == "directory" => String::new(),
            (Some(before), Some(after)) if before == after => human_bytes(after),
            (Some(before), Some(after)) => {
                format!("{} → {}", human_bytes(before), human_bytes(after))
            }
            (before, after) => human_bytes(before.or(after).unwrap_or(0)),
        };
        // A guest chose the name: nothing in it may steer the terminal.
        let path = text("path").replace(char::is_control, "?");
        table.row([sign.to_owned(), path, size]);
    }
    print!("{table}");
    println!(
        "{} files added, {} removed, {} changed",
        files["added"], files["removed"], files["changed"]
    );
}

pub(super) fn gc(catalog: &Catalog, dry_run: bool, as_json: bool) -> anyhow::Result<()> {
    let Some(swept) = catalog.sweep(dry_run)? else {
        bail!("a snapshot is being made just now; try again when it is done");
    };
    let reached = match dry_run {
        true => catalog.reached(),
        false => Vec::new(),
    };
    if as_json {
        println!(
            "{}",
            json!({ "dry_run": dry_run, "files": swept.files, "bytes": swept.bytes, "reached": reached })
        );
        return Ok(());
    }
    let mut table = Table::new(&["FILE", "KIND", "SIZE", "NEEDED BY"]);
    for file in &reached {
        let by: Vec<String> = file.snapshots.iter().map(|id| short(id)).collect();
        table.row([
            short(&file.name),
            file.kind.to_owned(),
            human_bytes(file.bytes),
            by.join(" "),
        ]);
    }
    if !reached.is_empty() {
        print!("{table}");
    }
    let done = if dry_run { "would be" } else { "were" };
    println!(
        "{} files with {} that no snapshot needs {done} removed",
        swept.files,
        human_bytes(swept.bytes)
    );
    Ok(())
}

pub(super) fn rebase(
    catalog: &Catalog,
    data_dir: &Path,
    wanted: &[String],
    onto: Option<&str>,
    disk_floor_mib: u64,
    as_json: bool,
) -> anyhow::Result<()> {
    for wanted in wanted {
        let one = catalog.find(wanted)?;
        let base = match onto {
            Some(onto) => catalog.base_of(catalog.find(onto)?)?,
            None => catalog.template_base(data_dir, one)?,
        };
        let bar = bar(one.memory.bytes);
        bar.set_message(short(&one.id));
        let each = |pages: u64| bar.inc(pages * 4096);
        let done = catalog
            .rebase(data_dir, one, &base, disk_floor_mib, each)
            .with_context(|| format!("snapshot {} is as it was", one.id))?;
        bar.finish_and_clear();
        if as_json {
            println!(
                "{}",
                json!({ "id": one.id, "base": base.sha256, "rebased": done })
            );
        } else if done.was_there {
            println!("snapshot {} lies over that base already", one.id);
        } else {
            println!(
                "snapshot {} lies over base {} now; {} pages differ from the old one, {} were added to the disk",
                one.id,
                short(&base.sha256),
                done.pages,
                human_bytes(done.added_bytes)
            );
        }
    }
    if !as_json {
        println!("`thaw snapshot gc` removes what nothing needs any more");
    }
    Ok(())
}
