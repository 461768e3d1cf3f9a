//! `thaw key`: API keys, in the server's database. A running server follows within a moment.

use std::process::ExitCode;

use anyhow::{anyhow, bail};
use clap::{Args, Subcommand};
use serde_json::json;

use super::DataDir;
use super::table::human_date;
use crate::http::auth::{FIRST_USER, key};
use crate::http::reply::iso_ms;
use crate::store::{KeyRow, UserRow};

/// Make, list and revoke API keys.
#[derive(Debug, Args)]
pub struct KeyArgs {
    #[command(flatten)]
    data: DataDir,
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a key and print it: it is not stored and cannot be shown again.
    Create {
        /// Whose key it is.
        #[arg(long, default_value = FIRST_USER, value_name = "NAME")]
        user: String,
        /// What it is for.
        #[arg(long, default_value = "key", value_name = "LABEL")]
        name: String,
        /// A plan of its own instead of the user's.
        #[arg(long, value_name = "PLAN")]
        plan: Option<String>,
    },
    /// List keys. The keys themselves are not known.
    List {
        /// Print one JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Revoke a key. A running server refuses it from then on.
    Revoke {
        /// Its id or the start of the key, both as listed.
        id: String,
    },
}

/// Runs the command.
///
/// # Errors
/// What failed, why, and what to do.
pub fn run(args: KeyArgs) -> anyhow::Result<ExitCode> {
    let store = args.data.store()?;
    match args.command {
        KeyCommand::Create { user, name, plan } => {
            let text = key::mint();
            let (secret, wanted) = (text.clone(), user.clone());
            let made = store.call_blocking(move |c| {
                let Some(user) = UserRow::by_name(c, &wanted)? else {
                    return Ok(false);
                };
                key::row(&secret, &user.id, &name, plan.as_deref()).insert(c)?;
                Ok(true)
            })?;
            if !made {
                bail!("there is no user {user:?}; `thaw user create {user}` makes one");
            }
            println!("{text}");
            eprintln!("This key is shown once and cannot be recovered.");
        }
        KeyCommand::List { json } => {
            let (keys, users) = store.call_blocking(|c| Ok((KeyRow::all(c)?, UserRow::all(c)?)))?;
            for row in keys {
                let user = users.iter().find(|user| user.id == row.user_id);
                let user = user.map_or("", |user| user.name.as_str());
                let state = if row.revoked_ms.is_some() {
                    "revoked"
                } else {
                    "active"
                };
                if json {
                    let shown = json!({
                        "id": row.id, "user": user, "name": row.name, "lookup": row.lookup, "plan": row.plan,
                        "created_at": iso_ms(row.created_ms), "revoked_at": row.revoked_ms.map(iso_ms),
                        "last_used_at": row.last_used_ms.map(iso_ms),
                    });
                    println!("{shown}");
                } else {
                    let used = row
                        .last_used_ms
                        .map_or_else(|| "never used".to_owned(), used);
                    println!(
                        "{}  {:<20}…  {state:<8} {used:<20} {user:<12} {}",
                        row.id, row.lookup, row.name
                    );
                }
            }
        }
        KeyCommand::Revoke { id } => {
            let wanted = id.clone();
            match store.call_blocking(move |c| KeyRow::revoke(c, &wanted))? {
                0 => return Err(anyhow!("no active key {id:?}; `thaw key list` shows them")),
                _ => println!("revoked"),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// When a key was last used: a running server stores it twice a minute.
fn used(ms: i64) -> String {
    human_date(u64::try_from(ms / 1000).unwrap_or(0))
}
