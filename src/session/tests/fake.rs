//! VMs that obey a small script instead of a guest.
//!
//! A command's words: `say X` writes X; `err X` writes to stderr; `count` writes how many
//! commands this VM has had; `sleep MS` sleeps and ends with 130 when interrupted; `deaf MS` only heeds a kill, which
//! takes the interpreter's state with it; `stuck` heeds nothing; `pass` does nothing; `die` ends the VM; `exit N` ends with N. Words are separated by `;`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use thaw_wire::message::{Execute, Exit, Process, Renew, Signal};
use tokio::sync::{mpsc, watch};

use super::super::line::lock;
use crate::layers::tests::{base, frost};
use crate::layers::{Frost, Layers};

use super::super::vm::{Channel, Frozen, Input, Run, RunEvent, Shape, Vm, VmFigures, VmSource};

/// What the source is told to do, and what it has done.
#[derive(Debug, Default)]
pub struct Source {
    pub tries: AtomicUsize,
    pub failing: Mutex<Option<String>>,
    /// So many of the next VMs will not renew.
    pub liars: AtomicUsize,
    pub restore_takes: Mutex<Duration>,
    pub vms: Mutex<Vec<Arc<Guest>>>,
    pub shapes: Mutex<Vec<Shape>>,
}

impl Source {
    pub fn started(&self) -> usize {
        lock(&self.vms).len()
    }

    pub fn ended(&self) -> usize {
        let vms = lock(&self.vms);
        vms.iter().filter(|vm| *vm.ended.borrow()).count()
    }

    pub fn vm(&self, n: usize) -> Arc<Guest> {
        lock(&self.vms)[n].clone()
    }
}

impl VmSource for Source {
    fn prepare(&self, _: Shape) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn start(&self, shape: Shape, generation: u64) -> BoxFuture<'_, anyhow::Result<Arc<dyn Vm>>> {
        Box::pin(async move {
            self.tries.fetch_add(1, Ordering::SeqCst);
            let takes = *lock(&self.restore_takes);
            tokio::time::sleep(takes).await;
            if let Some(reason) = lock(&self.failing).clone() {
                anyhow::bail!(reason);
            }
            let take_one = |left: usize| left.checked_sub(1);
            let liars = &self.liars;
            let lies = liars.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take_one);
            let guest = Arc::new(Guest {
                generation,
                lies: lies.is_ok(),
                renewed: Mutex::default(),
                commands: AtomicUsize::new(0),
                died: watch::Sender::new(None),
                ended: watch::Sender::new(false),
            });
            lock(&self.vms).push(guest.clone());
            lock(&self.shapes).push(shape);
            Ok(guest as Arc<dyn Vm>)
        })
    }

    fn restore<'a>(
        &'a self,
        frozen: &'a Frozen,
        generation: u64,
    ) -> BoxFuture<'a, anyhow::Result<Arc<dyn Vm>>> {
        self.start(frozen.shape, generation)
    }
}

#[derive(Debug)]
pub struct Guest {
    generation: u64,
    lies: bool,
    pub renewed: Mutex<Option<Renew>>,
    commands: AtomicUsize,
    died: watch::Sender<Option<String>>,
    pub ended: watch::Sender<bool>,
}

impl Guest {
    pub fn die(&self, reason: &str) {
        self.died.send_replace(Some(reason.to_owned()));
    }
}

