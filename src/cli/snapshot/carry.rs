//! Snapshots as one file: written here, read on another host.

use std::fs::{File, TryLockError};
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::json;

use super::super::table::human_bytes;
use super::super::{DataDir, exit};
use super::{bar, short};
use crate::config::SnapshotConfig;
use crate::image::Image;
use crate::snapshots::{Catalog, Export, Ground, Import, Imported, Manifest};
use crate::store::{Store, UserRow};

/// Which snapshot goes where.
#[derive(Debug, Args)]
#[command(after_help = "\
  thaw snapshot export A a.thaw
  thaw snapshot export A - | ssh HOST thaw snapshot import -
The file is a tar archive in zstd. It grows as FILE.part until it is whole; when it breaks off, the same command goes
on where it stopped.")]
pub(super) struct ExportArgs {
    /// The snapshot.
    snapshot: String,
    /// The file to write; - writes to standard output.
    file: PathBuf,
    /// How hard to pack: 1 is fast, 19 is small.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
    /// Replace the file.
    #[arg(long)]
    force: bool,
}

/// Which file.
#[derive(Debug, Args)]
#[command(after_help = "\
  thaw snapshot import a.thaw --user alice
Everything is compared with its digest. A snapshot of another machine, kernel, image or processor is refused. What was
read before a file broke off is kept for a day; import it again to go on. A snapshot's owner decides what runs in it: import only what
you would run.")]
pub(super) struct ImportArgs {
    /// The file to read; - reads standard input.
    file: PathBuf,
    /// Who is to own it [default: the only user there is]
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Disk space that stays free, MiB.
    #[arg(long, value_name = "MIB", default_value_t = SnapshotConfig::default().disk_floor_mib)]
    disk_floor_mib: u64,
}

pub(super) fn export(catalog: &Catalog, args: &ExportArgs, as_json: bool) -> anyhow::Result<()> {
    let one = catalog.find(&args.snapshot)?;
    let to_stdout = args.file == Path::new("-");
    ensure!(
        !(to_stdout && std::io::stdout().is_terminal()),
        "a snapshot is not for a terminal; give a file, or pipe it somewhere"
    );
    if !to_stdout && !args.force && args.file.exists() {
        bail!(
            "{} is there already; --force replaces it",
            args.file.display()
        );
    }
    let export = Export::open(catalog, one)?;
    let bar = bar(export.bytes());
    bar.set_message(short(&one.id));
    if to_stdout {
        export.write(std::io::stdout().lock(), args.level, |bytes| bar.inc(bytes))?;
        bar.finish_and_clear();
        return Ok(());
    }
    let mut name = args.file.clone().into_os_string();
    name.push(".part");
    let part = PathBuf::from(name);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&part)
        .with_context(|| format!("cannot write {}", part.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => bail!("another export writes {}", part.display()),
        Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the file"),
    }
    export
        .resume(&mut file, args.level, |bytes| bar.inc(bytes))
        .with_context(|| format!("{} is not whole; run this again to go on", part.display()))?;
    std::fs::rename(&part, &args.file)
        .with_context(|| format!("cannot make {}", args.file.display()))?;
    bar.finish_and_clear();
    let bytes = file.metadata().context("cannot look at the file")?.len();
    if as_json {
        println!(
            "{}",
            json!({ "id": one.id, "file": args.file, "bytes": bytes, "unpacked_bytes": export.bytes() })
        );
    } else {
        println!(
            "snapshot {} is in {}: {}, {} unpacked",
            one.id,
            args.file.display(),
            human_bytes(bytes),
            human_bytes(export.bytes())
        );
    }
    Ok(())
}

pub(super) fn import(data: &DataDir, args: &ImportArgs, as_json: bool) -> anyhow::Result<ExitCode> {
    let data_dir = data.path();
    let user = owner(&data.store()?, args.user.as_deref())?;
    let import = Import {
        data_dir: &data_dir,
        tenant: &user.id,
        disk_floor_mib: args.disk_floor_mib,
    };
    let (from, bytes): (Box<dyn Read>, u64) = if args.file == Path::new("-") {
        (Box::new(std::io::stdin().lock()), 0)
    } else {
        let file = File::open(&args.file)
            .with_context(|| format!("cannot open {}", args.file.display()))?;
        let bytes = file.metadata().context("cannot look at the file")?.len();
        (Box::new(file), bytes)
    };
    let bar = bar(bytes);
    let imported = import
        .run(bar.wrap_read(from), |manifest| ground(&data_dir, manifest))
        .with_context(|| format!("{} cannot be imported", args.file.display()))?;
    bar.finish_and_clear();
    let (manifest, new) = match &imported {
        Imported::New(manifest) => (manifest, true),
        Imported::Known(manifest) => (manifest, false),
    };
    let mut out = std::io::stdout().lock();
    if as_json {
        let said = json!({ "id": manifest.id, "name": manifest.name, "new": new, "added_bytes": manifest.disk_bytes });
        writeln!(out, "{said}")?;
    } else if new {
        let added = human_bytes(manifest.disk_bytes);
        writeln!(
            out,
            "snapshot {} of {} is here; it added {added}",
            manifest.id, user.name
        )?;
    } else {
        writeln!(out, "snapshot {} was here already", manifest.id)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The user who is to own it.
fn owner(store: &Store, wanted: Option<&str>) -> anyhow::Result<UserRow> {
    let mut users = store.call_blocking(|connection| UserRow::all(connection))?;
    match wanted {
        Some(name) => users.retain(|user| user.name == name),
        None => ensure!(
            users.len() < 2,
            "there are several users; say with --user whose the snapshot is to be"
        ),
    }
    users
        .pop()
        .context("there is no such user; `thaw user list` shows them")
}

/// What VMs of the snapshot's image run on here.
fn ground(data_dir: &Path, manifest: &Manifest) -> anyhow::Result<Ground> {
    let probe = thaw_vmm::machine::probe();
    let Some(machine) = probe.kind else {
        bail!("this host cannot run VMs; `thaw doctor` says why");
    };
    let image = Image::open(data_dir, &manifest.image_name)
        .map_err(|error| exit::with(exit::IMAGE, error))?;
    Ok(Ground {
        image: image.manifest.digest,
        image_name: image.manifest.name,
        machine,
    })
}
