//! `selftest`: checks from inside a guest that its processor and kernel behave as real ones do.
//!
//! It is a plain static program and passes on any x86-64 Linux; where the guest differs from
//! the bare host, the machine that runs the guest is wrong. See `selftest help`.

mod check;
mod clocks;
mod debugger;
mod faults;
mod fpu;
mod hostile;
mod memory;
mod micro;
mod processes;
mod processors;
mod signals;
mod stress;
mod threads;

use std::process::ExitCode;

use check::Check;

const HELP: &str = "\
selftest                      run every check; exit status 1 if one fails
selftest NAME...              run these checks (a name's beginning will do)
selftest stress [--seconds N]  everything at once, verified
selftest micro [--json]       what a few basic operations cost here
selftest list                 the checks' names";

/// Every check, room by room.
fn all() -> Vec<&'static Check> {
    let rooms = [
        faults::CHECKS,
        signals::CHECKS,
        debugger::CHECKS,
        threads::CHECKS,
        clocks::CHECKS,
        fpu::CHECKS,
        memory::CHECKS,
        processes::CHECKS,
        processors::CHECKS,
    ];
    rooms.into_iter().flatten().collect()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["help" | "--help" | "-h", ..] => {
            println!("{HELP}\n{}", hostile::HELP);
            ExitCode::SUCCESS
        }
        ["hostile", mode @ ..] => hostile::main(mode),
        ["micro", rest @ ..] => micro::main(rest.contains(&"--json")),
        // What `fork+exec` runs: the shortest life of this program.
        ["nothing"] => ExitCode::SUCCESS,
        ["echo", word] => {
            println!("{word}");
            ExitCode::SUCCESS
        }
        ["stress", rest @ ..] => stress::main(match rest {
            ["--seconds", number] => number.parse().unwrap_or(60),
            _ => 60,
        }),
        ["list"] => {
            for check in all() {
                println!("{}", check.name);
            }
            ExitCode::SUCCESS
        }
        names => run_checks(names),
    }
}

/// Runs the named checks, or all, one after the other.
fn run_checks(names: &[&str]) -> ExitCode {
    let chosen: Vec<_> = all()
        .into_iter()
        .filter(|check| names.is_empty() || names.iter().any(|name| check.name.starts_with(name)))
        .collect();
    if chosen.is_empty() {
        eprintln!("No check has such a name. `selftest list` prints the names.\n{HELP}");
        return ExitCode::from(2);
    }
    let mut failed = 0;
    for check in &chosen {
        match check::run(check) {
            Ok(()) => println!("ok {}", check.name),
            Err(why) => {
                failed += 1;
                println!("FAIL {}: {why}", check.name);
            }
        }
    }
    println!("{} passed, {failed} failed", chosen.len() - failed);
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
