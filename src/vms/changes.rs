//! Which files a guest has changed since, as its agent tells.

use std::time::Duration;

use anyhow::{Context, ensure};
use thaw_wire::message::{FileInfo, FileKind, FileWork, Looked, Process, Program};

use crate::session::{RunEvent, Vm};

/// How long a guest may take to look through its files.
const WITHIN: Duration = Duration::from_secs(10);

/// A kernel stamps files with the time of its last tick, which is up to 10 ms ago.
const TICKS_NS: u64 = 20_000_000;

/// Paths that are told by name.
const MOST_PATHS: usize = 200;

/// Most bytes of a guest's answer: so many paths at their longest, and as much again for what JSON adds.
const MOST_BYTES: usize = MOST_PATHS * 2 * 4096 * 2;

/// What was changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Changes {
    /// Where; not all if there are many.
    pub(super) paths: Vec<String>,
    /// How many there are.
    pub(super) count: u64,
    /// The guest's clock when it began to look, nanoseconds since the Unix epoch.
    pub(super) now_ns: u64,
}

/// Asks the guest what was made or changed since.
///
/// # Errors
/// It does not answer in time, or tells nonsense.
pub(super) async fn since(vm: &dyn Vm, since_ns: u64) -> anyhow::Result<Changes> {
    let process = Process {
        program: Program::Files {
            work: FileWork::Changed {
                since_ns: since_ns.saturating_sub(TICKS_NS),
                limit: MOST_PATHS as u64,
            },
        },
        env: Default::default(),
        cwd: None,
        terminal: None,
        name: None,
    };
    let asked = async {
        let mut channel = vm.open(process).await?;
        let mut text = Vec::new();
        loop {
            match channel.output.next().await {
                RunEvent::Stdout(bytes) => text.extend(bytes),
                RunEvent::Stderr(_) | RunEvent::Rich(_) => {}
                RunEvent::Exit(exit) if exit.exit_code == 0 => return parse(&text),
                RunEvent::Exit(exit) => anyhow::bail!("it fails with {}", exit.exit_code),
                RunEvent::Died(reason) => anyhow::bail!("it died: {reason}"),
            }
            ensure!(text.len() <= MOST_BYTES, "it tells too much");
        }
    };
    let answer = tokio::time::timeout(WITHIN, asked).await;
    answer.context("it does not answer in time")?
}

fn parse(text: &[u8]) -> anyhow::Result<Changes> {
    let text = std::str::from_utf8(text).context("it tells no text")?;
    let (files, last) = text.trim_end().rsplit_once('\n').unwrap_or(("", text));
    let looked: Looked = serde_json::from_str(last).context("its last line is none")?;
    let mut paths = Vec::new();
    let mut count = looked.more;
    for line in files.lines() {
        let file: FileInfo = serde_json::from_str(line).context("a line is none")?;
        ensure!(paths.len() < MOST_PATHS, "it tells too much");
        // A directory changes with what is in it, and that is told.
        if file.kind != FileKind::Directory {
            count = count.saturating_add(1);
            paths.push(file.path);
        }
    }
    paths.sort();
    Ok(Changes {
        paths,
        count,
        now_ns: looked.now_ns,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_told_and_nonsense_refused() {
        let file = |path: &str, kind: &str| {
            format!(
                r#"{{"path":"{path}","kind":"{kind}","size":1,"mode":420,"uid":0,"gid":0,"modified":1.5,"target":null}}"#
            )
        };
        let text = format!(
            "{}\n{}\n{}\n{}\n",
            file("/b", "file"),
            file("/d", "directory"),
            file("/a", "file"),
            r#"{"now_ns":7,"more":3}"#
        );
        let found = parse(text.as_bytes()).unwrap();
        assert_eq!(
            (found.paths, found.count, found.now_ns),
            (vec!["/a".to_owned(), "/b".to_owned()], 5, 7)
        );
        let none = parse(br#"{"now_ns":7,"more":0}"#).unwrap();
        assert_eq!((none.paths.len(), none.count), (0, 0));
        for nonsense in ["", "x", "{}", "x\n{\"now_ns\":7,\"more\":0}"] {
            assert!(parse(nonsense.as_bytes()).is_err(), "{nonsense}");
        }
        let many =
            format!("{}\n", file("/a", "file")).repeat(MOST_PATHS + 1) + r#"{"now_ns":7,"more":0}"#;
        assert!(parse(many.as_bytes()).is_err());
    }
}
