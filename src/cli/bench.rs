//! `thaw bench`: the figures, measured here.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{DataDir, exit};
use crate::bench::facts::Facts;
use crate::bench::samples::Samples;
use crate::bench::server::Server;
use crate::bench::{cases, forks, peer, restore, streams, tapes, vcpus};
use crate::image::Image;

/// Measure this host: starts what it needs by itself and ends it again.
#[derive(Debug, Args)]
#[command(after_help = "\
  thaw bench warm       POST /execute of print(1) in a running session, one kept-alive connection
  thaw bench cold       a new session's first result, with VMs waiting in the pool
  thaw bench restore    a worker's start to its guest running, without a pool
  thaw bench churn      sessions created, used and destroyed a second
  thaw bench memory     memory that an idle session costs, worker included
  thaw bench python     a fresh python3 process in the guest, against the bare host
  thaw bench stream     a line's print in the guest to its event at the client
  thaw bench files      100 MiB into a VM and out again
  thaw bench fork       8 forks of a VM with 20 MiB of its own, its wake from disk, its snapshot's size
  thaw bench tape       what recording a session costs its commands
  thaw bench vcpus      the same work on one vCPU and on two, in turn
  thaw bench peer       restores by thaw and by a Firecracker of yours (--firecracker PATH), in turn
Figures are for this host and this minute: compare what was measured in one run.")]
pub struct BenchArgs {
    /// What to measure.
    case: Case,
    /// How many times; each case has its own default.
    #[arg(short, long, value_name = "N")]
    runs: Option<usize>,
    /// The image to use; `thaw image build` makes one.
    #[arg(long, default_value = "minimal")]
    image: String,
    /// The Firecracker program to compare with, in the case `peer`.
    #[arg(long, value_name = "PATH", required_if_eq("case", "peer"))]
    firecracker: Option<std::path::PathBuf>,
    /// Another argument for it, such as --no-seccomp for one that was not built for its own filter; may be repeated.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    firecracker_arg: Vec<String>,
    #[command(flatten)]
    data: DataDir,
    /// One JSON object a line: name, n, p50_us, p99_us, max_us.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Case {
    Warm,
    Cold,
    Restore,
    Churn,
    Memory,
    Python,
    Stream,
    Files,
    Fork,
    Tape,
    Vcpus,
    Peer,
}

