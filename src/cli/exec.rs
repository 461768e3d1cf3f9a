//! `thaw exec`: a command on a running server, from the shell.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use super::exit;

/// How much longer than the command the request may take: a VM may have to be started first.
const PATIENCE: Duration = Duration::from_secs(15);

/// Most bytes of an answer: two outputs at their largest, written as JSON.
const MOST_ANSWER: u64 = 256 << 20;

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
    /// The server.
    #[arg(long, env = "THAW_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// The API key.
    #[arg(long, env = "THAW_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: String,
    /// PEM file with a certificate to trust, such as a self-signed server's tls/cert.pem.
    #[arg(long, env = "THAW_CA_CERT", value_name = "FILE")]
    ca_cert: Option<PathBuf>,
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
    let answer = post(args, &body)?;
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

fn post(args: &ExecArgs, body: &Value) -> anyhow::Result<Value> {
    let url = format!("{}/execute", args.url.trim_end_matches('/'));
    let patience = Duration::from_secs(args.timeout.into()) + PATIENCE;
    let mut config = ureq::Agent::config_builder()
        .timeout_global(Some(patience))
        .http_status_as_error(false);
    if is_loopback(&args.url) {
        // A proxy of the environment cannot reach this machine's loopback.
        config = config.proxy(None);
    }
    if let Some(path) = &args.ca_cert {
        let roots = RootCerts::new_with_certs(&certificates(path)?);
        config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
    }
    let agent: ureq::Agent = config.build().into();
    let sent = agent
        .post(&url)
        .header("X-API-Key", &args.api_key)
        .send_json(body);
    let mut reply = sent.map_err(|error| match error {
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) => anyhow!(
            "cannot trust {}: {error}; give its certificate with --ca-cert",
            args.url
        ),
        ureq::Error::Io(ref io) if io.to_string().contains("certificate") => anyhow!(
            "cannot trust {}: {io}; give its certificate with --ca-cert",
            args.url
        ),
        ureq::Error::Timeout(_) => anyhow!("no answer from {} within {patience:?}", args.url),
        error => anyhow!(
            "cannot reach {}: {error}; is `thaw serve` running?",
            args.url
        ),
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
        (code, value) => {
            let detail = value.as_ref().and_then(|value| value.get("detail"));
            bail!("the server answers {code}: {}", detail.map_or(text, plain))
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
