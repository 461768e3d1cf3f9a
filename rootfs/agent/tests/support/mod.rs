//! A host for a rehearsing agent.

pub mod processes;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use thaw_wire::frame::{CONTROL, Frame, HEADER, Header, Kind};
use thaw_wire::message::{Execute, Exit, Language, Open, Order, Ready, Report, Signal};

/// The agent's process and the host's end of its wire.
pub struct Host {
    child: Child,
    socket: UnixStream,
    scratch: PathBuf,
    next: u32,
    /// Whether output is granted new credit as it comes.
    pub generous: bool,
    pub ready: Ready,
}

/// All that came of a command.
#[derive(Debug)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub rich: Vec<u8>,
    pub exit: Exit,
}

impl Outcome {
    pub fn out(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
    pub fn err(&self) -> &str {
        std::str::from_utf8(&self.stderr).unwrap()
    }
}

impl Host {
    pub fn new(name: &str) -> Self {
        let scratch =
            std::env::temp_dir().join(format!("thaw-agent-{name}-{}", std::process::id()));
        std::fs::create_dir_all(scratch.join("home")).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let runner = Path::new(env!("CARGO_MANIFEST_DIR")).join("../runner");
        let child = Command::new(env!("CARGO_BIN_EXE_thaw-agent"))
            .arg("--rehearse")
            .args([
                &runner.canonicalize().unwrap(),
                &scratch.join("shell"),
                &scratch.join("home"),
            ])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let ready = Ready {
            generation: 0,
            agent: String::new(),
            kernel: String::new(),
            languages: Vec::new(),
            warm: false,
        };
        let mut host = Self {
            child,
            socket: ours,
            scratch,
            next: 1,
            generous: true,
            ready,
        };
        let Report::Ready(ready) = host.report() else {
            panic!("the first report is Ready")
        };
        host.ready = ready;
        host
    }

    pub fn send(&mut self, frame: &Frame) {
        let mut bytes = frame.header().encode().to_vec();
        bytes.extend(&frame.payload);
        self.socket.write_all(&bytes).unwrap();
    }

    pub fn receive(&mut self) -> Frame {
        let mut bytes = [0; HEADER];
        self.socket.read_exact(&mut bytes).unwrap();
        let header = Header::decode(bytes).unwrap();
        let mut payload = vec![0; header.len as usize];
        self.socket.read_exact(&mut payload).unwrap();
        Frame::new(header.stream, header.kind, payload)
    }

    pub fn report(&mut self) -> Report {
        loop {
            let frame = self.receive();
            if frame.stream == CONTROL {
                assert_eq!(frame.kind, Kind::Report);
                return serde_json::from_slice(&frame.payload).unwrap();
            }
        }
    }

    pub fn order(&mut self, order: &Order) -> Report {
        self.send(&Frame::json(CONTROL, Kind::Order, order).unwrap());
        self.report()
    }

    /// Starts a command; its stream.
    pub fn start(
        &mut self,
        language: Language,
        code: &str,
        timeout_ms: u64,
        env: &[(&str, &str)],
    ) -> u32 {
        let stream = self.next;
        self.next += 1;
        let env: BTreeMap<String, String> = env
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect();
        let mut execute = Execute {
            language,
            code_len: code.len() as u64,
            code: Some(code.into()),
            timeout_ms,
            env,
            context: None,
            live: false,
        };
        if code.len() > 32 * 1024 {
            execute.code = None;
        }
        let sent = execute.code.is_some();
        self.send(&Frame::json(stream, Kind::Open, &Open::Execute(execute)).unwrap());
        if !sent {
            for part in code.as_bytes().chunks(50_000) {
                self.send(&Frame::new(stream, Kind::Stdin, part.to_vec()));
            }
        }
        stream
    }

    /// Starts a command in a context, or one that is watched; its stream.
    pub fn begin(
        &mut self,
        language: Language,
        code: &str,
        context: Option<&str>,
        live: bool,
    ) -> u32 {
        let stream = self.next;
        self.next += 1;
        let execute = Execute {
            language,
            code_len: 0,
            code: Some(code.into()),
            timeout_ms: 20_000,
            env: BTreeMap::new(),
            context: context.map(str::to_owned),
            live,
        };
        self.send(&Frame::json(stream, Kind::Open, &Open::Execute(execute)).unwrap());
        stream
    }

    pub fn signal(&mut self, stream: u32, signal: Signal) {
        self.send(&Frame::json(stream, Kind::Signal, &signal).unwrap());
    }

    pub fn finish(&mut self, stream: u32) -> Outcome {
        let (mut stdout, mut stderr, mut rich) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            let frame = self.receive();
            if frame.stream != stream {
                continue;
            }
            match frame.kind {
                Kind::Stdout => stdout.extend(&frame.payload),
                Kind::Stderr => stderr.extend(&frame.payload),
                Kind::Rich => rich.extend(&frame.payload),
                Kind::Exit => {
                    let exit = serde_json::from_slice(&frame.payload).unwrap();
                    return Outcome {
                        stdout,
                        stderr,
                        rich,
                        exit,
                    };
                }
                _ => continue,
            }
            if self.generous {
                self.send(&Frame::credit(stream, frame.payload.len() as u32));
            }
        }
    }

    pub fn run(&mut self, language: Language, code: &str) -> Outcome {
        let stream = self.start(language, code, 20_000, &[]);
        self.finish(stream)
    }

    /// Processor time of the agent so far, in hundredths of a second.
    pub fn agent_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
        fields
            .skip(11)
            .take(2)
            .map(|field| field.parse::<u64>().unwrap())
            .sum()
    }

    /// Processes that the agent has started and not taken leave of.
    pub fn children(&self) -> Vec<u32> {
        let agent = self.child.id();
        let path = format!("/proc/{agent}/task/{agent}/children");
        let children = std::fs::read_to_string(path).unwrap();
        let numbers = children.split_whitespace();
        numbers.map(|number| number.parse().unwrap()).collect()
    }

    pub fn python(&mut self, code: &str) -> Outcome {
        self.run(Language::Python, code)
    }

    pub fn bash(&mut self, code: &str) -> Outcome {
        self.run(Language::Bash, code)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The agent ends when its wire does.
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
        self.child.wait().unwrap();
        // Its interpreters end a moment later, and the shell writes its state down at that.
        for _ in 0..100 {
            if std::fs::remove_dir_all(&self.scratch).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
