//! `thaw doctor`: what this host can do, and what to fix.

mod limits;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use serde_json::json;
use thaw_vmm::machine::probe::SyscallPath;
use thaw_vmm::machine::{MachineKind, Probe, probe};

use super::{DataDir, exit};
use crate::image::host_tools::{self, IMAGE_TOOLS};
use crate::image::{self, build};
use crate::template;

/// Say what this host can do, and what to fix.
#[derive(Debug, Args)]
#[command(after_help = "\
Every line is ok, warn (thaw works, but see the hint) or FAIL (VMs cannot run here until it is fixed).
Ends with code 0 when VMs can run and 5 when they cannot.")]
pub struct DoctorArgs {
    #[command(flatten)]
    data: DataDir,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    level: Level,
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Finding {
    fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self {
            what,
            level: Level::Ok,
            found: found.into(),
            fix: None,
        }
    }

    fn warn(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            what,
            level: Level::Warn,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }

    fn fail(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            level: Level::Fail,
            ..Self::warn(what, found, fix)
        }
    }
}

/// Runs the command.
///
/// # Errors
/// The host's own figures cannot be read.
pub fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let data_dir = args.data.path();
    let mut findings = vec![kvm_device(Path::new("/dev/kvm"))];
    let probe = (findings[0].level != Level::Fail).then(probe);
    if let Some(probe) = &probe {
        findings.extend(machine(probe));
    }
    findings.push(processor()?);
    findings.push(limits::memory()?);
    findings.push(limits::open_files()?);
    findings.push(limits::processes()?);
    findings.push(data_directory(&data_dir));
    findings.push(tools());
    findings.push(agent());
    findings.push(images(&data_dir));
    findings.push(templates(&data_dir));
    let usable = findings.iter().all(|finding| finding.level != Level::Fail);
    if args.json {
        println!(
            "{}",
            json!({"usable": usable, "findings": findings, "probe": probe})
        );
    } else {
        print(&findings, usable);
    }
    Ok(if usable {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(exit::IMAGE)
    })
}

fn print(findings: &[Finding], usable: bool) {
    for finding in findings {
        let level = match finding.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        let mut lines = finding.found.lines();
        println!(
            "{level}  {:<16} {}",
            finding.what,
            lines.next().unwrap_or_default()
        );
        for line in lines {
            println!("{:22} {line}", "");
        }
        if let Some(fix) = &finding.fix {
            println!("{:22} -> {fix}", "");
        }
    }
    println!();
    println!(
        "{}",
        if usable {
            "This host can run VMs."
        } else {
            "This host cannot run VMs until what FAILs is fixed."
        }
    );
}

