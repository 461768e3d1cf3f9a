//! What a hostile guest would do, run as root inside one. The host's tests look at what it costs
//! the others: nothing.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use thaw_wire::layout::{DOORBELL_PORT, KICK, MAGIC, MAX_RING_PAGES, PAGE, offset};

use crate::check::{Ended, Outcome, in_child, sys};
use crate::ensure;

/// The modes, for the help.
pub const HELP: &str = "\
selftest hostile MODE [SECONDS]   (as root, in a guest that may be lost)
  doorbell-loop  rings the doorbell with valid and garbage words
  rings          lies in the agent's header page and rings, then rings the doorbell;
                 [frames|positions|lists|headers] for one kind of lie only
  flood          writes to stdout as fast as it can
  ports          writes to the host's other I/O ports; \"permitted\" asks the kernel for them first
  eat-memory     touches memory until it is killed
  fork-bomb      forks without end
  panic          crashes the kernel";

/// Runs one mode.
pub fn main(words: &[&str]) -> ExitCode {
    let number = words.get(1).and_then(|word| word.parse().ok());
    let limit = Duration::from_secs(number.unwrap_or(3));
    let done = match words {
        ["doorbell-loop", ..] => doorbell_loop(limit),
        ["rings", parts @ ..] => rings(parts),
        ["flood", ..] => flood(limit),
        ["ports", rest @ ..] => ports(rest.first() == Some(&"permitted")),
        ["eat-memory", ..] => eat_memory(),
        ["fork-bomb", ..] => fork_bomb(limit),
        ["panic", ..] => panic_kernel(),
        _ => {
            eprintln!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("FAIL {why}");
            ExitCode::FAILURE
        }
    }
}

/// Asks the kernel for the doorbell's ports.
fn permit(port: u16, ports: u16) -> Outcome {
    // SAFETY: gives this process a permission, no more.
    sys("ioperm", unsafe {
        libc::ioperm(port.into(), ports.into(), 1)
    })?;
    Ok(())
}

/// One 32-bit port write.
fn out(port: u16, word: u32) {
    // SAFETY: leaves guest mode or faults; touches none of this process's memory.
    unsafe { std::arch::asm!("out dx, eax", in("dx") port, in("eax") word) };
}

