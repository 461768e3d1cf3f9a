//! Snapshots on a running server: made, run, and searched for the one that broke something.

use std::collections::HashMap;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::exit;
use super::super::remote::{Refused, Remote};
use super::super::session::part;
use super::short;

/// A VM that only runs one command lives this much longer than that may take, should nobody end it.
const SPARE: Duration = Duration::from_secs(60);

/// The exit code that says of a snapshot that it cannot be tested, as for `git bisect run`.
const SKIP: i32 = 125;

/// What is to be frozen.
#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// A VM's id, or a session's.
    vm: String,
    /// What to call the snapshot.
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    remote: Remote,
}

/// How a command is run in a VM of its own.
#[derive(Debug, Args)]
struct Trial {
    /// The language: bash, python or javascript. Python sees the variables of the snapshot's session.
    #[arg(short, long, default_value = "bash", value_name = "LANG")]
    lang: String,
    /// Seconds the command may take, 1 to 600.
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=600))]
    timeout: u32,
    #[command(flatten)]
    remote: Remote,
}

/// Which command on which snapshot.
#[derive(Debug, Args)]
#[command(after_help = "\
  thaw snapshot exec A -- pytest -q
  thaw snapshot exec A -l python -- 'print(len(rows))'")]
pub(super) struct ExecArgs {
    /// The snapshot.
    snapshot: String,
    #[command(flatten)]
    trial: Trial,
    /// The command. Several words are its arguments; a single one is a script.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Which command on which snapshots.
#[derive(Debug, Args)]
#[command(after_help = "\
  thaw snapshot bisect A..B -- pytest -q
B must have come from A. The command succeeds on A and fails on B; every snapshot is tried in a VM of its own. Exit code 125
says that a snapshot cannot be tested; others are tried instead.")]
pub(super) struct BisectArgs {
    /// A good snapshot and a bad one that came from it, with .. between.
    #[arg(value_name = "A..B")]
    range: String,
    #[command(flatten)]
    trial: Trial,
    /// The command. Several words are its arguments; a single one is a script.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// A snapshot as the server tells of it; what else it says is not needed here.
#[derive(Clone, Debug, Deserialize)]
struct Told {
    id: String,
    name: String,
    parent_snapshot_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Answer {
    stdout: String,
    stderr: String,
    exit_code: i32,
}

/// `create`.
pub(super) fn create(args: &CreateArgs, as_json: bool) -> anyhow::Result<ExitCode> {
    let id = part(&args.vm)?;
    let body = json!({ "name": args.name });
    let freeze = |vm: &str| {
        let path = format!("/v1/vms/{vm}/snapshot");
        args.remote.post(&path, &body, Duration::from_secs(60))
    };
    let is_404 = |error: &anyhow::Error| {
        let refused = error.downcast_ref::<Refused>();
        refused.is_some_and(|refused| refused.status == 404)
    };
    let made = match freeze(id) {
        Err(error) if is_404(&error) => {
            let session = args.remote.get(&format!("/v1/sessions/status/{id}"));
            let session = match session {
                Err(error) if is_404(&error) => {
                    bail!("there is no VM and no session {id} of yours")
                }
                other => other?,
            };
            let vm = session["vm_id"].as_str();
            freeze(vm.with_context(|| format!("session {id} has no VM just now"))?)?
        }
        other => other?,
    };
    if as_json {
        println!("{made}");
    } else {
        println!("{}", made["id"].as_str().unwrap_or_default());
    }
    Ok(ExitCode::SUCCESS)
}

/// `exec`.
pub(super) fn exec(args: &ExecArgs, as_json: bool) -> anyhow::Result<ExitCode> {
    let run = || {
        let known = snapshots(&args.trial.remote)?;
        let one = find(&known, &args.snapshot)?;
        let answer = args.trial.run(&one.id, &script(&args.command)?)?;
        let parsed: Answer = serde_json::from_value(answer.clone())
            .context("the server's answer is not a result")?;
        anyhow::Ok((answer, parsed))
    };
    let (answer, parsed) = run().map_err(|error| exit::with(exit::NOT_RUN, error))?;
    if as_json {
        println!("{answer}");
    } else {
        // A closed pipe (`| head`) is no reason to lose the exit code.
        drop(std::io::stdout().write_all(parsed.stdout.as_bytes()));
        drop(std::io::stderr().write_all(parsed.stderr.as_bytes()));
    }
    let code = u8::try_from(parsed.exit_code);
    Ok(ExitCode::from(code.unwrap_or(exit::FAILED)))
}

/// `bisect`.
pub(super) fn bisect(args: &BisectArgs, as_json: bool) -> anyhow::Result<ExitCode> {
    let (good, bad) = args
        .range
        .split_once("..")
        .filter(|(a, b)| !a.is_empty() && !b.is_empty())
        .context("give a good snapshot and a bad one as A..B")?;
    let known = snapshots(&args.trial.remote)?;
    let line = lineage(&known, find(&known, good)?, find(&known, bad)?)?;
    let script = script(&args.command)?;
    let mut tried = HashMap::new();
    let mut verdict = |number: usize| -> anyhow::Result<Option<bool>> {
        if let Some(known) = tried.get(&number) {
            return Ok(*known);
        }
        let one: &Told = &line[number];
        let answer: Answer = serde_json::from_value(args.trial.run(&one.id, &script)?)
            .context("the server's answer is not a result")?;
        let (word, good) = match answer.exit_code {
            0 => ("good", Some(true)),
            SKIP => ("cannot be tested", None),
            _ => ("bad", Some(false)),
        };
        tried.insert(number, good);
        if as_json {
            println!(
                "{}",
                json!({ "id": one.id, "name": one.name, "exit_code": answer.exit_code, "good": good })
            );
        } else {
            let (place, all) = (number + 1, line.len());
            println!(
                "{} {place:>4} of {all}  exit code {:<3}  {word}",
                short(&one.id),
                answer.exit_code
            );
        }
        Ok(good)
    };
    let last = line.len() - 1;
    ensure!(
        verdict(0)? == Some(true),
        "the command fails on {} already; give an older snapshot",
        line[0].id
    );
    ensure!(
        verdict(last)? == Some(false),
        "the command does not fail on {}; give a snapshot where it does",
        line[last].id
    );
    let (before, first) = search(last, &mut verdict)?;
    let (found, unsure) = (&line[first], first - before - 1);
    if as_json {
        println!(
            "{}",
            json!({ "first_bad": found.id, "last_good": line[before].id, "untested_between": unsure })
        );
    } else {
        println!(
            "{} is the first bad snapshot, {} the last good one",
            found.id, line[before].id
        );
        if unsure > 0 {
            println!("{unsure} between them could not be tested; any of these may be the first");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Between 0, which is good, and `bad`: the last good number and the first bad one, with nothing between that could be tested.
fn search(
    bad: usize,
    verdict: &mut impl FnMut(usize) -> anyhow::Result<Option<bool>>,
) -> anyhow::Result<(usize, usize)> {
    let (mut good, mut bad) = (0, bad);
    'narrow: while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        // The middle, then what is nearest to it.
        let mut between: Vec<usize> = (good + 1..bad).collect();
        between.sort_by_key(|number| number.abs_diff(middle));
        for number in between {
            match verdict(number)? {
                Some(true) => good = number,
                Some(false) => bad = number,
                None => continue,
            }
            continue 'narrow;
        }
        break;
    }
    Ok((good, bad))
}

impl Trial {
    /// Runs a script in a new VM that is restored from the snapshot, and ends that.
    fn run(&self, snapshot: &str, script: &str) -> anyhow::Result<Value> {
        let runs = Duration::from_secs(self.timeout.into());
        let lifetime = (runs + SPARE).as_secs();
        let body = json!({ "snapshot_id": snapshot, "vm_lifetime_seconds": lifetime });
        let vm = self.remote.post("/v1/vms", &body, Duration::ZERO)?;
        let (Some(id), Some(session)) = (vm["vm_id"].as_str(), vm["session_id"].as_str()) else {
            bail!("the server's answer is no VM");
        };
        let body = json!({
            "session_id": session, "command": script, "language": self.lang, "timeout": self.timeout,
        });
        let answer = self.remote.post("/execute", &body, runs);
        if let Err(error) = self.remote.delete(&format!("/v1/vms/{id}")) {
            eprintln!("VM {id} goes on until its lifetime of {lifetime} s ends: {error:#}");
        }
        answer
    }
}

fn snapshots(remote: &Remote) -> anyhow::Result<Vec<Told>> {
    serde_json::from_value(remote.get("/v1/snapshots")?)
        .context("the server's answer is no list of snapshots")
}

/// The one snapshot whose id begins so, or that has this name.
fn find<'a>(known: &'a [Told], wanted: &str) -> anyhow::Result<&'a Told> {
    if let Some(found) = known.iter().find(|one| one.id == wanted) {
        return Ok(found);
    }
    let fits = |one: &&Told| one.name == wanted || one.id.starts_with(wanted);
    let mut fitting = known.iter().filter(fits);
    match (fitting.next(), fitting.next()) {
        (Some(found), None) => Ok(found),
        (None, _) => bail!("this key's user has no snapshot {wanted}"),
        _ => bail!("several snapshots are called {wanted}; give more of the id"),
    }
}

/// The snapshots from one to another that came from it, in the order they were made.
fn lineage(known: &[Told], from: &Told, to: &Told) -> anyhow::Result<Vec<Told>> {
    let by_id: HashMap<&str, &Told> = known.iter().map(|one| (one.id.as_str(), one)).collect();
    let mut line = vec![to.clone()];
    let mut at = to;
    while at.id != from.id {
        let parent = at.parent_snapshot_id.as_deref();
        let next = parent.and_then(|id| by_id.get(id));
        // No more steps than there are snapshots: a file that was imported may say anything of its parent.
        let next = next.filter(|_| line.len() <= known.len());
        at = next.with_context(|| {
            format!(
                "snapshot {} did not come from {}; see `thaw snapshot tree`",
                to.id, from.id
            )
        })?;
        line.push(at.clone());
    }
    ensure!(line.len() > 1, "give two different snapshots");
    line.reverse();
    Ok(line)
}

/// Words as one script: several are quoted, so that each arrives as one argument.
fn script(words: &[String]) -> anyhow::Result<String> {
    match words {
        [script] => Ok(script.clone()),
        words => shlex::try_join(words.iter().map(String::as_str))
            .context("the command has a word that no shell can take"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bad_one_is_found_and_what_cannot_be_tested_is_stepped_over() {
        for (first_bad, skipped) in [(1, 0..0), (7, 0..0), (9, 0..0), (5, 2..4), (6, 3..6)] {
            let mut asked = 0;
            let found = search(9, &mut |number| {
                asked += 1;
                Ok((!skipped.contains(&number)).then_some(number < first_bad))
            });
            let (good, bad) = found.unwrap();
            let untested = (good + 1..bad).all(|number| skipped.contains(&number));
            assert!(good < first_bad && bad >= first_bad && untested);
            assert!(asked <= 4 + skipped.len() * 2, "{asked}");
        }
    }

    #[test]
    fn a_lineage_is_followed_to_its_beginning_and_no_further() {
        let told = |id: &str, parent: Option<&str>| Told {
            id: id.into(),
            name: String::new(),
            parent_snapshot_id: parent.map(Into::into),
        };
        let known = [
            told("a", None),
            told("b", Some("a")),
            told("c", Some("b")),
            told("x", Some("y")),
            told("y", Some("x")),
        ];
        let line = lineage(&known, &known[0], &known[2]).unwrap();
        let ids: Vec<&str> = line.iter().map(|one| one.id.as_str()).collect();
        assert_eq!(ids, ["a", "b", "c"]);
        for (from, to) in [(2, 0), (0, 0), (0, 3)] {
            assert!(lineage(&known, &known[from], &known[to]).is_err());
        }
    }

    #[test]
    fn several_words_are_arguments_and_one_is_a_script() {
        let words = |words: &[&str]| {
            script(
                &words
                    .iter()
                    .map(|word| (*word).into())
                    .collect::<Vec<String>>(),
            )
            .unwrap()
        };
        assert_eq!(words(&["a | b"]), "a | b");
        assert_eq!(words(&["echo", "a b"]), "echo 'a b'");
        assert!(part("../x").is_err());
    }
}
