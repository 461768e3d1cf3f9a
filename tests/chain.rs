//! A VM's whole life through the worker protocol: boot, freeze, thaw, run, die.
//!
//! Needs the `minimal` image; `THAW_TEST_DATA` names the data directory that has it.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use thaw::worker::{Event, Launcher, Worker, command};
use thaw_vmm::machine::{MachineKind, probe};
use thaw_vmm::protocol::{Boot, Tuning};
use thaw_wire::message::{Exit, Language, Renew, Signal};

const SECOND: Duration = Duration::from_secs(1);

fn image(file: &str) -> File {
    let data = std::env::var_os("THAW_TEST_DATA").expect(
        "set THAW_TEST_DATA to a data directory with the image `minimal` (`make test` does)",
    );
    let path = PathBuf::from(data).join("images/minimal").join(file);
    File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn memfd() -> File {
    File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap())
}

fn launcher() -> Launcher {
    Launcher::program(env!("CARGO_BIN_EXE_thaw").into())
}

fn identity(generation: u64) -> Renew {
    Renew {
        generation,
        seed: format!("{generation:064x}"),
        wall_ns: std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_nanos() as u64,
        hostname: format!("clone-{generation}"),
        machine_id: format!("{generation:032x}"),
        env: BTreeMap::new(),
        terminals: Vec::new(),
    }
}

#[derive(Debug, Default)]
struct Ran {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Exit,
}

async fn run(worker: &Worker, language: Language, code: &str) -> Ran {
    let mut running = worker
        .execute(command(language, code, 60 * SECOND))
        .unwrap();
    let mut ran = Ran::default();
    loop {
        match running.next().await {
            Event::Stdout(bytes) => ran.stdout.extend(bytes),
            Event::Stderr(bytes) => ran.stderr.extend(bytes),
            Event::Rich(_) => {}
            Event::Exit(exit) => {
                ran.exit = exit;
                return ran;
            }
            Event::Died(death) => panic!("{death:?}"),
        }
    }
}

async fn python(worker: &Worker, code: &str) -> String {
    let ran = run(worker, Language::Python, code).await;
    assert_eq!(
        ran.exit.exit_code,
        0,
        "{}",
        String::from_utf8_lossy(&ran.stderr)
    );
    String::from_utf8(ran.stdout).unwrap()
}

/// A frozen VM.
struct Frozen {
    state: File,
    memory: File,
}

const NATIVE: Tuning = Tuning {
    force_bounce: false,
};
const BOUNCE: Tuning = Tuning { force_bounce: true };

async fn boot(tuning: Tuning) -> Worker {
    let worker = launcher().spawn().await.unwrap();
    let kind = probe().kind.expect("this host runs no VMs");
    let boot = Boot {
        vcpus: 1,
        memory_mib: 256,
        cmdline: kind.cmdline().to_owned(),
        machine: Some(kind),
        tuning,
    };
    let started = worker
        .boot(boot, image("vmlinux"), image("initramfs"))
        .await
        .unwrap();
    assert_eq!(started.ready.generation, 0);
    worker
}

async fn freeze(tuning: Tuning) -> Frozen {
    let worker = boot(tuning).await;
    worker.warm(Vec::new()).await.unwrap();
    assert_eq!(python(&worker, "kept = 41; print(1)").await, "1\n");
    worker.quiesce().await.unwrap();
    let frozen = Frozen {
        state: memfd(),
        memory: memfd(),
    };
    let saved = worker.save(&frozen.state, &frozen.memory).await.unwrap();
    eprintln!("saved: {saved:?}");
    worker.end().await;
    frozen
}

