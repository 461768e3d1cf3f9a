//! The worker's log: lines on standard error, nothing more, so that a worker stays small.

use std::io::Write;

/// Writes one line. A log that cannot be written is no reason to end a VM.
pub fn line(text: &str) {
    let line = format!("thaw-vmm[{}]: {text}\n", std::process::id());
    if std::io::stderr().write_all(line.as_bytes()).is_err() {
        // There is nobody left to tell.
    }
}
