//! Every key of the configuration, its default and its doc.
//!
//! A key is a path such as `server.listen`. Its value comes from, strongest first: a flag (the
//! named ones, or `--set server.listen=…`), the environment (`THAW_SERVER_LISTEN`, or the short
//! name where there is one), `thaw.toml`, the default. Every field of [`Config`] is a key; the key
//! list in `thaw serve --help` is made from it, so there is no second list to forget.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use crate::session::SessionConfig;

/// Everything that can be configured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where requests come from and what they may cost.
    pub server: ServerConfig,
    /// Who may use the server.
    pub auth: AuthConfig,
    /// The plan of whoever has no other.
    pub default_plan: DefaultPlan,
    /// Asynchronous commands.
    pub task: TaskConfig,
    /// What a session gets when the client does not say.
    pub vm: VmConfig,
    /// How sessions and the pool behave.
    pub session: SessionConfig,
    /// Snapshots of VMs.
    pub snapshot: SnapshotConfig,
    /// What is remembered of what happened to whom.
    pub audit: AuditConfig,
}

/// The `[server]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Address to listen on. Loopback by default: other machines reach it when you say so.
    pub listen: SocketAddr,
    /// Where images, templates and the database live.
    pub data_dir: PathBuf,
    /// The image sessions run. Empty: `standard` when it is built, else `minimal`.
    pub image: String,
    /// PEM file with the certificate chain; empty: no TLS.
    pub tls_cert: PathBuf,
    /// PEM file with the private key of `tls_cert`.
    pub tls_key: PathBuf,
    /// Serve TLS with a self-signed certificate, made once and kept in the data directory.
    pub tls_self_signed: bool,
    /// Connections open at once; more wait to be accepted.
    pub max_connections: usize,
    /// Largest request body in bytes; larger ones get 413.
    pub max_body_bytes: usize,
    /// Megabytes of request bodies that may be in memory at once; more wait, and get 429 in the end. An eighth is
    /// for callers whose key is in the body.
    pub body_memory_mib: u32,
    /// Largest file in bytes that may be uploaded; a VM's memory is the narrower bound.
    pub max_upload_bytes: u64,
    /// Largest request head in bytes.
    pub max_header_bytes: usize,
    /// Seconds a client may take to send a request's head.
    pub header_timeout_s: u64,
    /// Seconds a client may take to send a request's body.
    pub body_timeout_s: u64,
    /// Seconds a connection may stay open without a request.
    pub idle_timeout_s: u64,
    /// Seconds a TLS handshake may take.
    pub handshake_timeout_s: u64,
    /// Seconds that running commands get to finish after SIGTERM.
    pub drain_s: u64,
    /// Log lines as JSON objects.
    pub log_json: bool,
    /// What to log: a level, or `tracing` directives such as `info,thaw::http=debug`.
    pub log: String,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            data_dir: default_data_dir(),
            image: String::new(),
            tls_cert: PathBuf::new(),
            tls_key: PathBuf::new(),
            tls_self_signed: false,
            max_connections: 1024,
            // A notebook cell or a script with a small file in it; uploads have their own route.
            max_body_bytes: 4 << 20,
            // A sixteenth of the smallest host that thaw is made for.
            body_memory_mib: 256,
            // Half of the largest VM: a file is held in its memory.
            max_upload_bytes: 4 << 30,
            max_header_bytes: 16 << 10,
            header_timeout_s: 10,
            body_timeout_s: 30,
            // Longer than common proxies' 60 s, so that they, not we, close idle connections.
            idle_timeout_s: 75,
            handshake_timeout_s: 10,
            drain_s: 30,
            log_json: false,
            log: "info".into(),
        }
    }
}

/// The `[auth]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthConfig {
    /// Seconds a bearer token from `POST /token` is good for.
    pub token_lifetime_s: u64,
    /// Password attempts per user name in a minute.
    pub logins_per_minute: u32,
}

impl Default for AuthConfig {
    fn default() -> Self {
        Self {
            token_lifetime_s: 3600,
            logins_per_minute: 10,
        }
    }
}

/// The `[default_plan]` section. `thaw plan set default …` overrides it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DefaultPlan {
    /// Requests a key may make in a minute, in the long run.
    pub requests_per_minute: u32,
    /// Requests a key may make at once after a pause.
    pub burst: u32,
    /// VMs a user may have at once.
    pub max_vms: u32,
}

