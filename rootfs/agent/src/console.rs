//! Lines for the worker's log.

use std::io::Write;

/// Writes one line to the console. There is nobody to tell when that fails.
pub fn say(line: &str) {
    let mut stderr = std::io::stderr().lock();
    if writeln!(stderr, "thaw-agent: {line}").is_err() {
        // The console is gone; the host still sees the agent's frames.
    }
}
