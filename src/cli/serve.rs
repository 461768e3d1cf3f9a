//! `thaw serve`: everything together, from the configuration to the drain.

use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prometheus_client::registry::Registry;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::{exit, keys_help, start};
use crate::backend::Backend;
use crate::config::Config;
use crate::http::app::{App, Control};
use crate::http::auth::{self, Auth, Tokens, key};
use crate::http::server::{Server, begin_drain};
use crate::store::Store;
use crate::task::Tasks;

/// The database's name in the data directory.
pub const DATABASE: &str = "thaw.db";

/// One server per data directory: who holds this file's lock is it.
const LOCK: &str = "serve.lock";

/// The variable with the first key. Not a key of the configuration: secrets do not belong in files.
const BOOTSTRAP_KEY: &str = "THAW_BOOTSTRAP_KEY";

/// Least time that VMs get to hibernate in when the server goes, however long their commands took.
const LEAST_FREEZE: Duration = Duration::from_secs(5);

/// Least time of a drain: longer than notes of new VMs are gathered before they are written.
const LAST_NOTES: Duration = Duration::from_millis(400);

/// How long the lock is waited for: a server that was killed with many VMs takes a moment to be gone,
/// and a supervisor starts the next one at once.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// After the grace: how long results may take to be stored and replies to be sent.
const LAST_REPLIES: Duration = Duration::from_secs(5);