async fn thaw(
    frozen: &Frozen,
    tuning: Tuning,
    generation: u64,
    working_set: Option<&File>,
) -> Worker {
    let began = Instant::now();
    let worker = launcher().spawn().await.unwrap();
    let spawned = began.elapsed();
    let started = worker
        .restore(
            generation,
            tuning,
            &frozen.state,
            &frozen.memory,
            None,
            working_set,
        )
        .await
        .unwrap();
    let ready = began.elapsed();
    worker.renew(identity(generation)).await.unwrap();
    eprintln!(
        "restore {generation}: spawned {spawned:?}, ready {ready:?}, renewed {:?}, {:?}",
        began.elapsed(),
        started.phases_us
    );
    assert_eq!(started.ready.generation, generation);
    worker
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_is_booted_frozen_and_thawed() {
    let frozen = freeze(NATIVE).await;
    // The first clone shows what a first command writes.
    let first = thaw(&frozen, NATIVE, 1, None).await;
    assert_eq!(python(&first, "kept + 1").await, "42\n");
    let list = memfd();
    let pages = first.touched(&list).await.unwrap();
    assert_eq!(list.metadata().unwrap().len(), pages * 8);
    eprintln!(
        "first command touches {pages} pages; {:?}",
        first.stats().await.unwrap()
    );

    // Clones share nothing but the past.
    let clones = [
        thaw(&frozen, NATIVE, 2, Some(&list)).await,
        thaw(&frozen, NATIVE, 3, Some(&list)).await,
    ];
    let mut draws = Vec::new();
    for (n, clone) in clones.iter().enumerate() {
        assert_eq!(
            python(clone, &format!("mine = {n}; print(mine)")).await,
            format!("{n}\n")
        );
        draws.push(
            python(
                clone,
                "import os, uuid, random; print(os.urandom(8), uuid.uuid4(), random.random())",
            )
            .await,
        );
    }
    assert_ne!(draws[0], draws[1]);
    for (n, clone) in clones.iter().enumerate() {
        assert_eq!(
            python(clone, "print(mine, kept)").await,
            format!("{n} 41\n")
        );
    }

    let vm = &clones[0];
    let mut times = Vec::new();
    for _ in 0..300 {
        let began = Instant::now();
        python(vm, "print(1)").await;
        times.push(began.elapsed());
    }
    times.sort();
    eprintln!(
        "warm: p50 {:?} p99 {:?}; {:?}",
        percentile(&times, 50),
        percentile(&times, 99),
        vm.stats().await.unwrap()
    );

    // Long output keeps to its credit and arrives whole; long source arrives as input.
    let out = python(vm, "print('x' * 3_000_000)").await;
    assert_eq!(out.len(), 3_000_001);
    let long = format!("text = '{}'; print(len(text))", "y".repeat(400_000));
    assert_eq!(python(vm, &long).await, "400000\n");
    let ran = run(vm, Language::Bash, "echo out; echo err >&2; exit 3").await;
    assert_eq!(
        (ran.stdout.as_slice(), ran.exit.exit_code),
        (&b"out\n"[..], 3)
    );

    // A command that would not end is interrupted, and the VM goes on.
    let mut running = vm
        .execute(command(Language::Python, "while True: pass", 60 * SECOND))
        .unwrap();
    tokio::time::sleep(SECOND / 4).await;
    running.signal(Signal::Interrupt).unwrap();
    let exit = loop {
        match running.next().await {
            Event::Exit(exit) => break exit,
            Event::Died(death) => panic!("{death:?}"),
            _ => {}
        }
    };
    assert_ne!(exit.exit_code, 0);
    let overran = vm
        .execute(command(
            Language::Python,
            "import time; time.sleep(60)",
            SECOND / 2,
        ))
        .unwrap();
    let exit = end_of(overran).await;
    assert!(exit.timed_out, "{exit:?}");
    assert_eq!(python(vm, "print(mine)").await, "0\n");

    // A worker that is killed is told to everybody who waits.
    let mut running = vm
        .execute(command(Language::Python, "while True: pass", 60 * SECOND))
        .unwrap();
    let pid = nix::unistd::Pid::from_raw(vm.pid() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    loop {
        match running.next().await {
            Event::Died(_) => break,
            Event::Exit(exit) => panic!("{exit:?}"),
            _ => {}
        }
    }
    vm.died().await;
    vm.end().await;
    for worker in [&first, &clones[1]] {
        worker.end().await;
    }
}

async fn end_of(mut running: thaw::worker::Running) -> Exit {
    loop {
        match running.next().await {
            Event::Exit(exit) => return exit,
            Event::Died(death) => panic!("{death:?}"),
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_powers_off_or_crashes_is_reported() {
    let worker = boot(NATIVE).await;
    let died = worker.died();
    let running = worker
        .execute(command(
            Language::Bash,
            "echo c > /proc/sysrq-trigger",
            30 * SECOND,
        ))
        .unwrap();
    let death = tokio::time::timeout(20 * SECOND, died).await.unwrap();
    assert!(
        death.console.contains("sysrq") || death.console.contains("Kernel panic"),
        "{death:?}"
    );
    eprintln!("{:?}: {}", death.cause, death.detail);
    drop(running);
    worker.end().await;
}

/// The slower way of system calls, taken where SYSCALL does not stay at CPL3, cannot be had on
/// this host unless it is forced. The guest's self-test must pass on it, before and after a thaw.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guest_passes_its_self_test_with_system_calls_bounced() {
    if probe().kind != Some(MachineKind::Pv) {
        eprintln!("not tested: this host's machine takes system calls by itself");
        return;
    }
    let path = std::env::var_os("THAW_SELFTEST")
        .expect("set THAW_SELFTEST to the static thaw-selftest (`make test` does)");
    let program = std::fs::read(path).unwrap();
    let frozen = freeze(BOUNCE).await;
    let vm = thaw(&frozen, BOUNCE, 1, None).await;
    python(&vm, "import base64, os; file = open('/tmp/selftest', 'wb')").await;
    for piece in program.chunks(300_000) {
        let text = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, piece);
        python(&vm, &format!("file.write(base64.b64decode('{text}'));")).await;
    }
    python(&vm, "file.close(); os.chmod('/tmp/selftest', 0o755)").await;
    let running = vm
        .execute(command(
            Language::Bash,
            "/tmp/selftest > /tmp/report 2>&1",
            600 * SECOND,
        ))
        .unwrap();
    let exit = end_of(running).await;
    let report = python(&vm, "print(open('/tmp/report').read())").await;
    assert_eq!(exit.exit_code, 0, "{report}");
    assert!(report.trim_end().ends_with(" 0 failed"), "{report}");
    vm.end().await;
}