impl Default for DefaultPlan {
    fn default() -> Self {
        // For the box's only user: high enough that nobody who works hits it (a warm command
        // takes about a millisecond), low enough that a runaway loop is noticed.
        Self {
            requests_per_minute: 240_000,
            burst: 20_000,
            max_vms: 256,
        }
    }
}

/// The `[task]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaskConfig {
    /// Tasks of one user that may wait or run; more get 429.
    pub max_open: u32,
    /// Megabytes of code that the tasks of one user that wait or run may have together; more get 429.
    pub max_open_code_mib: u32,
    /// Milliseconds between two writes of a running task's output to the database.
    pub flush_ms: u64,
    /// Seconds a complete task's result is kept.
    pub keep_s: u64,
    /// Results that are kept at most, over all users; the oldest go first.
    pub keep_count: u32,
    /// Megabytes the database may have; the oldest results go first.
    pub keep_mib: u64,
    /// Seconds a task may wait for a VM when host or plan are full, before it fails.
    pub wait_for_vm_s: u64,
}

impl Default for TaskConfig {
    fn default() -> Self {
        Self {
            max_open: 1000,
            // A thousand notebook cells fit many times over; a sixteenth of what the database keeps.
            max_open_code_mib: 64,
            flush_ms: 200,
            keep_s: 24 * 3600,
            keep_count: 20_000,
            keep_mib: 1024,
            wait_for_vm_s: 600,
        }
    }
}

/// The `[vm]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmConfig {
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u32,
    /// Seconds a VM lives from its start.
    pub lifetime_s: u64,
    /// `auto` (measured at start-up), `pv` or `hvm`.
    pub machine: String,
    /// Records of VMs that are no more, kept for each user; the oldest go first.
    pub keep_records: usize,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            memory_mib: 512,
            vcpus: 1,
            lifetime_s: 300,
            machine: "auto".into(),
            keep_records: 1000,
        }
    }
}

/// The `[snapshot]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SnapshotConfig {
    /// Snapshots one user may have, suspended VMs included and hibernating ones not; more get 429.
    pub max_per_tenant: usize,
    /// MiB on disk that one user's snapshots may take together, suspended VMs included; more get 429.
    pub max_mib_per_tenant: u64,
    /// MiB of the data directory's file system that snapshots leave free.
    pub disk_floor_mib: u64,
    /// Snapshots that are written or checked at the same time; more wait.
    pub concurrency: usize,
    /// Seconds that `suspend` waits for the command that runs in the VM, before it is refused.
    pub suspend_wait_s: u64,
    /// A VM without a command, and whose terminals nobody looks at, hibernates after this many seconds: it is frozen to disk,
    /// and the next command or look at a terminal wakes it. 0: never.
    pub hibernate_after_s: u64,
    /// When the host is full and a VM is wanted, the one that has been idle longest hibernates, if that is at least
    /// this many seconds. 0: none gives way, and the new one gets 429.
    pub pressure_idle_s: u64,
    /// Checkpoints that the tape of a recorded session keeps; the oldest go first.
    pub checkpoints_per_tape: usize,
}

impl Default for SnapshotConfig {
    fn default() -> Self {
        Self {
            max_per_tenant: 64,
            max_mib_per_tenant: 32 << 10,
            disk_floor_mib: 1024,
            concurrency: 2,
            suspend_wait_s: 30,
            hibernate_after_s: 0,
            // A notebook's user reads for longer than that; a program that calls in a loop does not pause so long.
            pressure_idle_s: 10,
            // A few MiB each, as far as they differ.
            checkpoints_per_tape: 64,
        }
    }
}

/// The `[audit]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// Seconds an event is kept.
    pub keep_s: u64,
    /// Events that are kept at most, over all users; the oldest go first.
    pub keep_count: u64,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self {
            keep_s: 90 * 24 * 3600,
            keep_count: 200_000,
        }
    }
}

/// `/var/lib/thaw` for root, else thaw's place under the user's XDG data directory.
pub fn default_data_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return "/var/lib/thaw".into();
    }
    let xdg = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share"));
    xdg.filter(|path| path.is_absolute())
        .or_else(home)
        .map_or_else(|| "/var/tmp/thaw".into(), |base| base.join("thaw"))
}