/// Runs the command.
///
/// # Errors
/// The benchmark could not run; nothing was printed as a figure then.
pub fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let facts = Facts::read()?;
    let data_dir = args.data.path();
    Image::open(&data_dir, &args.image).map_err(|error| exit::with(exit::IMAGE, error))?;
    let report = Report {
        json: args.json,
        host: std::cell::OnceCell::new(),
    };
    let runs = |default| args.runs.unwrap_or(default).max(1);
    if let Case::Restore = args.case {
        let phases = restore::measure(&data_dir, &args.image, runs(100))
            .context("the restore benchmark could not run")?;
        report.facts(&facts);
        return phases
            .iter()
            .try_for_each(|samples| report.samples(samples))
            .map(|()| ExitCode::SUCCESS);
    }
    if let (Case::Peer, Some(firecracker)) = (args.case, &args.firecracker) {
        let done = peer::measure(
            &data_dir,
            &args.image,
            firecracker,
            &args.firecracker_arg,
            runs(20),
        )
        .context("the comparison could not run")?;
        report.facts(&facts);
        report.note("peer", &done.version);
        let pairs = [(&done.thaw, &done.peer), (&done.thaw_load, &done.peer_load)];
        for (thaw, peer) in pairs {
            report.samples(thaw)?;
            report.samples(peer)?;
            let ratio = thaw.percentile(50)? as f64 / peer.percentile(50)? as f64;
            report.figure("thaw / Firecracker, medians", ratio, "x");
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Case::Vcpus = args.case {
        let settings = [("THAW_SESSION_MAX_VCPUS", "2")];
        let server = Server::start_with(&data_dir, &args.image, &settings)?;
        let pairs = vcpus::measure(&server, runs(20))?;
        report.facts(&facts);
        for pair in &pairs {
            report.samples(&pair.one)?;
            report.samples(&pair.two)?;
            let ratio = pair.two.percentile(50)? as f64 / pair.one.percentile(50)? as f64;
            report.figure("2 vCPUs / 1, medians", ratio, "x");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let server = Server::start(&data_dir, &args.image)?;
    match args.case {
        Case::Warm => {
            let samples = cases::warm(&server, runs(2000))?;
            report.facts(&facts);
            report.samples(&samples)?;
        }
        Case::Cold => {
            let samples = cases::cold(&server, runs(50))?;
            report.facts(&facts);
            report.samples(&samples)?;
        }
        Case::Churn => {
            let (samples, rate) = cases::churn(&server, runs(200), 4)?;
            report.facts(&facts);
            report.samples(&samples)?;
            report.figure("cycles", rate, "/s");
        }
        Case::Memory => {
            let sizes = cases::memory(&server, runs(20))?;
            let mib = |kib: Option<&u64>| kib.map_or(0.0, |&kib| kib as f64 / 1024.0);
            report.facts(&facts);
            report.figure("workers", sizes.len() as f64, "");
            report.figure(
                "unique memory of a worker, median",
                mib(sizes.get(sizes.len() / 2)),
                "MiB",
            );
            report.figure("unique memory of a worker, most", mib(sizes.last()), "MiB");
        }
        Case::Python => {
            let (guest, host) = cases::fresh_python(&server, runs(40))?;
            report.facts(&facts);
            report.samples(&guest)?;
            report.samples(&host)?;
            report.figure(
                "guest / host, medians",
                guest.percentile(50)? as f64 / host.percentile(50)? as f64,
                "x",
            );
        }
        Case::Stream => {
            let samples = streams::output(&server, runs(200))?;
            report.facts(&facts);
            report.samples(&samples)?;
        }
        Case::Files => {
            let (up, down) = streams::files(&server, runs(10))?;
            report.facts(&facts);
            for samples in [&up, &down] {
                report.samples(samples)?;
            }
            report.figure("into a VM, median", streams::rate(&up)?, "MB/s");
            report.figure("out of a VM, median", streams::rate(&down)?, "MB/s");
        }
        Case::Fork => {
            let done = forks::measure(&server, runs(20))?;
            report.facts(&facts);
            for samples in [&done.pause, &done.ready, &done.wake] {
                report.samples(samples)?;
            }
            report.figure("its snapshot adds to the disk", done.snapshot_mib, "MiB");
        }
        Case::Tape => {
            let all = tapes::measure(&server, runs(100))?;
            report.facts(&facts);
            for samples in &all {
                report.samples(samples)?;
            }
        }
        Case::Restore | Case::Peer | Case::Vcpus => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints results, for people or for machines.
struct Report {
    json: bool,
    /// The host, which every JSON object names: each line is a figure by itself.
    host: std::cell::OnceCell<Value>,
}

impl Report {
    fn facts(&self, facts: &Facts) {
        if self.json {
            self.host.get_or_init(|| facts.json());
        } else {
            println!("{}", facts.line());
        }
    }

    fn samples(&self, samples: &Samples) -> anyhow::Result<()> {
        if self.json {
            println!("{}", self.with_host(samples.json()?));
        } else {
            println!("{}", samples.line()?);
        }
        Ok(())
    }

    fn note(&self, name: &str, text: &str) {
        if self.json {
            println!("{}", self.with_host(json!({"name": name, "text": text})));
        } else {
            println!("{name}: {text}");
        }
    }

    fn with_host(&self, mut figure: Value) -> Value {
        if let Some(host) = self.host.get() {
            figure["host"] = host.clone();
        }
        figure
    }

    fn figure(&self, name: &str, value: f64, unit: &str) {
        if self.json {
            println!(
                "{}",
                self.with_host(json!({"name": name, "value": value, "unit": unit}))
            );
        } else {
            println!("{name:<44} {value:.2} {unit}");
        }
    }
}
