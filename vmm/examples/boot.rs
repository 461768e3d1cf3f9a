//! Boots a kernel and an initramfs and prints the guest's console: for work on the machine itself.
//!
//! `boot KERNEL INITRAMFS [--machine pv|hvm] [--vcpus N] [--memory MIB] [--bounce] [--append TEXT] [--snapshot DIR] [--restore DIR] [--seconds N] [--stats]`
//!
//! A doorbell with word 0x5a saves to the directory of `--snapshot` and ends. Doorbell word 0x77 rings back.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use thaw_vmm::kvm::kick::KickTimer;
use thaw_vmm::machine::{self, BootConfig, Exit, Machine, MachineKind, probe};
use thaw_vmm::memory::MemoryError;
use thaw_vmm::protocol::Tuning;

#[derive(Default)]
struct Options {
    files: Vec<String>,
    machine: Option<MachineKind>,
    vcpus: u32,
    memory_mib: u32,
    bounce: bool,
    append: String,
    snapshot: Option<String>,
    restore: Option<String>,
    seconds: u64,
    stats: bool,
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        memory_mib: 512,
        vcpus: 1,
        seconds: 600,
        ..Options::default()
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().context("a value is missing");
        match argument.as_str() {
            "--machine" => {
                options.machine = Some(match value()?.as_str() {
                    "pv" => MachineKind::Pv,
                    "hvm" => MachineKind::Hvm,
                    other => bail!("no machine {other}"),
                });
            }
            "--vcpus" => options.vcpus = value()?.parse()?,
            "--memory" => options.memory_mib = value()?.parse()?,
            "--append" => options.append = value()?,
            "--snapshot" => options.snapshot = Some(value()?),
            "--restore" => options.restore = Some(value()?),
            "--seconds" => options.seconds = value()?.parse()?,
            "--bounce" => options.bounce = true,
            "--stats" => options.stats = true,
            _ => options.files.push(argument),
        }
    }
    Ok(options)
}

fn main() -> anyhow::Result<()> {
    let start = Instant::now();
    let options = options()?;
    let tuning = Tuning {
        force_bounce: options.bounce,
    };
    let probe = probe();
    let kind = options.machine.or(probe.kind).context("no machine")?;
    let mut machine = if let Some(directory) = &options.restore {
        let state = std::fs::read(format!("{directory}/state"))?;
        machine::restore(
            kind,
            &state,
            &thaw_vmm::snapshot::FrozenMemory::whole(File::open(format!("{directory}/memory"))?),
            Tuning::default(),
        )?
    } else {
        eprintln!("{}", probe.facts.join("\n"));
        eprintln!("probed after {:?}", start.elapsed());
        let [kernel, initramfs] = &options.files[..] else {
            bail!("boot KERNEL INITRAMFS")
        };
        let cmdline = format!("{} {}", kind.cmdline(), options.append);
        let (kernel, initramfs) = (&File::open(kernel)?, &File::open(initramfs)?);
        let config = BootConfig {
            memory_mib: options.memory_mib,
            vcpus: options.vcpus,
            cmdline: &cmdline,
            kernel,
            initramfs,
            tuning,
            probe: &probe,
        };
        machine::boot(kind, &config)?
    };
    eprintln!("first run after {:?}", start.elapsed());
    let result = drive(&mut *machine, &options, start);
    if options.stats {
        for (name, count) in machine.exits() {
            eprintln!("{name:20} {count}");
        }
        eprintln!("private pages {}", machine.memory().private_pages()?.len());
    }
    result
}

fn drive(machine: &mut dyn Machine, options: &Options, start: Instant) -> anyhow::Result<()> {
    let end = start + Duration::from_secs(options.seconds);
    // A guest that is idle inside KVM comes back for a signal alone.
    let alarm = KickTimer::new()?;
    alarm.arm(options.seconds.saturating_mul(1_000_000_000));
    let mut out = std::io::stdout();
    loop {
        let exit = machine.run()?;
        out.write_all(&machine.take_console())?;
        out.flush()?;
        if Instant::now() > end {
            bail!("out of time");
        }
        match exit {
            Exit::Doorbell(0x5a) => {
                let Some(directory) = &options.snapshot else {
                    continue;
                };
                save(machine, directory)?;
                return Ok(());
            }
            Exit::Doorbell(0x77) => machine.raise_wire(),
            Exit::Doorbell(word) => eprintln!("doorbell {word:#x} after {:?}", start.elapsed()),
            Exit::Idle { deadline } => {
                let until = deadline.unwrap_or(end).min(end);
                std::thread::sleep(until.saturating_duration_since(Instant::now()));
            }
            Exit::Interrupted => {}
            Exit::Shutdown => {
                eprintln!("shutdown after {:?}", start.elapsed());
                return Ok(());
            }
            Exit::Crashed(why) => bail!("crashed after {:?}: {why}", start.elapsed()),
        }
    }
}

fn save(machine: &mut dyn Machine, directory: &str) -> anyhow::Result<()> {
    let start = Instant::now();
    std::fs::create_dir_all(directory)?;
    std::fs::write(format!("{directory}/state"), machine.save()?)?;
    let file = File::create(format!("{directory}/memory"))?;
    file.set_len(machine.memory().size())?;
    machine.memory().for_each_data_page(|page, bytes| {
        file.write_all_at(bytes, page * 4096)
            .map_err(|source| MemoryError::Os {
                what: "writing",
                source,
            })
    })?;
    eprintln!("saved in {:?}", start.elapsed());
    Ok(())
}
