//! The host's tools that a build runs: found or installed, run, and stopped.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::progress::Progress;

/// Lines of a failing tool's output that an error shows.
const TAIL_LINES: usize = 15;
/// Longest line of a tool's output that is kept.
const MAX_LINE: usize = 400;
/// How often a running tool is looked at.
const TICK: Duration = Duration::from_millis(50);
/// How long a tool may take to clean up after itself when the build is cancelled.
const GRACE: Duration = Duration::from_secs(10);
/// Package lists older than this are fetched anew before anything is installed from them.
const LISTS_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// Set when the person at the terminal wants to stop.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks for the end.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Fails once the end was asked for.
    ///
    /// # Errors
    /// It was.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.0.load(Ordering::Relaxed) {
            bail!("interrupted; nothing half-made is left behind");
        }
        Ok(())
    }
}

/// A tool of the host, and the Debian package it comes in.
#[derive(Clone, Copy, Debug)]
pub struct Tool {
    /// The command.
    pub command: &'static str,
    /// Its package.
    pub package: &'static str,
}

/// What `thaw image build` runs.
pub const IMAGE_TOOLS: &[Tool] = &[
    Tool {
        command: "mmdebstrap",
        package: "mmdebstrap",
    },
    Tool {
        command: "mksquashfs",
        package: "squashfs-tools",
    },
    Tool {
        command: "dpkg-deb",
        package: "dpkg",
    },
    Tool {
        command: "apt-get",
        package: "apt",
    },
];

/// Where a command is, searching `PATH` and the places of system tools.
pub fn which(command: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(command))
        .find(|file| file.is_file())
}

/// Those of `tools` that this host lacks.
pub fn missing(tools: &[Tool]) -> Vec<Tool> {
    tools
        .iter()
        .filter(|tool| which(tool.command).is_none())
        .copied()
        .collect()
}

/// Sees to it that the host has the tools, installing what is missing when that is allowed.
///
/// # Errors
/// Something is missing and may not, or could not, be installed.
pub fn require(
    tools: &[Tool],
    install: bool,
    cancel: &Cancel,
    progress: &Progress,
) -> anyhow::Result<()> {
    let missing = missing(tools);
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    let by_hand = format!("apt-get install {}", packages.join(" "));
    if which("apt-get").is_none() {
        bail!(
            "this host lacks {}, and apt-get to install it: images are built on Debian or a system like it",
            packages.join(", ")
        );
    }
    if !install {
        bail!(
            "this host lacks {}; install it with `{by_hand}` (as root)",
            packages.join(", ")
        );
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "this host lacks {}; install it with `sudo {by_hand}`",
            packages.join(", ")
        );
    }
    progress.note(&format!("installing what the host lacks: {by_hand}"));
    refresh_lists(cancel, progress)?;
    let mut command = Command::new("apt-get");
    command
        .args(["install", "--yes", "--no-install-recommends"])
        .args(&packages)
        .env("DEBIAN_FRONTEND", "noninteractive");
    run(&mut command, cancel, progress)
}

/// Fetches apt's package lists when there are none or they are old.
///
/// # Errors
/// `apt-get update` failed.
pub fn refresh_lists(cancel: &Cancel, progress: &Progress) -> anyhow::Result<()> {
    if lists_are_fresh(Path::new("/var/lib/apt/lists")) {
        return Ok(());
    }
    progress.note("fetching apt's package lists");
    run(Command::new("apt-get").arg("update"), cancel, progress)
}

fn lists_are_fresh(dir: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return false;
    };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
        .filter_map(|entry| entry.metadata().ok()?.modified().ok())
        // A file's date is the archive's; when it was fetched is the change of the directory.
        .max()
        .and_then(|_| std::fs::metadata(dir).ok()?.modified().ok())
        .is_some_and(|fetched| {
            SystemTime::now()
                .duration_since(fetched)
                .map_or(true, |age| age < LISTS_MAX_AGE)
        })
}

/// Runs a tool to its end. What it says is shown only when it fails.
///
/// # Errors
/// It cannot be started, fails (with the tail of its output), or the build is cancelled.
pub fn run(command: &mut Command, cancel: &Cancel, progress: &Progress) -> anyhow::Result<()> {
    run_with(command, cancel, |line| progress.detail(line)).map(|_| ())
}

/// Runs a tool to its end and gives back what it wrote to standard output.
///
/// # Errors
/// As [`run`].
pub fn output(command: &mut Command, cancel: &Cancel) -> anyhow::Result<String> {
    run_with(command, cancel, |_| ())
}

