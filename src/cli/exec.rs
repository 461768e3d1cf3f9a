//! `thaw exec`: a command on a running server, from the shell.

use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde::Deserialize;
use serde_json::json;

use super::exit;
use super::remote::Remote;

/// Run a command on a server; its exit code is this one's.
#[derive(Debug, Args)]
#[command(after_help = "\
  thaw exec 'print(6 * 7)'
  thaw exec -l bash 'uname -a'
  thaw exec -s SESSION - < script.py
Without -s every command gets a session of its own; --json shows its id, for the next command.")]
pub struct ExecArgs {
    /// The session to run in.
    #[arg(short, long, value_name = "SESSION")]
    session: Option<String>,
    /// The language: python, bash or javascript.
    #[arg(short, long, default_value = "python", value_name = "LANG")]
    lang: String,
    /// Seconds the command may take, 1 to 600.
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=600))]
    timeout: u32,
    /// Print the server's whole answer as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    remote: Remote,
    /// What to run; - reads it from standard input.
    #[arg(value_name = "CODE|-")]
    code: String,
}

#[derive(Debug, Deserialize)]
struct Answer {
    stdout: String,
    stderr: String,
    exit_code: i32,
}

/// Runs the command.
///
/// # Errors
/// It could not be run: exit code 125.
pub fn run(args: &ExecArgs) -> anyhow::Result<ExitCode> {
    exec(args).map_err(|error| exit::with(exit::NOT_RUN, error))
}

fn exec(args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let mut code = args.code.clone();
    if code == "-" {
        code.clear();
        std::io::stdin()
            .read_to_string(&mut code)
            .context("cannot read standard input as UTF-8")?;
    }
    let mut body = json!({ "command": code, "language": args.lang, "timeout": args.timeout });
    if let Some(session) = &args.session {
        body["session_id"] = json!(session);
    }
    let runs = Duration::from_secs(args.timeout.into());
    let answer = args.remote.post("/execute", &body, runs)?;
    if args.json {
        println!("{answer}");
    }
    let answer: Answer =
        serde_json::from_value(answer).context("the server's answer is not a result")?;
    if !args.json {
        // A closed pipe (`| head`) is no reason to lose the exit code.
        drop(std::io::stdout().write_all(answer.stdout.as_bytes()));
        drop(std::io::stderr().write_all(answer.stderr.as_bytes()));
    }
    Ok(ExitCode::from(
        u8::try_from(answer.exit_code).unwrap_or(exit::FAILED),
    ))
}