/// Environment names that are shorter than their key says.
const SHORT_NAMES: &[(&str, &str)] = &[
    ("THAW_LISTEN", "server.listen"),
    ("THAW_DATA_DIR", "server.data_dir"),
    ("THAW_IMAGE", "server.image"),
    ("THAW_LOG", "server.log"),
    ("THAW_MACHINE", "vm.machine"),
];

/// One key, for help and for reading the environment.
#[derive(Clone, Debug)]
pub struct Key {
    /// Such as `server.listen`.
    pub path: String,
    /// Such as `THAW_SERVER_LISTEN`.
    pub env: String,
    /// Its default, as TOML.
    pub default: Value,
}

impl Config {
    /// Reads the configuration.
    ///
    /// `file` is a `thaw.toml` that must exist, or `None` for the one in the working directory or
    /// `/etc/thaw`, if any. `env` looks a variable up. `flags` are (key, text) pairs, in order.
    ///
    /// # Errors
    /// Which source gave which key a value it cannot have.
    pub fn load(
        file: Option<&Path>,
        env: impl Fn(&str) -> Option<String>,
        flags: &[(String, String)],
    ) -> anyhow::Result<Self> {
        let mut table = match file.map(Path::to_path_buf).or_else(found_file) {
            Some(path) => read_file(&path)?,
            None => Table::new(),
        };
        let keys = Self::keys();
        let short = SHORT_NAMES
            .iter()
            .map(|(name, path)| (name.to_string(), path.to_string()));
        let long = keys.iter().map(|key| (key.env.clone(), key.path.clone()));
        for (name, path) in short.chain(long) {
            if let Some(text) = env(&name).filter(|text| !text.is_empty()) {
                set(&mut table, &keys, &path, &text)
                    .with_context(|| format!("environment variable {name}"))?;
            }
        }
        for (path, text) in flags {
            set(&mut table, &keys, path, text).with_context(|| format!("flag for {path}"))?;
        }
        let config: Self = Value::Table(table)
            .try_into()
            .context("the configuration is not valid")?;
        config.check()?;
        Ok(config)
    }

    /// Every key.
    pub fn keys() -> Vec<Key> {
        let mut keys = Vec::new();
        if let Ok(Value::Table(defaults)) = Value::try_from(Self::default()) {
            collect(&defaults, "", &mut keys);
        }
        keys
    }

    fn check(&self) -> anyhow::Result<()> {
        let server = &self.server;
        if server.tls_cert.as_os_str().is_empty() != server.tls_key.as_os_str().is_empty() {
            bail!("TLS needs both server.tls_cert and server.tls_key");
        }
        if server.tls_self_signed && !server.tls_cert.as_os_str().is_empty() {
            bail!("use either server.tls_self_signed or server.tls_cert, not both");
        }
        // hyper's own lower limit for HTTP/1 heads.
        if server.max_header_bytes < 8192 {
            bail!("server.max_header_bytes must be at least 8192");
        }
        let at_least_one = [
            ("server.max_connections", server.max_connections as u64),
            ("server.header_timeout_s", server.header_timeout_s),
            ("server.body_timeout_s", server.body_timeout_s),
            ("server.idle_timeout_s", server.idle_timeout_s),
            ("server.handshake_timeout_s", server.handshake_timeout_s),
            ("auth.token_lifetime_s", self.auth.token_lifetime_s),
            ("auth.logins_per_minute", self.auth.logins_per_minute.into()),
            (
                "default_plan.requests_per_minute",
                self.default_plan.requests_per_minute.into(),
            ),
            ("default_plan.burst", self.default_plan.burst.into()),
            ("task.flush_ms", self.task.flush_ms),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            bail!("{key} must not be zero");
        }
        if !(128..=8192).contains(&self.vm.memory_mib) {
            bail!("vm.memory_mib must be 128 to 8192");
        }
        if !(20..=86_400).contains(&self.vm.lifetime_s) {
            bail!("vm.lifetime_s must be 20 to 86400");
        }
        if !["auto", "pv", "hvm"].contains(&self.vm.machine.as_str()) {
            bail!("vm.machine must be auto, pv or hvm");
        }
        if let Err(what) = self.session.check() {
            bail!(what);
        }
        Ok(())
    }
}

fn found_file() -> Option<PathBuf> {
    ["thaw.toml", "/etc/thaw/thaw.toml"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.is_file())
}