fn run_with(
    command: &mut Command,
    cancel: &Cancel,
    mut on_line: impl FnMut(&str),
) -> anyhow::Result<String> {
    cancel.check()?;
    let name = command.get_program().to_string_lossy().into_owned();
    // A group of its own: an interrupt at the terminal reaches the build, which passes it on.
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env("LC_ALL", "C.UTF-8")
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let group = Pid::from_raw(i32::try_from(child.id()).context("a process id is out of range")?);
    let (send, lines) = mpsc::channel();
    let stdout = child
        .stdout
        .take()
        .map(|pipe| forward(pipe, true, send.clone()));
    let stderr = child.stderr.take().map(|pipe| forward(pipe, false, send));
    let mut tail = VecDeque::new();
    let mut text = String::new();
    let mut asked: Option<Instant> = None;
    let mut killed = false;
    let status = loop {
        match lines.recv_timeout(TICK) {
            Ok((from_stdout, line)) => {
                on_line(&line);
                if from_stdout {
                    text.push_str(&line);
                    text.push('\n');
                }
                tail.push_back(line);
                if tail.len() > TAIL_LINES {
                    tail.pop_front();
                }
                continue;
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            // Both pipes are closed: only the end remains to be waited for.
            Err(mpsc::RecvTimeoutError::Disconnected) => std::thread::sleep(TICK / 10),
        }
        if let Some(status) = child
            .try_wait()
            .with_context(|| format!("cannot wait for {name}"))?
        {
            break status;
        }
        if cancel.check().is_err() {
            let signal = match asked {
                None => Some(Signal::SIGINT),
                Some(since) if since.elapsed() > GRACE && !killed => {
                    killed = true;
                    Some(Signal::SIGKILL)
                }
                Some(_) => None,
            };
            if let Some(signal) = signal {
                asked.get_or_insert_with(Instant::now);
                if let Err(error) = killpg(group, signal) {
                    tracing::debug!("cannot signal {name}: {error}");
                }
            }
        }
    };
    cancel.check()?;
    for reader in [stdout, stderr].into_iter().flatten() {
        if reader.join().is_err() {
            bail!("reading the output of {name} failed");
        }
    }
    for (from_stdout, line) in lines.try_iter() {
        if from_stdout {
            text.push_str(&line);
            text.push('\n');
        }
        tail.push_back(line);
        if tail.len() > TAIL_LINES {
            tail.pop_front();
        }
    }
    if !status.success() {
        let tail: Vec<String> = tail.into_iter().map(|line| format!("  {line}\n")).collect();
        bail!(
            "{name} failed ({status}); the end of its output:\n{}",
            tail.concat()
        );
    }
    Ok(text)
}

/// Sends a pipe's lines on, from a thread.
fn forward(
    pipe: impl Read + Send + 'static,
    from_stdout: bool,
    to: mpsc::Sender<(bool, String)>,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        loop {
            line.clear();
            match pipe.read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {
                    while line.last().is_some_and(|byte| byte.is_ascii_whitespace()) {
                        line.pop();
                    }
                    line.truncate(MAX_LINE);
                    if to
                        .send((from_stdout, String::from_utf8_lossy(&line).into_owned()))
                        .is_err()
                    {
                        return;
                    }
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_the_tail_of_the_output() {
        let script = "for i in $(seq 1 100); do echo line $i; done; echo why; exit 3";
        let error = run(
            Command::new("sh").args(["-c", script]),
            &Cancel::default(),
            &Progress::quiet(),
        )
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("sh failed") && error.contains("exit status: 3"),
            "{error}"
        );
        assert!(
            error.contains("line 100") && error.contains("why") && !error.contains("line 50\n"),
            "{error}"
        );
    }

    #[test]
    fn output_is_given_back_and_a_missing_command_is_named() {
        let text = output(
            Command::new("sh").args(["-c", "echo a; echo b >&2; echo c"]),
            &Cancel::default(),
        )
        .unwrap();
        assert_eq!(text, "a\nc\n");
        let error = output(&mut Command::new("no-such-tool"), &Cancel::default()).unwrap_err();
        assert!(error.to_string().contains("no-such-tool"));
    }

    #[test]
    fn a_cancelled_build_stops_its_tool() {
        let cancel = Cancel::default();
        let other = cancel.clone();
        let asks = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            other.cancel();
        });
        let error =
            output(Command::new("sh").args(["-c", "sleep 600 & wait"]), &cancel).unwrap_err();
        asks.join().unwrap();
        assert!(error.to_string().contains("interrupted"), "{error}");
        assert!(output(&mut Command::new("true"), &cancel).is_err());
    }

    #[test]
    fn what_is_missing_is_named() {
        let tool = Tool {
            command: "no-such-tool",
            package: "no-such-package",
        };
        assert_eq!(missing(&[tool]).len(), 1);
        let error = require(&[tool], false, &Cancel::default(), &Progress::quiet()).unwrap_err();
        assert!(error.to_string().contains("no-such-package"), "{error}");
    }
}