impl Vm for Guest {
    fn renew(&self, renew: Renew) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move {
            anyhow::ensure!(!self.lies, "the seed was not confirmed");
            assert_eq!(renew.generation, self.generation);
            lock(&self.renewed).replace(renew);
            Ok(())
        })
    }

    fn execute(&self, command: Execute) -> BoxFuture<'_, anyhow::Result<Box<dyn Run>>> {
        let count = self.commands.fetch_add(1, Ordering::SeqCst) + 1;
        Box::pin(async move {
            assert!(lock(&self.renewed).is_some(), "a command before renewal");
            anyhow::ensure!(self.died.borrow().is_none(), "the socket is closed");
            let (tell, events) = mpsc::unbounded_channel();
            let (signals, heard) = mpsc::unbounded_channel();
            let (died, mut ended) = (self.died.clone(), self.ended.subscribe());
            tokio::spawn(async move {
                let script = command.code.unwrap_or_default();
                let plays = play(&script, count, &tell, heard, &died);
                tokio::select! {
                    _ = plays => {}
                    _ = ended.wait_for(|ended| *ended) => {
                        drop(tell.send(RunEvent::Died("the socket closed".into())));
                    }
                }
            });
            Ok(Box::new(Playing { events, signals }) as Box<dyn Run>)
        })
    }

    fn freeze(&self) -> BoxFuture<'_, anyhow::Result<Frost>> {
        Box::pin(async move {
            anyhow::ensure!(self.died.borrow().is_none(), "the socket is closed");
            let origin = Arc::new(Layers::whole(base(8))?);
            Ok(frost(&origin, &[(3, 77)]))
        })
    }

    fn figures(&self) -> BoxFuture<'_, anyhow::Result<VmFigures>> {
        Box::pin(async {
            Ok(VmFigures {
                cpu: Duration::from_millis(5),
                memory_bytes: 4096,
            })
        })
    }

    /// Whatever is to run is `cat`, ended by its input's end, a signal or the VM's death.
    fn open(&self, _: Process) -> BoxFuture<'_, anyhow::Result<Channel>> {
        let (tell, events) = mpsc::unbounded_channel();
        let (signals, _) = mpsc::unbounded_channel();
        Box::pin(async move {
            anyhow::ensure!(self.died.borrow().is_none(), "the socket is closed");
            Ok(Channel {
                output: Box::new(Playing { events, signals }),
                input: Arc::new(Cat(tell)),
            })
        })
    }

    fn set_share(&self, _: u32) {}

    fn died(&self) -> BoxFuture<'static, String> {
        let mut died = self.died.subscribe();
        Box::pin(async move {
            if let Ok(reason) = died.wait_for(Option::is_some).await {
                return reason.clone().unwrap();
            }
            std::future::pending().await
        })
    }

    fn end(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(3)).await;
            assert!(!self.ended.send_replace(true), "ended twice");
        })
    }
}

type Tell = mpsc::UnboundedSender<RunEvent>;

async fn play(
    script: &str,
    count: usize,
    tell: &Tell,
    mut heard: mpsc::UnboundedReceiver<Signal>,
    died: &watch::Sender<Option<String>>,
) {
    let send = |event| drop(tell.send(event));
    let exit = |exit_code| {
        send(RunEvent::Exit(Exit {
            exit_code,
            ..Exit::default()
        }));
    };
    for step in script.split(';') {
        let (word, rest) = step.trim().split_once(' ').unwrap_or((step.trim(), ""));
        let ms = Duration::from_millis(rest.parse().unwrap_or(0));
        match word {
            "say" => send(RunEvent::Stdout(rest.into())),
            "err" => send(RunEvent::Stderr(rest.into())),
            "count" => send(RunEvent::Stdout(count.to_string().into())),
            "exit" => return exit(rest.parse().unwrap()),
            "sleep" => tokio::select! {
                () = tokio::time::sleep(ms) => {}
                Some(_) = heard.recv() => return exit(130),
            },
            "deaf" => {
                let until = tokio::time::Instant::now() + ms;
                while let Ok(Some(signal)) = tokio::time::timeout_at(until, heard.recv()).await {
                    if signal == Signal::Kill {
                        return send(RunEvent::Exit(Exit {
                            exit_code: 137,
                            state_lost: true,
                            ..Exit::default()
                        }));
                    }
                }
            }
            "stuck" => std::future::pending().await,
            "pass" => {}
            "die" => {
                died.send_replace(Some("kernel panic".into()));
                return send(RunEvent::Died("kernel panic".into()));
            }
            _ => panic!("no such word: {word}"),
        }
    }
    exit(0);
}

#[derive(Debug)]
struct Cat(Tell);

impl Input for Cat {
    fn write(&self, bytes: bytes::Bytes) -> BoxFuture<'_, anyhow::Result<()>> {
        let sent = self.0.send(RunEvent::Stdout(bytes.to_vec()));
        Box::pin(async move { Ok(sent?) })
    }

    fn finish(&self) -> anyhow::Result<()> {
        Ok(self.0.send(RunEvent::Exit(Exit::default()))?)
    }

    fn signal(&self, _: Signal) -> anyhow::Result<()> {
        let exit_code = 137;
        Ok(self.0.send(RunEvent::Exit(Exit {
            exit_code,
            ..Exit::default()
        }))?)
    }
}

#[derive(Debug)]
struct Playing {
    events: mpsc::UnboundedReceiver<RunEvent>,
    signals: mpsc::UnboundedSender<Signal>,
}

impl Run for Playing {
    fn next(&mut self) -> BoxFuture<'_, RunEvent> {
        Box::pin(async {
            let gone = || RunEvent::Died("the fake went away".into());
            self.events.recv().await.unwrap_or_else(gone)
        })
    }

    fn signal(&mut self, signal: Signal) -> BoxFuture<'_, anyhow::Result<()>> {
        let sent = self.signals.send(signal);
        Box::pin(async move { Ok(sent?) })
    }
}
