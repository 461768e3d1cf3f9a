//! `thaw vmm`: one worker. Started by `thaw serve` with a socket as descriptor 3; not for people.

use std::process::ExitCode;

/// Runs the worker to its end.
pub fn run() -> ExitCode {
    thaw_vmm::worker::main()
}
