//! A server of the benchmark's own, and a client for it.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use ureq::Body;
use ureq::http::Response;

/// How long a server may take until it serves: a template may have to be built first.
const START: Duration = Duration::from_secs(180);

/// `thaw serve` on a free loopback port, with a database of its own over the given images and
/// templates. Ends with this value.
#[derive(Debug)]
pub struct Server {
    child: Child,
    key: String,
    url: String,
    agent: ureq::Agent,
    _dir: tempfile::TempDir,
}

impl Server {
    /// Starts one and waits until it serves.
    ///
    /// # Errors
    /// It does not come up; the end of its log says why.
    pub fn start(data_dir: &Path, image: &str) -> anyhow::Result<Self> {
        Self::start_with(data_dir, image, &[])
    }

    /// The same with settings of its own, as variables of its environment.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(
        data_dir: &Path,
        image: &str,
        settings: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        for name in ["images", "templates"] {
            let shared = data_dir.join(name);
            std::fs::create_dir_all(&shared)
                .with_context(|| format!("cannot make {}", shared.display()))?;
            std::os::unix::fs::symlink(shared.canonicalize()?, dir.path().join(name))?;
        }
        let log = dir.path().join("log");
        let key = format!(
            "instavm_sk_{}{}",
            uuid::Uuid::new_v4().simple(),
            uuid::Uuid::new_v4().simple()
        );
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut child = Command::new(std::env::current_exe()?)
            .args([
                "serve",
                "--listen",
                &format!("127.0.0.1:{port}"),
                "--image",
                image,
                "--data-dir",
            ])
            .arg(dir.path())
            .env("THAW_BOOTSTRAP_KEY", &key)
            // A benchmark asks faster than any plan would allow.
            .env("THAW_DEFAULT_PLAN_REQUESTS_PER_MINUTE", "10000000")
            .env("THAW_DEFAULT_PLAN_BURST", "1000000")
            .env("THAW_DEFAULT_PLAN_MAX_VMS", "1000")
            .envs(settings.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log)?)
            .spawn()
            .context("cannot start `thaw serve`")?;
        let stdout = child
            .stdout
            .take()
            .context("the server's output is not piped")?;
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            if BufReader::new(stdout)
                .read_line(&mut line)
                .is_ok_and(|read| read > 0)
                && ready.send(()).is_err()
            {
                // Nobody waits any more: the start timed out.
            }
        });
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(60)))
            .proxy(None)
            .build()
            .new_agent();
        let server = Self {
            child,
            key,
            url: format!("http://127.0.0.1:{port}"),
            agent,
            _dir: dir,
        };
        if is_ready.recv_timeout(START).is_err() {
            let log = std::fs::read_to_string(&log).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(8).collect();
            bail!(
                "`thaw serve` did not come up; the end of its log:\n{}",
                tail.into_iter().rev().collect::<Vec<_>>().join("\n")
            );
        }
        Ok(server)
    }

    /// The server's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a JSON body, returns the JSON answer.
    ///
    /// # Errors
    /// Any status but 200.
    pub fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let mut reply = self.post_raw(path, body)?;
        Ok(reply.body_mut().read_json()?)
    }

    /// Sends a JSON body, returns the answer as it comes.
    ///
    /// # Errors
    /// Any status but 200.
    pub fn post_raw(&self, path: &str, body: &Value) -> anyhow::Result<Response<Body>> {
        self.agent
            .post(format!("{}{path}", self.url))
            .header("X-API-Key", &self.key)
            .send_json(body)
            .with_context(|| format!("POST {path}"))
    }

    /// Sends bytes.
    ///
    /// # Errors
    /// Any status but 200.
    pub fn put(&self, path: &str, bytes: &[u8]) -> anyhow::Result<()> {
        self.agent
            .put(format!("{}{path}", self.url))
            .header("X-API-Key", &self.key)
            .send(bytes)
            .with_context(|| format!("PUT {path}"))
            .map(drop)
    }

    /// Asks for something, returns the answer as it comes.
    ///
    /// # Errors
    /// Any status but 200.
    pub fn get(&self, path: &str) -> anyhow::Result<Response<Body>> {
        self.agent
            .get(format!("{}{path}", self.url))
            .header("X-API-Key", &self.key)
            .call()
            .with_context(|| format!("GET {path}"))
    }

    /// Makes a session.
    ///
    /// # Errors
    /// The server refuses.
    pub fn session(&self) -> anyhow::Result<String> {
        self.session_with(1)
    }

    /// Makes a session whose VM has so many vCPUs.
    ///
    /// # Errors
    /// The server refuses.
    pub fn session_with(&self, vcpus: u32) -> anyhow::Result<String> {
        let body = json!({"api_key": self.key, "vm_lifetime_seconds": 3600, "vcpu_count": vcpus});
        let reply = self.post("/v1/sessions/session", &body)?;
        Ok(reply["session_id"]
            .as_str()
            .context("no session_id in the answer")?
            .to_owned())
    }

    /// Runs Python in a session and returns what it printed.
    ///
    /// # Errors
    /// The command failed, or was refused.
    pub fn python(&self, session: &str, code: &str) -> anyhow::Result<String> {
        let reply = self.post("/execute", &json!({"command": code, "session_id": session}))?;
        if reply["exit_code"] != 0 {
            bail!("the command failed in the guest: {}", reply["stderr"]);
        }
        Ok(reply["stdout"]
            .as_str()
            .context("no stdout in the answer")?
            .to_owned())
    }

    /// Ends a session's VM.
    ///
    /// # Errors
    /// The server refuses.
    pub fn kill(&self, session: &str) -> anyhow::Result<()> {
        self.post("/kill", &json!({"session_id": session}))
            .map(drop)
    }

    /// One value of `/metrics`, by its whole name.
    ///
    /// # Errors
    /// There is none.
    pub fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let mut reply = self.get("/metrics")?;
        let text = reply.body_mut().read_to_string()?;
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.rsplit_once(' '))
            .find(|(found, _)| *found == name)
            .and_then(|(_, value)| value.parse().ok())
            .with_context(|| format!("/metrics has no {name}"))
    }

    /// Waits until at least `vms` restored VMs wait in the pool.
    ///
    /// # Errors
    /// They do not within 30 s.
    pub fn wait_for_pool(&self, vms: f64) -> anyhow::Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        while self.metric("thaw_session_pool_parked")? < vms {
            if Instant::now() > end {
                bail!("the pool did not fill within 30 s");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Process ids of the server's workers.
    ///
    /// # Errors
    /// `/proc` does not say.
    pub fn workers(&self) -> anyhow::Result<Vec<u32>> {
        let mut pids = Vec::new();
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let children = std::fs::read_to_string(task?.path().join("children"))?;
            pids.extend(
                children
                    .split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
        Ok(pids)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The server drains on SIGTERM; a benchmark has nothing worth draining.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            tracing::warn!(%error, "the benchmark's server could not be ended");
        }
    }
}
