//! Processes beside the commands, as a host opens and feeds them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use thaw_wire::frame::{Frame, INITIAL_CREDIT, Kind, MAX_PAYLOAD};
use thaw_wire::message::{FileWork, Open, Process, Program};

use super::{Host, Outcome};

pub fn command(argv: &[&str]) -> Process {
    Process {
        program: Program::Command {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        },
        env: BTreeMap::new(),
        cwd: None,
        terminal: None,
        name: None,
    }
}

pub fn files(work: FileWork) -> Process {
    Process {
        program: Program::Files { work },
        ..command(&[])
    }
}

pub trait Processes {
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

pub fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("thaw-files-{name}-{}", std::process::id()));
    drop(std::fs::remove_dir_all(&dir));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

pub fn text(path: &std::path::Path) -> String {
    path.to_str().unwrap().to_owned()
}

pub fn lines<T: serde::de::DeserializeOwned>(outcome: &Outcome) -> Vec<T> {
    let lines = outcome.out().lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}
