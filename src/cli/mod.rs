//! The command line: one file per command.

pub mod bench;
pub mod doctor;
pub mod exec;
pub mod exit;
pub mod image;
pub mod key;
mod keys_help;
pub mod plan;
pub mod remote;
pub mod serve;
pub mod session;
pub mod snapshot;
mod start;
pub mod table;
pub mod template;
pub mod user;
pub mod vmm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::default_data_dir;
use crate::store::Store;

/// Runs short commands on warm microVMs, with InstaVM's API, on a box you own.
#[derive(Debug, Parser)]
#[command(version, after_help = exit::HELP, propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the API.
    Serve(serve::ServeArgs),
    /// Run a command on a server; its exit code is this one's.
    Exec(exec::ExecArgs),
    /// Measure this host.
    Bench(bench::BenchArgs),
    /// Build, list and inspect guest images.
    Image(image::ImageArgs),
    /// Build, list, inspect, verify and remove templates.
    Template(template::TemplateArgs),
    /// Make, list, compare, run and carry snapshots.
    Snapshot(snapshot::SnapshotArgs),
    /// Record a session, see what it did, go back, branch off.
    Session(session::SessionArgs),
    /// Say what this host can do, and what to fix.
    Doctor(doctor::DoctorArgs),
    /// Make, list and revoke API keys.
    Key(key::KeyArgs),
    /// Make, list and change users.
    User(user::UserArgs),
    /// Set and list plans: request rates and VM counts.
    Plan(plan::PlanArgs),
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// What failed, why, and what to do.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Serve(args) => serve::run(&args),
            Command::Exec(args) => exec::run(&args),
            Command::Bench(args) => bench::run(&args),
            Command::Image(args) => image::run(args),
            Command::Template(args) => template::run(args),
            Command::Snapshot(args) => snapshot::run(&args),
            Command::Session(args) => session::run(&args),
            Command::Doctor(args) => doctor::run(&args),
            Command::Key(args) => key::run(args),
            Command::User(args) => user::run(args),
            Command::Plan(args) => plan::run(args),
        }
    }
}

/// Where the server keeps its database.
#[derive(Clone, Debug, Args)]
pub struct DataDir {
    /// The server's data directory [default: /var/lib/thaw for root, else under ~/.local/share]
    #[arg(long, env = "THAW_DATA_DIR", value_name = "DIR", global = true)]
    data_dir: Option<PathBuf>,
}

impl DataDir {
    /// The directory that was given, or the default one.
    pub fn path(&self) -> PathBuf {
        self.data_dir.clone().unwrap_or_else(default_data_dir)
    }

    /// Opens the server's database. The server may run: it notices what is written.
    ///
    /// # Errors
    /// There is none.
    pub fn store(&self) -> anyhow::Result<Store> {
        let dir = self.path();
        let path = dir.join(serve::DATABASE);
        if !path.is_file() {
            let why = anyhow::anyhow!(
                "there is no database in {}; start `thaw serve` once, or give --data-dir",
                dir.display()
            );
            return Err(exit::with(exit::DATA_DIR, why));
        }
        Store::open(&path).map_err(|error| exit::with(exit::DATA_DIR, error))
    }
}
