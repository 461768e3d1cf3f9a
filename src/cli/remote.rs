//! A running server, asked over HTTP.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use serde_json::Value;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

/// How long a request may take besides what it runs: a VM may have to be started, or frozen, first.
const PATIENCE: Duration = Duration::from_secs(15);

/// Most bytes of an answer: two outputs at their largest, written as JSON.
const MOST_ANSWER: u64 = 256 << 20;

/// Which server, and as whom.
#[derive(Clone, Debug, Args)]
pub struct Remote {
    /// The server.
    #[arg(long, env = "THAW_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// The API key.
    #[arg(long, env = "THAW_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// PEM file with a certificate to trust, such as a self-signed server's tls/cert.pem.
    #[arg(long, env = "THAW_CA_CERT", value_name = "FILE")]
    ca_cert: Option<PathBuf>,
}

/// The server answered, but not with what was asked for.
#[derive(Debug, thiserror::Error)]
#[error("the server answers {status}: {detail}")]
pub struct Refused {
    /// The HTTP status.
    pub status: u16,
    detail: String,
}

impl Remote {
    /// Asks for something.
    ///
    /// # Errors
    /// The server cannot be reached or refuses: [`Refused`].
    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.get_slow(path, Duration::ZERO)
    }

    /// Asks for something that takes at most `runs` to find out.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn get_slow(&self, path: &str, runs: Duration) -> anyhow::Result<Value> {
        let patience = PATIENCE + runs;
        let request = self.agent(patience)?.get(self.url(path));
        self.answer(request.header("X-API-Key", self.key()?).call(), patience)
    }

    /// Has something done that takes at most `runs` besides what any request takes.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn post(&self, path: &str, body: &Value, runs: Duration) -> anyhow::Result<Value> {
        let patience = PATIENCE + runs;
        let request = self.agent(patience)?.post(self.url(path));
        let request = request.header("X-API-Key", self.key()?);
        self.answer(request.send_json(body), patience)
    }

    /// Removes something.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn delete(&self, path: &str) -> anyhow::Result<Value> {
        let request = self.agent(PATIENCE)?.delete(self.url(path));
        self.answer(request.header("X-API-Key", self.key()?).call(), PATIENCE)
    }

    fn key(&self) -> anyhow::Result<&str> {
        let key = self.api_key.as_deref();
        key.context("a server wants an API key; give it with --api-key or THAW_API_KEY")
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.url.trim_end_matches('/'))
    }

    fn agent(&self, patience: Duration) -> anyhow::Result<ureq::Agent> {
        let mut config = ureq::Agent::config_builder()
            .timeout_global(Some(patience))
            .http_status_as_error(false);
        if is_loopback(&self.url) {
            // A proxy of the environment cannot reach this machine's loopback.
            config = config.proxy(None);
        }
        if let Some(path) = &self.ca_cert {
            let roots = RootCerts::new_with_certs(&certificates(path)?);
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Ok(config.build().into())
    }

    fn answer(
        &self,
        sent: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
        patience: Duration,
    ) -> anyhow::Result<Value> {
        let url = &self.url;
        let mut reply = sent.map_err(|error| match error {
            ureq::Error::Tls(_) | ureq::Error::Rustls(_) => {
                anyhow!("cannot trust {url}: {error}; give its certificate with --ca-cert")
            }
            ureq::Error::Io(ref io) if io.to_string().contains("certificate") => {
                anyhow!("cannot trust {url}: {io}; give its certificate with --ca-cert")
            }
            ureq::Error::Timeout(_) => anyhow!("no answer from {url} within {patience:?}"),
            error => anyhow!("cannot reach {url}: {error}; is `thaw serve` running?"),
        })?;
        let status = reply.status();
        let text = reply
            .body_mut()
            .with_config()
            .limit(MOST_ANSWER)
            .read_to_string()
            .context("the server's answer broke off")?;
        let value: Option<Value> = serde_json::from_str(&text).ok();
        match (status.as_u16(), value) {
            (200, Some(value)) => Ok(value),
            (401, _) => {
                bail!("the server refuses this API key; give it with --api-key or THAW_API_KEY")
            }
            (status, value) => {
                let detail = value.as_ref().and_then(|value| value.get("detail"));
                let detail = detail.map_or(text, plain);
                Err(Refused { status, detail }.into())
            }
        }
    }
}

fn certificates(path: &Path) -> anyhow::Result<Vec<Certificate<'static>>> {
    let pem = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut certificates = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item? {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() {
        bail!("{} has no certificate", path.display());
    }
    Ok(certificates)
}

/// A detail as one line: a text, or a list of faults.
fn plain(detail: &Value) -> String {
    match detail {
        Value::String(text) => text.clone(),
        Value::Array(faults) => {
            let lines = faults.iter().map(|fault| {
                let name = fault["loc"].as_array().and_then(|loc| loc.last());
                let name = name.map(|name| name.as_str().map_or(name.to_string(), str::to_owned));
                let msg = fault["msg"].as_str().unwrap_or_default();
                format!("{}: {msg}", name.unwrap_or_default())
            });
            lines.collect::<Vec<_>>().join("; ")
        }
        other => other.to_string(),
    }
}

fn is_loopback(url: &str) -> bool {
    let host = url.split("://").nth(1).unwrap_or(url);
    ["localhost", "127.", "[::1]"]
        .iter()
        .any(|name| host.starts_with(name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn faults_read_as_one_line() {
        let detail = json!([
            { "loc": ["body", "timeout"], "msg": "too long" },
            { "loc": ["body", "vault_ids", 0], "msg": "bad" },
        ]);
        assert_eq!(plain(&detail), "timeout: too long; 0: bad");
        assert_eq!(plain(&json!("Not Found")), "Not Found");
        assert!(is_loopback("http://127.0.0.1:8080") && !is_loopback("https://thaw.example"));
    }
}
