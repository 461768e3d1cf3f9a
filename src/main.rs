//! The `thaw` command.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use thaw::cli::{Cli, exit, vmm};

fn main() -> ExitCode {
    // A worker's start is on the way of a restore: no arguments to parse, no runtime to build.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|command| command == "vmm")
    {
        return vmm::run();
    }
    match Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("thaw: {}", exit::message(&error));
            exit::code(&error)
        }
    }
}
