//! Processes: fork, vfork, exec, foreign programs, pipes and sockets between them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;

use crate::check::{Check, Ended, Outcome, fork, in_child, pipe, wait};
use crate::ensure;

/// This room's checks.
pub const CHECKS: &[Check] = &[
    Check {
        name: "fork-storm",
        limit: 60,
        run: fork_storm,
    },
    Check {
        name: "vfork-exec",
        limit: 60,
        run: vfork_exec,
    },
    Check {
        name: "exec-arguments",
        limit: 20,
        run: exec_arguments,
    },
    Check {
        name: "int-80",
        limit: 20,
        run: int_80,
    },
    Check {
        name: "exec-32-bit",
        limit: 20,
        run: exec_32_bit,
    },
    Check {
        name: "pipe-bulk",
        limit: 60,
        run: pipe_bulk,
    },
    Check {
        name: "socket-unix",
        limit: 30,
        run: socket_unix,
    },
    Check {
        name: "socket-tcp-loopback",
        limit: 30,
        run: socket_tcp,
    },
    Check {
        name: "cpuinfo",
        limit: 10,
        run: cpuinfo,
    },
];

fn told(error: std::io::Error) -> String {
    error.to_string()
}

fn fork_storm() -> Outcome {
    for round in 0..40 {
        let children: Vec<_> = (0..25)
            .map(|status| fork(move || status))
            .collect::<Result<_, _>>()?;
        for (status, child) in (0..).zip(children) {
            let ended = wait(child)?;
            ensure!(
                ended == Ended::Exited(status),
                "round {round}: child {status} {ended:?}"
            );
        }
    }
    Ok(())
}

fn vfork_exec() -> Outcome {
    // The library starts programs by `posix_spawn`, which is a vfork, where it can.
    for turn in 0..150 {
        let word = format!("turn-{turn}");
        let done = Command::new("/proc/self/exe")
            .args(["echo", &word])
            .output()
            .map_err(told)?;
        let right = done.status.success() && done.stdout == format!("{word}\n").as_bytes();
        ensure!(right, "turn {turn}: {done:?}");
    }
    Ok(())
}

fn exec_arguments() -> Outcome {
    // Many pages of arguments and environment reach the program whole.
    let word = "0123456789abcdef".repeat(4096);
    let done = Command::new("/proc/self/exe")
        .args(["echo", &word])
        .env("LARGE", "x".repeat(100_000))
        .output()
        .map_err(told)?;
    ensure!(
        done.stdout == format!("{word}\n").as_bytes(),
        "{} bytes came back",
        done.stdout.len()
    );
    Ok(())
}

/// Any clean way out for 32-bit code: it may work, or end by a fault, but the rest lives on.
fn clean(what: &str, ended: Ended, works: i32) -> Outcome {
    let fine = [
        Ended::Exited(works),
        Ended::Killed(libc::SIGSEGV),
        Ended::Killed(libc::SIGILL),
        Ended::Killed(libc::SIGTRAP),
    ];
    ensure!(fine.contains(&ended), "{what}: {ended:?}");
    Ok(())
}

fn int_80() -> Outcome {
    for _ in 0..20 {
        let ended = in_child(|| {
            let result: i64;
            // SAFETY: 32-bit call 20 is `getpid`; it touches no memory. R8 to R11 may be lost.
            unsafe {
                std::arch::asm!("int 0x80", inout("rax") 20i64 => result,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _);
            }
            i32::from(result != i64::from(std::process::id()) && result != -i64::from(libc::ENOSYS))
        })?;
        clean("int 0x80", ended, 0)?;
    }
    fork_storm()
}

/// A 32-bit program of one page that exits with 42.
fn tiny_elf32() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    let code = [0xb8, 1, 0, 0, 0, 0xbb, 42, 0, 0, 0, 0xcd, 0x80]; // mov eax,1; mov ebx,42; int 0x80
    let size = 52 + 32 + code.len() as u32;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend_from_slice(&value.to_le_bytes());
    let word = |elf: &mut Vec<u8>, value: u32| elf.extend_from_slice(&value.to_le_bytes());
    // Executable, for the 386.
    half(&mut elf, 2);
    half(&mut elf, 3);
    // Version, entry, program headers, section headers, flags.
    [1, BASE + 84, 52, 0, 0]
        .into_iter()
        .for_each(|value| word(&mut elf, value));
    [52, 32, 1, 40, 0, 0]
        .into_iter()
        .for_each(|value| half(&mut elf, value));
    // One segment: PT_LOAD, offset, address twice, size twice, read and execute, alignment.
    [1, 0, BASE, BASE, size, size, 5, 4096]
        .into_iter()
        .for_each(|value| word(&mut elf, value));
    elf.extend_from_slice(&code);
    elf
}

