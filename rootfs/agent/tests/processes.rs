//! Processes beside the commands: terminals, files, their bounds and their ends.

// Not every test uses all of the shared support.
#[allow(dead_code)]
mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use support::{Host, Outcome};
use thaw_wire::frame::{Frame, INITIAL_CREDIT, Kind, MAX_PAYLOAD};
use thaw_wire::message::{
    Exit, FileEvent, FileInfo, FileKind, FileWork, Open, Process, Program, Signal, Size,
};

fn command(argv: &[&str]) -> Process {
    Process {
        program: Program::Command {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        },
        env: BTreeMap::new(),
        cwd: None,
        terminal: None,
    }
}

fn files(work: FileWork) -> Process {
    Process {
        program: Program::Files { work },
        ..command(&[])
    }
}

trait Processes {
    fn open(&mut self, stream: u32, process: Process);
    fn feed(&mut self, stream: u32, bytes: &[u8]);
    fn work(&mut self, stream: u32, work: FileWork) -> Outcome;
    fn until(&mut self, stream: u32, wanted: &str) -> String;
}

impl Processes for Host {
    fn open(&mut self, stream: u32, process: Process) {
        self.send(&Frame::json(stream, Kind::Open, &Open::Process(process)).unwrap());
    }

    /// Sends input as credit allows, then its end.
    fn feed(&mut self, stream: u32, bytes: &[u8]) {
        let mut credit = INITIAL_CREDIT as usize;
        let mut sent = 0;
        while sent < bytes.len() {
            let len = credit.min(MAX_PAYLOAD).min(bytes.len() - sent);
            if len == 0 {
                let frame = self.receive();
                assert_eq!((frame.stream, frame.kind), (stream, Kind::Credit));
                credit += u32::from_le_bytes(frame.payload.try_into().unwrap()) as usize;
                continue;
            }
            let piece = bytes[sent..sent + len].to_vec();
            self.send(&Frame::new(stream, Kind::Stdin, piece));
            (sent, credit) = (sent + len, credit - len);
        }
        self.send(&Frame::new(stream, Kind::Stdin, Vec::new()));
    }

    fn work(&mut self, stream: u32, work: FileWork) -> Outcome {
        self.open(stream, files(work));
        self.finish(stream)
    }