/// Serve the API.
#[derive(Debug, Args)]
#[command(
    after_help = "On its first start it makes an API key and prints it once. When it can take requests it prints one\n\
        line on standard output; its log goes to standard error. SIGTERM drains it. --help lists every key.",
    after_long_help = keys_help::text()
)]
pub struct ServeArgs {
    /// Address to listen on [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Where images, templates and the database live [default: /var/lib/thaw for root, else under ~/.local/share]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// The image that sessions run [default: standard when it is built, else minimal]
    #[arg(long, value_name = "NAME")]
    image: Option<String>,
    /// How VMs run their kernel: auto, pv or hvm [default: auto, measured at start-up]
    #[arg(long, value_name = "MACHINE")]
    machine: Option<String>,
    /// PEM file with the certificate chain, for TLS
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<String>,
    /// PEM file with the certificate's private key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<String>,
    /// Serve TLS with a self-signed certificate, made once and kept
    #[arg(long, conflicts_with = "tls_cert")]
    tls_self_signed: bool,
    /// What to log: a level, or directives such as info,thaw::http=debug
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// Log JSON objects
    #[arg(long)]
    log_json: bool,
    /// The configuration file [default: thaw.toml here or in /etc/thaw]
    #[arg(long, env = "THAW_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set any key of the configuration
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl ServeArgs {
    /// What the flags say, as pairs of key and text. `--set` comes first: a named flag is more
    /// deliberate.
    fn pairs(&self) -> anyhow::Result<Vec<(String, String)>> {
        let mut pairs = Vec::new();
        for text in &self.set {
            let Some((path, value)) = text.split_once('=') else {
                bail!("--set wants KEY=VALUE, not {text:?}");
            };
            pairs.push((path.trim().to_owned(), value.trim().to_owned()));
        }
        let named = [
            ("server.listen", &self.listen),
            ("server.data_dir", &self.data_dir),
            ("server.image", &self.image),
            ("vm.machine", &self.machine),
            ("server.tls_cert", &self.tls_cert),
            ("server.tls_key", &self.tls_key),
            ("server.log", &self.log),
        ];
        for (path, value) in named {
            pairs.extend(value.clone().map(|value| (path.to_owned(), value)));
        }
        for (path, set) in [
            ("server.tls_self_signed", self.tls_self_signed),
            ("server.log_json", self.log_json),
        ] {
            if set {
                pairs.push((path.to_owned(), "true".into()));
            }
        }
        Ok(pairs)
    }
}

/// Serves until a signal.
///
/// # Errors
/// It cannot start; see the exit codes.
pub fn run(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let config = args
        .pairs()
        .and_then(|pairs| {
            Config::load(
                args.config.as_deref(),
                |name| std::env::var(name).ok(),
                &pairs,
            )
        })
        .map_err(|error| exit::with(exit::CONFIG, error))?;
    let chosen = chosen_key().map_err(|error| exit::with(exit::CONFIG, error))?;
    start_log(&config)?;
    raise_descriptor_limit();
    let _lock = take_data_dir(&config.server.data_dir, LOCK_WAIT)
        .map_err(|error| exit::with(exit::DATA_DIR, error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let done = runtime.block_on(serve(config, chosen));
    // A blocking job that hangs must not keep a drained server from ending.
    runtime.shutdown_timeout(Duration::from_secs(1));
    done.map(|()| ExitCode::SUCCESS)
}

async fn serve(config: Config, chosen: Option<String>) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let server = Server::bind(&config.server)
        .await
        .map_err(|e| exit::with(exit::BIND, e))?;
    let data_dir = config.server.data_dir.clone();
    // Before the first key is made and shown, which happens once.
    start::check(&config)?;
    let store = Store::open(&data_dir.join(DATABASE)).map_err(|e| exit::with(exit::DATA_DIR, e))?;
    let minted = auth::first_key(&store, chosen).await?;
    if let Some(key) = minted {
        print_line(&format!(
            "first API key (shown once, cannot be recovered): {key}"
        ))?;
    }
    let tokens = Tokens::open(&data_dir, config.auth.token_lifetime_s)?;
    let auth = Auth::start(
        store.clone(),
        tokens,
        &config.auth,
        config.default_plan.clone(),
    )
    .await?;
    let followed = auth.clone();
    tokio::spawn(followed.follow());
    tokio::spawn(auth.clone().note_uses());

    let mut registry = Registry::with_prefix("thaw");
    let started = start::sessions(&config, &store, &mut registry);
    let started = tokio::select! {
        started = started => started?,
        () = signals.next() => return Ok(()),
    };
    let sessions = started.sessions;
    let backend: Arc<dyn Backend> = Arc::new(sessions.clone());
    let vms = started.vms;
    let control = Control {
        store: store.clone(),
        vms: vms.clone(),
    };
    let tasks = Tasks::start(store, backend.clone(), config.task.clone()).await?;
    let app = App::new(
        config.clone(),
        auth.clone(),
        backend,
        tasks.clone(),
        control,
        registry,
        started.machine,
    )?;
    for sleeper in sessions.sleepers() {
        app.terminals.restore(sleeper);
    }
    let (stop, stopped) = watch::channel(false);
    let url = server.url();
    let serving = tokio::spawn(server.serve(app.clone(), stopped));
    tokio::select! {
        () = sessions.pool_ready() => {
            let pool = config.session.pool.high;
            let facts = started.facts;
            print_line(&format!("thaw is ready at {url}: {facts}, pool of {pool}"))?;
            signals.next().await;
        }
        () = signals.next() => {}
    }

    let grace = Duration::from_secs(config.server.drain_s);
    tracing::info!(
        grace_s = grace.as_secs(),
        "draining; a second signal ends at once"
    );
    begin_drain(&app);
    stop.send_replace(true);
    let drained = async {
        // The store writes notes of VMs that just started a moment later, together.
        let ended = async {
            let began = tokio::time::Instant::now();
            sessions.finish(grace).await;
            if config.snapshot.hibernate_after_s > 0 {
                let left = grace.saturating_sub(began.elapsed()).max(LEAST_FREEZE);
                vms.hibernate_all(left).await;
            }
            sessions.end_all().await;
        };
        tokio::join!(ended, tokio::time::sleep(LAST_NOTES));
        tasks.settle(LAST_REPLIES).await;
        vms.settle().await;
        auth.flush_uses().await;
        if tokio::time::timeout(LAST_REPLIES, serving).await.is_err() {
            tracing::warn!("some connections were cut at shutdown");
        }
    };
    tokio::select! {
        () = drained => tracing::info!("drained"),
        () = signals.next() => tracing::warn!("ended by a second signal"),
    }
    Ok(())
}

/// Writes a line for whoever started the server. A pipe nobody reads any more is no failure.
fn print_line(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

/// The key that the environment gives, if it is fit to be one.
fn chosen_key() -> anyhow::Result<Option<String>> {
    match std::env::var(BOOTSTRAP_KEY) {
        Ok(text) if text.is_empty() => Ok(None),
        Ok(text) => match key::check_chosen(&text) {
            Ok(()) => Ok(Some(text)),
            Err(why) => bail!("{BOOTSTRAP_KEY} cannot be used: {why}"),
        },
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(_) => bail!("{BOOTSTRAP_KEY} cannot be used: it is not text"),
    }
}

fn start_log(config: &Config) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.server.log)
        .map_err(|error| exit::with(exit::CONFIG, anyhow!("server.log: {error}")))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let set = if config.server.log_json {
        log.json().flatten_event(true).try_init()
    } else {
        log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .try_init()
    };
    set.map_err(|error| anyhow!("cannot start the log: {error}"))
}

/// Each VM and each connection takes descriptors; the usual soft limit is 1024.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
}

/// Makes the directory, its owner's alone, and takes its lock until the value is dropped.
fn take_data_dir(dir: &Path, wait: Duration) -> anyhow::Result<Flock<std::fs::File>> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make the data directory {}", dir.display()))?;
    let path = dir.join(LOCK);
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let give_up = Instant::now() + wait;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK)) if Instant::now() < give_up => file = back,
            Err((_, Errno::EWOULDBLOCK)) => bail!(
                "another thaw serves {}; give this one another --data-dir",
                dir.display()
            ),
            Err((_, errno)) => bail!("cannot lock {}: {errno}", path.display()),
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let watch = |kind| signal(kind).context("cannot watch for signals");
        Ok(Self {
            terminate: watch(SignalKind::terminate())?,
            interrupt: watch(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_server_per_data_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let first = take_data_dir(&path, Duration::ZERO).unwrap();
        let error = take_data_dir(&path, Duration::ZERO)
            .unwrap_err()
            .to_string();
        assert!(error.contains("another thaw"), "{error}");
        drop(first);
        take_data_dir(&path, Duration::ZERO).unwrap();
    }
}
