//! `thaw plan`: plans, in the server's database. A running server follows within a moment.

use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Subcommand};

use super::DataDir;
use crate::store::PlanRow;

/// Set and list plans: request rates and VM counts.
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    data: DataDir,
    #[command(subcommand)]
    command: PlanCommand,
}

#[derive(Debug, Subcommand)]
enum PlanCommand {
    /// Make a plan or change it. `default` is for whoever has no other.
    Set {
        /// Its name.
        name: String,
        /// Requests a key may make in a minute, in the long run.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        requests_per_minute: u32,
        /// Requests a key may make at once after a pause.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        burst: u32,
        /// VMs a user may have at once.
        #[arg(long)]
        max_vms: u32,
    },
    /// List plans. `default` is listed only when it was set here instead of in the configuration.
    List {
        /// Print one JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Forget a plan; whoever has it falls back to `default`.
    Remove {
        /// Its name.
        name: String,
    },
}

/// Runs the command.
///
/// # Errors
/// What failed, why, and what to do.
pub fn run(args: PlanArgs) -> anyhow::Result<ExitCode> {
    let store = args.data.store()?;
    match args.command {
        PlanCommand::Set {
            name,
            requests_per_minute,
            burst,
            max_vms,
        } => {
            let plan = PlanRow {
                name,
                requests_per_minute,
                burst,
                max_vms,
            };
            store.call_blocking(move |c| plan.set(c))?;
        }
        PlanCommand::List { json } => {
            for plan in store.call_blocking(|c| PlanRow::all(c))? {
                if json {
                    println!("{}", serde_json::to_string(&plan)?);
                } else {
                    println!(
                        "{:<20} {} requests a minute, burst {}, {} VMs",
                        plan.name, plan.requests_per_minute, plan.burst, plan.max_vms
                    );
                }
            }
        }
        PlanCommand::Remove { name } => {
            let wanted = name.clone();
            if !store.call_blocking(move |c| PlanRow::remove(c, &wanted))? {
                bail!("there is no plan {name:?}; `thaw plan list` shows them");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