fn exec_32_bit() -> Outcome {
    let path = std::env::temp_dir().join(format!("selftest-32-{}", std::process::id()));
    std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o755)
        .open(&path)
        .and_then(|mut file| file.write_all(&tiny_elf32()))
        .map_err(told)?;
    let started = Command::new(&path).status();
    std::fs::remove_file(&path).map_err(told)?;
    if let Ok(status) = started {
        use std::os::unix::process::ExitStatusExt;
        let ended = status
            .signal()
            .map_or(Ended::Exited(status.code().unwrap_or(-1)), Ended::Killed);
        clean("a 32-bit program", ended, 42)?;
    }
    fork_storm()
}

/// Byte `index` of the bulk streams.
fn byte(index: usize) -> u8 {
    (index.wrapping_mul(2_654_435_761) >> 13) as u8
}

/// Bytes that go through a stream, and the odd sizes they are written in.
const BULK: usize = 8 << 20;
const CHUNK: usize = 7001;

/// Reads `BULK` bytes and checks each.
fn expect_bulk(mut from: impl Read) -> Outcome {
    let mut all = Vec::with_capacity(BULK);
    from.by_ref()
        .take(BULK as u64)
        .read_to_end(&mut all)
        .map_err(told)?;
    ensure!(all.len() == BULK, "{} bytes of {BULK} arrived", all.len());
    let wrong = all
        .iter()
        .enumerate()
        .find(|(index, found)| **found != byte(*index));
    ensure!(wrong.is_none(), "wrong byte {wrong:?}");
    Ok(())
}

fn send_bulk(mut to: impl Write) -> Outcome {
    let all: Vec<u8> = (0..BULK).map(byte).collect();
    all.chunks(CHUNK)
        .try_for_each(|chunk| to.write_all(chunk))
        .map_err(told)
}

fn pipe_bulk() -> Outcome {
    let (reader, writer) = pipe()?;
    let child = fork(|| {
        crate::check::status_of(
            writer
                .try_clone()
                .map_err(told)
                .map(std::fs::File::from)
                .and_then(send_bulk),
        )
    })?;
    drop(writer);
    expect_bulk(std::fs::File::from(reader))?;
    ensure!(wait(child)? == Ended::Exited(0), "the writer failed");
    // A pipe without a reader is an error for its writer.
    let (reader, writer) = pipe()?;
    drop(reader);
    // SAFETY: one byte of a valid buffer.
    let written = unsafe { libc::write(writer.as_raw_fd(), b"x".as_ptr().cast(), 1) };
    ensure!(
        written == -1 && crate::check::errno() == libc::EPIPE,
        "wrote {written} to nobody"
    );
    Ok(())
}

fn socket_unix() -> Outcome {
    let (near, far) = UnixStream::pair().map_err(told)?;
    let child = fork(|| crate::check::status_of(send_bulk(&far)))?;
    expect_bulk(&near)?;
    ensure!(wait(child)? == Ended::Exited(0), "the sender failed");
    Ok(())
}

fn socket_tcp() -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(told)?;
    let address = listener.local_addr().map_err(told)?;
    let child = fork(|| {
        crate::check::status_of(
            TcpStream::connect(address)
                .map_err(told)
                .and_then(send_bulk),
        )
    })?;
    let (stream, _) = listener.accept().map_err(told)?;
    expect_bulk(&stream)?;
    ensure!(wait(child)? == Ended::Exited(0), "the sender failed");
    Ok(())
}

fn cpuinfo() -> Outcome {
    let text = std::fs::read_to_string("/proc/cpuinfo").map_err(told)?;
    let processors = text
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    // SAFETY: always succeeds.
    let online = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    ensure!(
        processors as i64 == online,
        "{processors} processors listed, {online} online"
    );
    let flags = text
        .lines()
        .find(|line| line.starts_with("flags"))
        .ok_or("no flags")?;
    for wanted in ["fpu", "tsc", "sse2", "lm", "syscall", "nx", "cx16", "fxsr"] {
        ensure!(
            flags.split_whitespace().any(|flag| flag == wanted),
            "no {wanted} among the flags"
        );
    }
    // What programs see by CPUID and what the kernel saves must be the same.
    let avx = std::arch::is_x86_feature_detected!("avx");
    ensure!(
        avx == flags.split_whitespace().any(|flag| flag == "avx"),
        "AVX: CPUID says {avx}, the kernel not"
    );
    Ok(())
}