    /// Reads output until it has a text.
    fn until(&mut self, stream: u32, wanted: &str) -> String {
        let mut all = String::new();
        while !all.contains(wanted) {
            let frame = self.receive();
            assert_ne!(frame.kind, Kind::Exit, "it ended after {all:?}");
            if frame.stream == stream && frame.kind == Kind::Stdout {
                self.send(&Frame::credit(stream, frame.payload.len() as u32));
                all.push_str(&String::from_utf8_lossy(&frame.payload));
            }
        }
        all
    }
}

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("thaw-files-{name}-{}", std::process::id()));
    drop(std::fs::remove_dir_all(&dir));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn text(path: &std::path::Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn lines<T: serde::de::DeserializeOwned>(outcome: &Outcome) -> Vec<T> {
    let lines = outcome.out().lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn a_process_has_input_output_and_an_end() {
    let mut host = Host::new("process");
    host.open(100, command(&["sh", "-c", "cat; echo err >&2; exit 7"]));
    host.feed(100, b"hello");
    let outcome = host.finish(100);
    assert_eq!((outcome.out(), outcome.err()), ("hello", "err\n"));
    assert_eq!(outcome.exit.exit_code, 7);
    host.open(101, command(&["no-such-program"]));
    let missing = host.finish(101).exit;
    assert_eq!(missing.exit_code, 127);
    assert!(missing.note.is_some());
    // What it leaves behind does not hold up its end.
    host.open(102, command(&["sh", "-c", "sleep 60 & echo begun"]));
    let began = Instant::now();
    assert_eq!(host.finish(102).out(), "begun\n");
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn signals_reach_the_whole_group() {
    let mut host = Host::new("process-signals");
    for (stream, signal, code) in [
        (100, Signal::Interrupt, 130),
        (101, Signal::Kill, 137),
        (102, Signal::Hangup, 129),
    ] {
        host.open(stream, command(&["sleep", "600"]));
        std::thread::sleep(Duration::from_millis(100));
        host.signal(stream, signal);
        assert_eq!(host.finish(stream).exit.exit_code, code);
    }
    // Who ignores a hang-up is killed.
    host.open(
        103,
        command(&["sh", "-c", "trap '' HUP; echo deaf; sleep 600"]),
    );
    host.until(103, "deaf");
    host.signal(103, Signal::Hangup);
    assert_eq!(host.finish(103).exit.exit_code, 137);
}

#[test]
fn a_terminal_is_one() {
    let mut host = Host::new("terminal");
    let mut shell = command(&["bash", "--norc", "-i"]);
    shell.terminal = Some(Size { cols: 91, rows: 33 });
    shell.env.insert("PS1".into(), "ready> ".into());
    host.open(100, shell);
    host.until(100, "ready> ");
    let say = |host: &mut Host, line: &str, answer: &str| {
        host.send(&Frame::new(100, Kind::Stdin, line.into()));
        host.until(100, answer)
    };
    say(&mut host, "stty size; echo $TERM\n", "33 91");
    host.signal(
        100,
        Signal::Resize(Size {
            cols: 120,
            rows: 40,
        }),
    );
    say(&mut host, "stty size\n", "40 120");
    say(&mut host, "tty && echo is-a\"-\"tty\n", "is-a-tty");
    // Ctrl-C interrupts what runs in it, not the shell. That it runs, it must say itself: between a
    // shell's fork and exec an interrupt is lost.
    say(&mut host, "cat <(echo g''o) -\n", "go\r\n");
    say(&mut host, "\x03", "ready> ");
    host.send(&Frame::new(100, Kind::Stdin, b"exit 5\n".to_vec()));
    assert_eq!(host.finish(100).exit.exit_code, 5);
}

#[test]
fn output_waits_for_credit_and_input_for_its_reader() {
    let mut host = Host::new("process-credit");
    host.generous = false;
    host.open(
        100,
        command(&["sh", "-c", "head -c 1000000 /dev/zero; echo done >&2"]),
    );
    let mut seen = 0;
    while seen < INITIAL_CREDIT as usize {
        let frame = host.receive();
        assert_eq!(frame.kind, Kind::Stdout);
        seen += frame.payload.len();
    }
    assert_eq!(seen, INITIAL_CREDIT as usize);
    host.send(&Frame::credit(100, 10_000_000));
    assert_eq!(seen + host.finish(100).stdout.len(), 1_000_000);
    // A process that does not read gets its first window and no more.
    host.open(101, command(&["sleep", "1"]));
    host.send(&Frame::new(101, Kind::Stdin, vec![1; MAX_PAYLOAD]));
    host.send(&Frame::new(101, Kind::Stdin, vec![1; MAX_PAYLOAD]));
    let mut granted = 0;
    let exit: Exit = loop {
        let frame = host.receive();
        match frame.kind {
            Kind::Credit => granted += u32::from_le_bytes(frame.payload.try_into().unwrap()),
            Kind::Exit => break serde_json::from_slice(&frame.payload).unwrap(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(exit.exit_code, 0);
    assert!(granted <= INITIAL_CREDIT, "{granted}");
}

#[test]
fn processes_are_bounded() {
    let mut host = Host::new("process-bound");
    for stream in 100..132 {
        host.open(stream, command(&["sleep", "600"]));
    }
    host.open(132, command(&["true"]));
    let refused = host.finish(132).exit;
    assert_eq!(refused.exit_code, 126);
    assert!(refused.note.unwrap().contains("32"));
    assert_eq!(host.python("1 + 1").out(), "2\n");
    for stream in 100..132 {
        host.signal(stream, Signal::Kill);
        host.finish(stream);
    }
    host.open(133, command(&["true"]));
    assert_eq!(host.finish(133).exit.exit_code, 0);
}

#[test]
fn a_file_goes_in_and_comes_out_whole() {
    let dir = scratch("round");
    let mut host = Host::new("files-round");
    let bytes: Vec<u8> = (0..20_000_000_u32).map(|n| ((n * 7) >> 3) as u8).collect();
    let path = text(&dir.join("a/b/big"));
    let write = |mode, parents| FileWork::Write {
        path: path.clone(),
        mode,
        parents,
    };
    assert_eq!(
        host.work(100, write(None, false)).exit.exit_code,
        2,
        "no directory"
    );
    host.open(101, files(write(Some(0o640), true)));
    host.feed(101, &bytes);
    let written = host.finish(101);
    assert_eq!(written.exit.exit_code, 0, "{}", written.err());
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o640
    );
    let read = host.work(102, FileWork::Read { path: path.clone() });
    assert!(read.stdout == bytes && read.exit.exit_code == 0);
    // A replacement keeps the mode; one that is killed changes nothing.
    host.open(103, files(write(None, false)));
    host.feed(103, b"new");
    assert_eq!(host.finish(103).exit.exit_code, 0);
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o640
    );
    host.open(104, files(write(None, false)));
    host.send(&Frame::new(104, Kind::Stdin, vec![9; 1000]));
    std::thread::sleep(Duration::from_millis(200));
    host.signal(104, Signal::Kill);
    assert_eq!(host.finish(104).exit.exit_code, 137);
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    // What it left is gone with the next transfer.
    host.open(105, files(write(None, false)));
    host.feed(105, b"");
    assert_eq!(host.finish(105).exit.exit_code, 0);
    let left: Vec<_> = std::fs::read_dir(dir.join("a/b")).unwrap().collect();
    assert_eq!(left.len(), 1);
    assert_eq!(std::fs::read(&path).unwrap(), b"");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn what_is_no_file_is_refused_and_hangs_nobody() {
    let dir = scratch("odd");
    let mut host = Host::new("files-odd");
    nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.join("link")).unwrap();
    let at = |name: &str| text(&dir.join(name));
    let mut stream = 100;
    let mut code = |work: FileWork| {
        stream += 1;
        let outcome = host.work(stream, work);
        assert!(outcome.exit.exit_code == 0 || !outcome.err().is_empty());
        outcome.exit.exit_code
    };
    let read = |path: String| FileWork::Read { path };
    assert_eq!(code(read(at("fifo"))), libc::EINVAL);
    assert_eq!(code(read(text(&dir))), libc::EISDIR);
    assert_eq!(code(read(at("missing"))), libc::ENOENT);
    assert_eq!(code(read("a\0b".into())), 255);
    assert_eq!(code(read("x".repeat(5000))), libc::ENAMETOOLONG);
    let write = |path: String| FileWork::Write {
        path,
        mode: None,
        parents: false,
    };
    assert_eq!(code(write(text(&dir))), libc::EISDIR);
    assert_eq!(code(write(at("fifo"))), libc::EINVAL);
    let remove = |path: String, recursive| FileWork::Remove { path, recursive };
    assert_eq!(code(remove("/".into(), true)), libc::EBUSY);
    assert_eq!(code(remove(at("missing"), true)), libc::ENOENT);
    assert_eq!(code(remove(text(&dir), false)), libc::ENOTEMPTY);
    assert_eq!(code(remove(at("link"), true)), 0);
    assert_eq!(code(remove(text(&dir), true)), 0);
    assert!(!dir.exists());
}

#[test]
fn lists_and_facts() {
    let dir = scratch("list");
    let mut host = Host::new("files-list");
    std::fs::create_dir(dir.join("b")).unwrap();
    std::fs::write(dir.join("b/inner"), "12345").unwrap();
    std::fs::write(dir.join("a\nx"), "1").unwrap();
    std::os::unix::fs::symlink("b", dir.join("c")).unwrap();
    let list = |recursive, limit| FileWork::List {
        path: text(&dir),
        recursive,
        limit,
    };
    let names = |infos: &[FileInfo]| -> Vec<String> {
        let base = text(&dir) + "/";
        infos
            .iter()
            .map(|info| info.path.replace(&base, ""))
            .collect()
    };
    let flat: Vec<FileInfo> = lines(&host.work(100, list(false, 100)));
    assert_eq!(names(&flat), ["a\nx", "b", "c"]);
    assert_eq!(flat[2].target.as_deref(), Some("b"));
    let deep: Vec<FileInfo> = lines(&host.work(101, list(true, 100)));
    assert_eq!(names(&deep), ["a\nx", "b", "b/inner", "c"]);
    assert_eq!((deep[2].kind, deep[2].size), (FileKind::File, 5));
    let some: Vec<FileInfo> = lines(&host.work(102, list(true, 2)));
    assert_eq!(names(&some), ["a\nx", "b"]);
    let path = text(&dir.join("new/deep"));
    let mkdir = |parents| FileWork::Mkdir {
        path: path.clone(),
        parents,
    };
    assert_eq!(host.work(103, mkdir(false)).exit.exit_code, libc::ENOENT);
    assert_eq!(host.work(104, mkdir(true)).exit.exit_code, 0);
    let rename = FileWork::Rename {
        from: path.clone(),
        to: text(&dir.join("moved")),
    };
    assert_eq!(host.work(105, rename).exit.exit_code, 0);
    let stat = FileWork::Stat {
        path: text(&dir.join("moved")),
    };
    let found: Vec<FileInfo> = lines(&host.work(106, stat));
    assert_eq!(found[0].kind, FileKind::Directory);
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn changes_are_told_as_they_happen() {
    let dir = scratch("watch");
    let mut host = Host::new("files-watch");
    let watch = FileWork::Watch {
        path: text(&dir),
        recursive: true,
    };
    host.open(100, files(watch));
    host.until(100, "{}\n");
    std::fs::create_dir(dir.join("new")).unwrap();
    host.until(100, "/new\"}\n");
    std::fs::write(dir.join("new/file"), "x").unwrap();
    let told = host.until(100, "modified");
    let events: Vec<FileEvent> = told
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    assert!(
        events.iter().all(|event| event.path.ends_with("/new/file")),
        "{events:?}"
    );
    std::fs::remove_file(dir.join("new/file")).unwrap();
    host.until(100, "removed");
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(host.finish(100).exit.exit_code, 0);
}