fn read_file(path: &Path) -> anyhow::Result<Table> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?;
    let table: Table = text
        .parse()
        .with_context(|| format!("{} is not TOML", path.display()))?;
    // Tried alone first, so that a wrong key or value is blamed on the file.
    let tried: Result<Config, _> = Value::Table(table.clone()).try_into();
    tried.with_context(|| format!("{} has a wrong key or value", path.display()))?;
    Ok(table)
}

fn collect(table: &Table, prefix: &str, keys: &mut Vec<Key>) {
    for (name, value) in table {
        let path = if prefix.is_empty() {
            name.clone()
        } else {
            format!("{prefix}.{name}")
        };
        match value {
            Value::Table(inner) => collect(inner, &path, keys),
            default => keys.push(Key {
                env: format!("THAW_{}", path.replace('.', "_").to_uppercase()),
                path,
                default: default.clone(),
            }),
        }
    }
}

/// Sets a key from text, which is read as what the key's default is.
fn set(table: &mut Table, keys: &[Key], path: &str, text: &str) -> anyhow::Result<()> {
    let Some(key) = keys.iter().find(|key| key.path == path) else {
        bail!("there is no key {path:?}; `thaw serve --help` lists them");
    };
    let value = match key.default {
        Value::String(_) => Value::String(text.into()),
        _ => {
            let parsed: Table = format!("value = {text}").parse().ok().with_context(|| {
                format!(
                    "{text:?} is not a value for {path}, such as {}",
                    key.default
                )
            })?;
            let value = parsed.get("value").cloned();
            value
                .filter(|v| v.same_type(&key.default))
                .with_context(|| {
                    format!(
                        "{text:?} is not a value for {path}, such as {}",
                        key.default
                    )
                })?
        }
    };
    let mut table = table;
    let mut parts = path.split('.').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            table.insert(part.into(), value);
            break;
        }
        table = table
            .entry(part)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .with_context(|| format!("{part} is not a section"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: &str, env: &[(&str, &str)], flags: &[(&str, &str)]) -> anyhow::Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("thaw.toml");
        std::fs::write(&path, file).unwrap();
        let env: Vec<(String, String)> = owned(env);
        Config::load(
            Some(&path),
            |name| env.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone()),
            &owned(flags),
        )
    }

    fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(a, b)| ((*a).into(), (*b).into()))
            .collect()
    }

    #[test]
    fn nothing_said_is_the_defaults() {
        assert_eq!(load("", &[], &[]).unwrap(), Config::default());
    }

    #[test]
    fn flags_beat_the_environment_which_beats_the_file() {
        let file = "[task]\nmax_open = 1\nkeep_s = 1\nkeep_count = 1\n";
        let env = [("THAW_TASK_KEEP_S", "2"), ("THAW_TASK_KEEP_COUNT", "2")];
        let task = load(file, &env, &[("task.keep_count", "3")]).unwrap().task;
        assert_eq!((task.max_open, task.keep_s, task.keep_count), (1, 2, 3));
    }

    #[test]
    fn nested_and_list_keys_are_read_as_what_they_are() {
        let flags = [
            ("session.pool.low", "2"),
            ("session.sizes_mib", "[512, 4096]"),
        ];
        let session = load("", &[("THAW_LISTEN", "0.0.0.0:1")], &flags)
            .unwrap()
            .session;
        assert_eq!((session.pool.low, session.sizes_mib), (2, vec![512, 4096]));
    }

    #[test]
    fn wrong_values_name_their_source_and_key() {
        let said = |result: anyhow::Result<Config>| format!("{:#}", result.unwrap_err());
        assert!(said(load("[server]\nlitsen = 1", &[], &[])).contains("litsen"));
        assert!(said(load("", &[("THAW_TASK_KEEP_S", "soon")], &[])).contains("THAW_TASK_KEEP_S"));
        assert!(said(load("", &[], &[("no.key", "1")])).contains("no.key"));
        assert!(said(load("", &[("THAW_LISTEN", "here")], &[])).contains("listen"));
        assert!(said(load("", &[], &[("server.tls_cert", "a")])).contains("tls_key"));
        assert!(said(load("", &[], &[("vm.machine", "qemu")])).contains("vm.machine"));
    }

    #[test]
    fn every_key_has_its_own_environment_name() {
        let keys = Config::keys();
        let names: std::collections::BTreeSet<_> = keys.iter().map(|key| &key.env).collect();
        assert_eq!(names.len(), keys.len());
        assert!(
            SHORT_NAMES
                .iter()
                .all(|(_, path)| keys.iter().any(|key| key.path == *path))
        );
    }
}