/// A pseudo-random sequence (xorshift64): the same garbage every time.
fn garbage(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn doorbell_loop(limit: Duration) -> Outcome {
    permit(DOORBELL_PORT, 4)?;
    let (start, mut state, mut rung) = (Instant::now(), 88_172_645_463_325_252u64, 0u64);
    // Valid words first: a garbage one may well end the VM at once, and rightly so.
    while start.elapsed() < limit {
        let valid = start.elapsed() < limit / 2;
        for _ in 0..50 {
            out(
                DOORBELL_PORT,
                if valid {
                    KICK
                } else {
                    garbage(&mut state) as u32
                },
            );
            rung += 1;
        }
    }
    println!("doorbell-loop: {rung} doorbells");
    Ok(())
}

/// A page of PID 1: where it is there, and its frame number.
struct AgentPage {
    address: u64,
    frame: u64,
}

/// The pages of PID 1 that are shared memory, as its rings are.
fn agent_pages() -> Result<Vec<AgentPage>, String> {
    let maps = std::fs::read_to_string("/proc/1/maps")
        .map_err(|error| format!("/proc/1/maps: {error}"))?;
    let pagemap = std::fs::File::open("/proc/1/pagemap")
        .map_err(|error| format!("/proc/1/pagemap: {error}"))?;
    let mut pages = Vec::new();
    for line in maps.lines().filter(|line| {
        line.split(' ')
            .nth(1)
            .is_some_and(|flags| flags.ends_with('s'))
    }) {
        let (from, to) = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'))
            .ok_or("odd maps")?;
        let parse = |text| u64::from_str_radix(text, 16).map_err(|error| format!("maps: {error}"));
        for address in (parse(from)?..parse(to)?).step_by(PAGE) {
            let mut entry = [0; 8];
            if pagemap
                .read_exact_at(&mut entry, address / PAGE as u64 * 8)
                .is_ok()
            {
                let entry = u64::from_le_bytes(entry);
                // Bit 63: present; bits 0-54: the frame number (admin-guide/mm/pagemap).
                if entry >> 63 == 1 {
                    pages.push(AgentPage {
                        address,
                        frame: entry & ((1 << 55) - 1),
                    });
                }
            }
        }
    }
    Ok(pages)
}

/// Overwrites header fields and ring contents by turns, with a doorbell after each.
fn rings(parts: &[&str]) -> Outcome {
    // The host ends a VM at the first lie: each kind of lie needs a VM of its own.
    let told = |part: &str| parts.is_empty() || parts.contains(&part);
    let pages = agent_pages()?;
    let memory = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/proc/1/mem")
        .map_err(|error| format!("/proc/1/mem: {error}"))?;
    let mut word = [0; 8];
    let header = pages
        .iter()
        .find(|page| {
            memory.read_exact_at(&mut word, page.address).is_ok()
                && u64::from_le_bytes(word) == MAGIC
        })
        .ok_or_else(|| format!("no header page among {} shared pages of PID 1", pages.len()))?;
    permit(DOORBELL_PORT, 4)?;
    println!(
        "rings: header page at {:#x}, frame {:#x}",
        header.address, header.frame
    );
    let mut list = vec![0; 2 * 8 * MAX_RING_PAGES];
    read(
        &memory,
        &mut list,
        header.address + offset::TO_HOST_PAGES as u64,
    )?;
    let mut state = 88_172_645_463_325_252;
    let mut filled = 0;
    // Garbage frames, in every page that either list names.
    for address in list.chunks_exact(8).map(|bytes| {
        bytes
            .iter()
            .rev()
            .fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
    }) {
        if let Some(page) = pages
            .iter()
            .find(|page| address != 0 && page.frame == address / PAGE as u64)
        {
            let noise: Vec<u8> = (0..PAGE / 8)
                .flat_map(|_| garbage(&mut state).to_le_bytes())
                .collect();
            write(&memory, &noise, page.address)?;
            filled += 1;
        }
    }
    println!("rings: garbage in {filled} pages");
    if told("frames") {
        // A position that makes the host read one of them: 256 bytes further than it has read.
        let mut head = [0; 4];
        read(
            &memory,
            &mut head,
            header.address + offset::TO_HOST_HEAD as u64,
        )?;
        let further = u32::from_le_bytes(head).wrapping_add(256).to_le_bytes();
        write(
            &memory,
            &further,
            header.address + offset::TO_HOST_HEAD as u64,
        )?;
        out(DOORBELL_PORT, KICK);
        println!("rings: garbage frames");
    }
    // Positions: far ahead, behind, and one byte more than a ring holds.
    for position in [
        1u32,
        0xffff_ffff,
        0x8000_0000,
        (64 * PAGE) as u32 + 1,
        12,
        0,
    ] {
        for field in [
            offset::TO_HOST_HEAD,
            offset::TO_HOST_TAIL,
            offset::TO_GUEST_TAIL,
            offset::TO_GUEST_HEAD,
        ] {
            write(
                &memory,
                &position.to_le_bytes(),
                header.address + field as u64,
            )?;
            out(DOORBELL_PORT, KICK);
        }
    }
    println!("rings: impossible positions");
    // Page lists that point nowhere, at the host's own structures, and at one page twice.
    for address in [
        u64::MAX,
        0,
        1 << 52,
        0xfee0_0000,
        4097,
        header.frame * PAGE as u64,
    ] {
        let bad: Vec<u8> = (0..2 * MAX_RING_PAGES)
            .flat_map(|_| address.to_le_bytes())
            .collect();
        write(&memory, &bad, header.address + offset::TO_HOST_PAGES as u64)?;
        out(DOORBELL_PORT, KICK);
        out(DOORBELL_PORT, header.frame as u32);
        out(DOORBELL_PORT, KICK);
    }
    if !told("headers") {
        return Ok(());
    }
    for pages in [0u32, 3, MAX_RING_PAGES as u32 * 2, u32::MAX] {
        write(
            &memory,
            &pages.to_le_bytes(),
            header.address + offset::RING_PAGES as u64,
        )?;
        out(DOORBELL_PORT, header.frame as u32);
    }
    write(&memory, &[0xff; 64], header.address)?;
    out(DOORBELL_PORT, header.frame as u32);
    println!("rings: impossible headers");
    Ok(())
}

fn read(memory: &std::fs::File, bytes: &mut [u8], address: u64) -> Outcome {
    memory
        .read_exact_at(bytes, address)
        .map_err(|error| format!("reading PID 1 at {address:#x}: {error}"))
}

fn write(memory: &std::fs::File, bytes: &[u8], address: u64) -> Outcome {
    memory
        .write_all_at(bytes, address)
        .map_err(|error| format!("writing PID 1 at {address:#x}: {error}"))
}

fn flood(limit: Duration) -> Outcome {
    let (start, block, mut written) = (Instant::now(), [b'x'; 64 << 10], 0u64);
    let mut stdout = std::io::stdout().lock();
    while start.elapsed() < limit {
        stdout
            .write_all(&block)
            .map_err(|error| format!("stdout: {error}"))?;
        written += block.len() as u64;
    }
    eprintln!("flood: {written} bytes");
    Ok(())
}

/// Ports that a VMM may listen on: its hypercalls (0xe0-0xff and the doorbell's neighbours), and
/// classic devices whose write a real machine would mind, which is why nobody is asked for those.
fn ports(permitted: bool) -> Outcome {
    let own = (0xe0..=0xffu16)
        .chain(DOORBELL_PORT - 4..DOORBELL_PORT)
        .chain(DOORBELL_PORT + 4..DOORBELL_PORT + 8);
    let classic = [
        0x20, 0x21, 0x43, 0x61, 0x64, 0x70, 0x80, 0x3f8, 0xcf8, 0x600, 0xffff,
    ];
    let all: Vec<u16> = if permitted {
        own.collect()
    } else {
        own.chain(classic).chain([DOORBELL_PORT]).collect()
    };
    let mut refused = 0;
    for port in &all {
        let ended = in_child(|| {
            if permitted && permit(*port, 1).is_err() {
                return 3;
            }
            // The ABI's registers hold garbage: a hypercall that ran would be given it.
            out(*port, 0xdead_beef);
            0
        })?;
        match ended {
            Ended::Killed(libc::SIGSEGV) => refused += 1,
            // With the kernel's leave a machine may also ignore the write.
            Ended::Exited(_) if permitted => {}
            other => return Err(format!("port {port:#x}: {other:?}, wanted SIGSEGV")),
        }
    }
    println!("ports: {refused} of {} refused", all.len());
    Ok(())
}

fn eat_memory() -> Outcome {
    let ended = in_child(|| {
        // The kernel's first choice: what is tested is that the rest lives on.
        if std::fs::write("/proc/self/oom_score_adj", "1000").is_err() {
            return 3;
        }
        let mut eaten: Vec<Vec<u8>> = Vec::new();
        loop {
            let mut block = Vec::new();
            if block.try_reserve_exact(1 << 20).is_err() {
                return 2;
            }
            block.resize(1 << 20, eaten.len() as u8 | 1);
            eaten.push(block);
        }
    })?;
    println!("eat-memory: ended {ended:?}");
    ensure!(
        ended != Ended::Exited(3),
        "cannot offer itself to the kernel's memory killer"
    );
    Ok(())
}

fn fork_bomb(limit: Duration) -> Outcome {
    let (start, mut refused, mut forked) = (Instant::now(), 0u64, 0u64);
    while start.elapsed() < limit {
        // SAFETY: a single-threaded process; every copy goes on with this loop.
        match unsafe { libc::fork() } {
            -1 => {
                refused += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            0 => forked = 0,
            _ => forked += 1,
        }
    }
    println!("fork-bomb: one process forked {forked} times, refused {refused} times");
    Ok(())
}

fn panic_kernel() -> Outcome {
    println!("panic: now");
    std::fs::write("/proc/sysrq-trigger", "c")
        .map_err(|error| format!("/proc/sysrq-trigger: {error}"))?;
    Err("the kernel lives on".to_owned())
}
