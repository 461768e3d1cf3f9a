//! The agent: `/init` of every guest, or a rehearsal of it on a host.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use thaw_agent::boot;
use thaw_agent::console::say;
use thaw_agent::doorbell::Bells;
use thaw_agent::engine::{Engine, Ground};
use thaw_agent::identity;
use thaw_agent::interpreter::Place;
use thaw_agent::limits::{Limits, memory_available};
use thaw_agent::rehearsal;
use thaw_agent::wire::Wire;
use thaw_agent::{files, process};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [name, work] = arguments.as_slice()
        && name == process::FILES
    {
        return files::main(work);
    }
    if let [name, order, file] = arguments.as_slice()
        && (name.as_str(), order.as_str()) == (process::FILES, process::CLEAN)
    {
        return files::clean(file);
    }
    let ended = match arguments
        .iter()
        .position(|argument| argument == "--rehearse")
    {
        Some(at) => rehearse(&arguments[at + 1..]),
        None if std::process::id() == 1
            && arguments.iter().any(|argument| argument == "--idle") =>
        {
            idle()
        }
        None if std::process::id() == 1 => serve(),
        None => {
            say(
                "this is the init of a thaw guest; for a rehearsal: --rehearse RUNNER SCRATCH HOME (socket on fd 0)",
            );
            return ExitCode::FAILURE;
        }
    };
    match ended {
        Ok(never) => match never {},
        // PID 1 that ends takes the kernel with it: the host sees a panic and these last words.
        Err(error) => {
            say(&format!("fatal: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// In a guest.
fn serve() -> Result<Infallible, Box<dyn Error>> {
    boot::bring_up()?;
    let limits = match Limits::set_up(Path::new(boot::CGROUPS), memory_available()) {
        Ok(limits) => Some(limits),
        Err(error) => {
            say(&format!("no control groups: {error}"));
            None
        }
    };
    let place = Place {
        runner: "/opt/thaw/runner".into(),
        scratch: "/run/thaw".into(),
        home: "/root".into(),
        cgroup: limits.as_ref().map(Limits::entrance),
        holds_doorbell: true,
        env: base_environment(),
    };
    let wire = Wire::lay(Bells::open()?)?;
    let ground = Ground {
        place,
        limits,
        renew: identity::renew,
        kernel: kernel_release(),
    };
    Ok(Engine::new(wire, ground)?.run()?)
}

/// In a guest of another VMM, which has none of thaw's devices: comes up as far as without them, and does nothing. It
/// is what thaw is measured against.
fn idle() -> Result<Infallible, Box<dyn Error>> {
    boot::bring_up()?;
    say(thaw_wire::layout::IDLE);
    loop {
        std::thread::park();
    }
}

/// On a host, over a socket on standard input.
fn rehearse(arguments: &[String]) -> Result<Infallible, Box<dyn Error>> {
    let [runner, scratch, home] = arguments else {
        return Err("--rehearse RUNNER SCRATCH HOME".into());
    };
    let mut env = base_environment();
    env.insert("PATH".into(), std::env::var("PATH")?);
    let place = Place {
        runner: PathBuf::from(runner),
        scratch: PathBuf::from(scratch),
        home: PathBuf::from(home),
        cgroup: None,
        holds_doorbell: false,
        env,
    };
    let ground = Ground {
        place,
        limits: None,
        renew: rehearsal::renew,
        kernel: kernel_release(),
    };
    Ok(Engine::new(rehearsal::Rehearsal::over_stdin()?, ground)?.run()?)
}

/// What every command finds in its environment, whatever the session adds.
fn base_environment() -> BTreeMap<String, String> {
    [
        ("PATH", thaw_agent::PATH),
        ("HOME", "/root"),
        ("USER", "root"),
        ("LOGNAME", "root"),
        ("SHELL", "/bin/bash"),
        ("LANG", "C.UTF-8"),
        ("TERM", "dumb"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

fn kernel_release() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}
