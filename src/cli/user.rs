//! `thaw user`: users, in the server's database. A running server follows within a moment.

use std::io::{BufRead, IsTerminal};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::json;

use super::DataDir;
use crate::http::auth::password;
use crate::store::UserRow;

/// Make, list and change users. Each owns sessions and tasks that no other sees.
#[derive(Debug, Args)]
pub struct UserArgs {
    #[command(flatten)]
    data: DataDir,
    #[command(subcommand)]
    command: UserCommand,
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// Make a user. `thaw key create --user NAME` then makes a key.
    Create {
        /// What the user logs in as.
        name: String,
        /// Where to reach the user.
        #[arg(long)]
        email: Option<String>,
        /// The user's plan.
        #[arg(long, default_value = "default")]
        plan: String,
    },
    /// List users.
    List {
        /// Print one JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Set a password, read from the first line of standard input. Tokens given before end.
    Passwd {
        /// Whose.
        name: String,
    },
    /// Put a user on a plan.
    Plan {
        /// Who.
        name: String,
        /// The plan.
        plan: String,
    },
    /// Lock a user out: keys and tokens stop working.
    Disable {
        /// Who.
        name: String,
    },
    /// Let a user in again.
    Enable {
        /// Who.
        name: String,
    },
}

/// Runs the command.
///
/// # Errors
/// What failed, why, and what to do.
pub fn run(args: UserArgs) -> anyhow::Result<ExitCode> {
    let store = args.data.store()?;
    let found = match args.command {
        UserCommand::Create { name, email, plan } => {
            check_name(&name)?;
            let wanted = name.clone();
            let made = store.call_blocking(move |c| {
                if UserRow::by_name(c, &wanted)?.is_some() {
                    return Ok(None);
                }
                UserRow::insert(c, &wanted, email.as_deref(), &plan).map(Some)
            })?;
            let Some(id) = made else {
                bail!("there is a user {name:?} already");
            };
            println!("{id}");
            true
        }
        UserCommand::List { json } => {
            for user in store.call_blocking(|c| UserRow::all(c))? {
                let state = if user.disabled { "disabled" } else { "active" };
                if json {
                    let shown = json!({
                        "id": user.id, "name": user.name, "email": user.email, "plan": user.plan,
                        "has_password": user.password.is_some(), "disabled": user.disabled,
                    });
                    println!("{shown}");
                } else {
                    println!("{}  {:<20} {state:<8} {}", user.id, user.name, user.plan);
                }
            }
            true
        }
        UserCommand::Passwd { name } => {
            if std::io::stdin().is_terminal() {
                eprintln!("New password for {name} (it is shown while you type):");
            }
            let mut line = String::new();
            std::io::stdin()
                .lock()
                .read_line(&mut line)
                .context("cannot read standard input")?;
            let hash =
                password::hash(line.trim_end_matches(['\r', '\n'])).map_err(anyhow::Error::msg)?;
            store.call_blocking(move |c| UserRow::set_password(c, &name, &hash))?
        }
        UserCommand::Plan { name, plan } => {
            store.call_blocking(move |c| UserRow::set_plan(c, &name, &plan))?
        }
        UserCommand::Disable { name } => {
            store.call_blocking(move |c| UserRow::set_disabled(c, &name, true))?
        }
        UserCommand::Enable { name } => {
            store.call_blocking(move |c| UserRow::set_disabled(c, &name, false))?
        }
    };
    if !found {
        bail!("there is no such user; `thaw user list` shows them");
    }
    Ok(ExitCode::SUCCESS)
}

fn check_name(name: &str) -> anyhow::Result<()> {
    let fits = (1..=64).contains(&name.len());
    if !fits
        || !name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._@+-".contains(&b))
    {
        bail!("a user name has 1 to 64 letters, digits or ._@+-");
    }
    Ok(())
}