fn kvm_device(path: &Path) -> Finding {
    const WHAT: &str = "/dev/kvm";
    match std::fs::File::options().read(true).write(true).open(path) {
        Ok(_) => Finding::ok(WHAT, format!("can be opened{}", kvm_modules())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Finding::fail(
            WHAT,
            "does not exist: this kernel offers no KVM",
            "load a KVM module (modprobe kvm_intel or kvm_amd); in a cloud VM choose a type with nested \
             virtualization; in a container pass the device in (--device /dev/kvm)",
        ),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Finding::fail(
            WHAT,
            "exists, but you may not open it",
            "run `sudo usermod -aG kvm $USER` and log in again, or run thaw as root",
        ),
        Err(error) => Finding::fail(
            WHAT,
            format!("cannot be opened: {error}"),
            "see the kernel's log (dmesg)",
        ),
    }
}

/// Names of the loaded KVM modules, for the reader; nothing is decided by them.
fn kvm_modules() -> String {
    let modules = std::fs::read_to_string("/proc/modules").unwrap_or_default();
    let names: Vec<&str> = modules
        .lines()
        .filter_map(|line| line.split(' ').next())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    if names.is_empty() {
        String::new()
    } else {
        format!(" (modules: {})", names.join(", "))
    }
}

fn machine(probe: &Probe) -> Vec<Finding> {
    let facts = probe.facts.join("\n");
    let Some(kind) = probe.kind else {
        return vec![Finding::fail(
            "machine",
            format!("none can run here\n{facts}"),
            "use a host whose /dev/kvm is backed by VMX or SVM, or by a KVM that runs guests at ring 3",
        )];
    };
    let mut found = format!(
        "{} (CPL0 code takes {:.1} ns an instruction)",
        kind.name(),
        probe.cpl0_ns
    );
    if !facts.is_empty() {
        found = format!("{found}\n{facts}");
    }
    let mut findings = vec![Finding::ok("machine", found)];
    if kind == MachineKind::Pv {
        let path = match probe.syscall {
            SyscallPath::Native => "native: SYSCALL stays at CPL3",
            SyscallPath::Bounce => "through the CPL0 stub: SYSCALL enters CPL0",
        };
        findings.push(Finding::ok("system calls", path));
    }
    findings
}

fn processor() -> anyhow::Result<Finding> {
    let cpu = template::cpu::Cpu::host()?;
    let count = std::thread::available_parallelism().context("cannot count processors")?;
    Ok(Finding::ok(
        "processors",
        format!("{count} x {}", cpu.model),
    ))
}

fn data_directory(dir: &Path) -> Finding {
    const WHAT: &str = "data directory";
    // The nearest parent that exists is where it would be made.
    let existing = dir
        .ancestors()
        .find(|parent| parent.exists())
        .unwrap_or(Path::new("/"));
    let free = nix::sys::statvfs::statvfs(existing)
        .map(|fs| fs.blocks_available().saturating_mul(fs.fragment_size()) >> 20)
        .unwrap_or(0);
    let writable = nix::unistd::access(existing, nix::unistd::AccessFlags::W_OK).is_ok();
    let found = format!("{} ({free} MiB free)", dir.display());
    if !writable {
        Finding::warn(
            WHAT,
            format!("{found}, not writable by you"),
            "give another --data-dir, or run thaw as root",
        )
    } else if free < 2048 {
        Finding::warn(
            WHAT,
            found,
            "images and templates need some GiB: free some, or give another --data-dir",
        )
    } else {
        Finding::ok(WHAT, found)
    }
}

fn tools() -> Finding {
    let missing = host_tools::missing(IMAGE_TOOLS);
    if missing.is_empty() {
        return Finding::ok("image tools", "all there");
    }
    let packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    Finding::warn(
        "image tools",
        format!("missing: {}", packages.join(", ")),
        format!(
            "`thaw image build` installs them when run as root; or: apt-get install {}",
            packages.join(" ")
        ),
    )
}

fn agent() -> Finding {
    match build::find_agent(None) {
        Ok(path) => Finding::ok("guest agent", path.display().to_string()),
        Err(error) => Finding::warn(
            "guest agent",
            "not found: images cannot be built",
            format!("{error:#}"),
        ),
    }
}

fn images(data_dir: &Path) -> Finding {
    const WHAT: &str = "images";
    match image::list(data_dir) {
        Ok(images) if images.is_empty() => Finding::warn(WHAT, "none", "sudo thaw image build"),
        Ok(images) => {
            let broken: Vec<String> = images
                .iter()
                .filter_map(|listed| {
                    Some(format!(
                        "{}: {:#}",
                        listed.name,
                        listed.image.as_ref().err()?
                    ))
                })
                .collect();
            let names: Vec<&str> = images.iter().map(|listed| listed.name.as_str()).collect();
            if broken.is_empty() {
                Finding::ok(WHAT, names.join(", "))
            } else {
                Finding::warn(
                    WHAT,
                    broken.join("\n"),
                    "sudo thaw image build --force NAME",
                )
            }
        }
        Err(error) => Finding::warn(WHAT, format!("{error:#}"), "look at the data directory"),
    }
}

fn templates(data_dir: &Path) -> Finding {
    const WHAT: &str = "templates";
    match template::list(data_dir) {
        Ok(templates) if templates.is_empty() => {
            Finding::ok(WHAT, "none yet; `thaw serve` builds what it needs")
        }
        Ok(templates) => {
            let unusable: Vec<String> = templates
                .iter()
                .filter_map(|listed| {
                    let why = match &listed.manifest {
                        Ok(manifest) => manifest.check_host().err()?,
                        Err(error) => anyhow::anyhow!("{error:#}"),
                    };
                    Some(format!("{}: {why:#}", listed.name))
                })
                .collect();
            if unusable.is_empty() {
                let names: Vec<&str> = templates
                    .iter()
                    .map(|listed| listed.name.as_str())
                    .collect();
                Finding::ok(WHAT, names.join("\n"))
            } else {
                Finding::warn(
                    WHAT,
                    unusable.join("\n"),
                    "they are built again when needed; `thaw template remove NAME` frees their space",
                )
            }
        }
        Err(error) => Finding::warn(WHAT, format!("{error:#}"), "look at the data directory"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_what_to_do() {
        let finding = kvm_device(Path::new("/nonexistent/kvm"));
        assert_eq!(finding.level, Level::Fail);
        assert!(finding.fix.unwrap().contains("nested"));
    }

    #[test]
    fn no_machine_is_a_failure_and_one_is_not() {
        let mut probe = Probe {
            kind: None,
            syscall: SyscallPath::Native,
            cpl0_ns: 700.0,
            tsc_khz: 1,
            facts: vec!["a fact".into()],
        };
        let findings = machine(&probe);
        assert!(findings[0].level == Level::Fail && findings[0].found.contains("a fact"));
        probe.kind = Some(MachineKind::Pv);
        assert!(
            machine(&probe)
                .iter()
                .all(|finding| finding.level == Level::Ok)
        );
    }

    #[test]
    fn missing_things_are_named() {
        let data = tempfile::tempdir().unwrap();
        assert_eq!(images(data.path()).level, Level::Warn);
        assert_eq!(templates(data.path()).level, Level::Ok);
        assert!(
            data_directory(&data.path().join("not/yet"))
                .found
                .contains("not/yet")
        );
        processor().unwrap();
    }
}
