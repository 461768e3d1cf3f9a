//! What recording a session costs its commands.

use std::time::Instant;

use anyhow::Context;
use serde_json::json;

use super::samples::Samples;
use super::server::Server;

/// A command of a session by itself, with a checkpoint before it, and with the files noted that it changed.
///
/// # Errors
/// A request failed.
pub fn measure(server: &Server, runs: usize) -> anyhow::Result<[Samples; 3]> {
    let session = server.session()?;
    let time = |name| {
        let mut samples = Samples::new(name);
        server.python(&session, "pass")?;
        for _ in 0..runs {
            let start = Instant::now();
            server.python(&session, "pass")?;
            samples.add(start.elapsed());
        }
        anyhow::Ok(samples)
    };
    let recorded = |files: bool, name| {
        let path = format!("/v1/sessions/{session}/tape/start");
        let tape = server.post(&path, &json!({ "record_fs": files }))?;
        let tape = tape["id"].as_str().context("the answer is no tape")?;
        let samples = time(name)?;
        server.post(&format!("/v1/tapes/{tape}/stop"), &json!({}))?;
        anyhow::Ok(samples)
    };
    let all = [
        time("a command")?,
        recorded(false, "the same, a checkpoint before it")?,
        recorded(true, "the same, its files noted, too")?,
    ];
    server.kill(&session)?;
    Ok(all)
}
