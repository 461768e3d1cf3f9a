//! `thaw session`: time travel on a running server's sessions.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::remote::Remote;
use super::table::Table;

/// What going back or comparing may take: a VM is frozen, and one or two are restored.
const TRAVEL: Duration = Duration::from_secs(150);

/// Events that are asked for at a time.
const PAGE: i64 = 10_000;

/// Record a session, see what it did, go back, branch off.
#[derive(Debug, Args)]
#[command(after_help = "\
  thaw session record SESSION            from now on every command is a step, with a checkpoint before it
  thaw session log SESSION               the steps
  thaw session diff SESSION 3 5          files that changed from before step 3 to before step 5
  thaw session rewind SESSION --to 3     the session is as it was just before step 3
  thaw session branch SESSION --at 3     a new session that begins there
What a session was before it went back is a step, too: rewind to that to come back.")]
pub struct SessionArgs {
    /// Print JSON: one object a line.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: SessionCommand,
}

#[derive(Debug, Subcommand)]
enum SessionCommand {
    /// Record a session from now on.
    Record {
        /// The session.
        session: String,
        /// Days until the recording is forgotten.
        #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=365))]
        days: u16,
        #[command(flatten)]
        remote: Remote,
    },
    /// Stop recording; what is recorded stays.
    Stop {
        /// The session.
        session: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Show the steps of a session's latest recording.
    Log {
        /// The session.
        session: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Show the files that changed from the moment before one step to that before another.
    Diff {
        /// The session.
        session: String,
        /// The first step.
        from: u32,
        /// The second step; without it: now.
        to: Option<u32>,
        #[command(flatten)]
        remote: Remote,
    },
    /// Take a session back to the moment before a step.
    Rewind {
        /// The session.
        session: String,
        /// The step.
        #[arg(long, value_name = "STEP")]
        to: u32,
        #[command(flatten)]
        remote: Remote,
    },
    /// Make a session that begins at the moment before a step.
    Branch {
        /// The session.
        session: String,
        /// The step.
        #[arg(long, value_name = "STEP")]
        at: u32,
        #[command(flatten)]
        remote: Remote,
    },
}

/// Runs the command.
///
/// # Errors
/// What failed, why, and what to do.
pub fn run(args: &SessionArgs) -> anyhow::Result<ExitCode> {
    let (said, line) = match &args.command {
        SessionCommand::Record {
            session,
            days,
            remote,
        } => {
            let path = format!("/v1/sessions/{}/tape/start", part(session)?);
            let body = json!({ "retention_days": days });
            let tape = remote.post(&path, &body, Duration::ZERO)?;
            let line = format!(
                "session {session} is recorded on tape {}",
                text(&tape, "id")
            );
            (tape, line)
        }
        SessionCommand::Stop { session, remote } => {
            let tape = tape(remote, session)?;
            let path = format!("/v1/tapes/{}/stop", text(&tape, "id"));
            let tape = remote.post(&path, &json!({}), Duration::ZERO)?;
            let line = format!("{} steps are recorded", tape["total_steps"]);
            (tape, line)
        }
        SessionCommand::Log { session, remote } => {
            let tape = tape(remote, session)?;
            return log(remote, &tape, args.json);
        }
        SessionCommand::Diff {
            session,
            from,
            to,
            remote,
        } => {
            let tape = tape(remote, session)?;
            let now = tape["total_steps"].as_u64().unwrap_or(0) + 1;
            let to = to.map_or(now, u64::from);
            let path = format!("/v1/tapes/{}/diff?from={from}&to={to}", text(&tape, "id"));
            let diff = remote.get_slow(&path, TRAVEL)?;
            let paths = diff["changed_paths"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            let lines = paths.iter().filter_map(Value::as_str).map(printable);
            let line = lines.collect::<Vec<_>>().join("\n");
            (diff, line)
        }
        SessionCommand::Rewind {
            session,
            to,
            remote,
        } => {
            let tape = tape(remote, session)?;
            let path = format!("/v1/tapes/{}/rewind", text(&tape, "id"));
            let said = remote.post(&path, &json!({ "to_step": to }), TRAVEL)?;
            let line = format!(
                "session {session} is as it was just before step {to}; rewind to {} to come back",
                said["step_id"]
            );
            (said, line)
        }
        SessionCommand::Branch {
            session,
            at,
            remote,
        } => {
            let tape = tape(remote, session)?;
            let path = format!("/v1/tapes/{}/branch", text(&tape, "id"));
            let said = remote.post(&path, &json!({ "at_step": at }), TRAVEL)?;
            let line = text(&said, "session_id").to_owned();
            (said, line)
        }
    };
    match args.json {
        true => println!("{said}"),
        false if line.is_empty() => {}
        false => println!("{line}"),
    }
    Ok(ExitCode::SUCCESS)
}

/// The session's latest tape.
fn tape(remote: &Remote, session: &str) -> anyhow::Result<Value> {
    let path = format!("/v1/tapes?limit=1&session_id={}", part(session)?);
    let tapes = remote.get(&path)?;
    let tape = tapes.as_array().and_then(|tapes| tapes.first());
    tape.cloned().with_context(|| {
        format!("session {session} was never recorded; `thaw session record {session}` begins")
    })
}

/// A line a step.
fn log(remote: &Remote, tape: &Value, as_json: bool) -> anyhow::Result<ExitCode> {
    let mut table = Table::new(&["STEP", "AT", "LANG", "WHAT", "EXIT", "MS", "CHECKPOINT"]);
    let mut events = Vec::new();
    let mut after = 0;
    loop {
        let path = format!(
            "/v1/tapes/{}/events?after_step={after}&limit={PAGE}",
            text(tape, "id")
        );
        let page = remote.get(&path)?;
        let Some(page) = page.as_array().filter(|page| !page.is_empty()) else {
            break;
        };
        let last = page.last().and_then(|event| event["step_id"].as_i64());
        events.extend(page.iter().cloned());
        match last {
            Some(last) if page.len() as i64 == PAGE && last > after => after = last,
            Some(_) => break,
            None => bail!("the server's answer is no tape"),
        }
    }
    if as_json {
        for event in &events {
            println!("{event}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    for event in events
        .iter()
        .filter(|event| text(event, "kind") != "tool_call_end")
    {
        let ends = events
            .iter()
            .find(|end| text(end, "kind") == "tool_call_end" && end["step_id"] == event["step_id"]);
        let number = |name: &str| {
            let value = ends.and_then(|end| end["payload"][name].as_i64());
            value.map(|value| value.to_string()).unwrap_or_default()
        };
        let what = match text(event, "kind") {
            "tool_call_start" => {
                let code = event["payload"]["code"].as_str();
                let line = code.and_then(|code| code.trim().lines().next());
                line.unwrap_or_default().chars().take(60).collect()
            }
            "rewind" => format!("(back to before step {})", event["payload"]["to_step"]),
            "branch" => format!("(branch {})", text(&event["payload"], "session_id")),
            kind => format!("({kind})"),
        };
        let kept = if event["checkpoint_id"].is_null() {
            ""
        } else {
            "yes"
        };
        table.row([
            event["step_id"].to_string(),
            text(event, "ts").to_owned(),
            text(&event["payload"], "language").to_owned(),
            printable(&what),
            number("exit_code"),
            number("duration_ms"),
            kept.to_owned(),
        ]);
    }
    print!("{table}");
    Ok(ExitCode::SUCCESS)
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

/// Text that somebody else chose, with nothing in it that steers a terminal.
fn printable(text: &str) -> String {
    text.replace(char::is_control, "?")
}

/// An id as a part of a path.
pub(super) fn part(id: &str) -> anyhow::Result<&str> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    ensure!(!id.is_empty() && id.bytes().all(fits), "{id:?} is no id");
    Ok(id)
}
