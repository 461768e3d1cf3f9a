//! Benchmarks of what moves while a command runs: its output, and files.

use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::samples::Samples;
use super::server::Server;

/// Bytes of the file that is moved.
const FILE_BYTES: usize = 100 << 20;

/// From a line's `print` in the guest to its event at the client. The guest's clock is the host's, set
/// when the session got its VM, so their difference is in the figure.
///
/// # Errors
/// A request failed, or the stream says something else.
pub fn output(server: &Server, lines: usize) -> anyhow::Result<Samples> {
    let session = server.session()?;
    server.python(&session, "import time")?;
    let code = format!("for _ in range({lines}):\n    print(time.time())\n    time.sleep(0.02)");
    let body = json!({ "command": code, "session_id": session, "timeout": 600 });
    let mut reply = server.post_raw("/v1/executions/stream", &body)?;
    let mut samples = Samples::new("print in the guest to its event at the client");
    for line in BufReader::new(reply.body_mut().as_reader()).lines() {
        let line = line?;
        let arrived = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let Some(data) = line.strip_prefix("data: ") else {
            continue;
        };
        let data: Value = serde_json::from_str(data)?;
        let Some(text) = data["text"].as_str() else {
            continue;
        };
        for printed in text.lines() {
            let printed: f64 = printed.parse().context("the guest printed no time")?;
            samples.add(arrived.saturating_sub(Duration::from_secs_f64(printed)));
        }
    }
    server.kill(&session)?;
    Ok(samples)
}

/// A file of 100 MiB into a session's VM and out again, in turn.
///
/// # Errors
/// A request failed, or the file came back changed.
pub fn files(server: &Server, rounds: usize) -> anyhow::Result<(Samples, Samples)> {
    let session = server.session()?;
    server.python(&session, "1")?;
    let path = format!("/v1/sessions/{session}/files?path=/tmp/bench");
    // Not compressible, and different in every page.
    let data: Vec<u8> = (0..FILE_BYTES as u64 / 8)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect();
    let mut up = Samples::new("100 MiB into a VM");
    let mut down = Samples::new("100 MiB out of a VM");
    let mut back = Vec::with_capacity(FILE_BYTES);
    for round in 0..=rounds {
        let start = Instant::now();
        server.put(&path, &data)?;
        let put = start.elapsed();
        back.clear();
        let start = Instant::now();
        server
            .get(&path)?
            .body_mut()
            .as_reader()
            .read_to_end(&mut back)?;
        let got = start.elapsed();
        if back != data {
            bail!("the file came back changed");
        }
        // The first round makes room.
        if round > 0 {
            up.add(put);
            down.add(got);
        }
    }
    server.kill(&session)?;
    Ok((up, down))
}

/// Megabytes a second at the median.
///
/// # Errors
/// Nothing was measured.
pub fn rate(samples: &Samples) -> anyhow::Result<f64> {
    Ok(FILE_BYTES as f64 / samples.percentile(50)? as f64)
}
