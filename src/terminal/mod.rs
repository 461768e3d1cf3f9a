//! Terminals: processes on a pseudo-terminal in a session's VM that outlive their viewers.
//!
//! A terminal's output is kept in a [`backlog`] of bounded size. A viewer that comes gets what came
//! since the last one left; while it is there, the terminal waits for it, so nothing is lost to a
//! slow connection. Without one the newest output is kept.
//!
//! A terminal sleeps with its VM and goes on with it: whoever looks at it wakes both.

mod backlog;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use anyhow::Context;
use bytes::Bytes;
use dashmap::DashMap;
use thaw_wire::message::{Process, Program, Signal, Size};
use tokio::sync::watch;

use crate::session::{
    Attendance, Attender, ProcessEvent, ProcessHandle, ProcessInput, SessionId, Sleeper, TenantId,
};
use backlog::Backlog;

/// Terminals of one session that are remembered, ended ones included; at the limit the oldest ended
/// one is forgotten. As many as a VM runs at once may be alive.
const MOST_PER_SESSION: usize = 64;

/// Exit code of a terminal whose VM ended: as if killed.
const VM_ENDED: i32 = 137;

/// A terminal's name: the client's own or minted here; 1 to 64 of `A-Z a-z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TerminalId(String);

impl TerminalId {
    /// A fresh, unguessable name.
    pub fn mint() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }

    /// Reads a client's text.
    pub fn parse(text: &str) -> Option<Self> {
        let fits = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        let is_name = (1..=64).contains(&text.len()) && text.bytes().all(fits);
        is_name.then(|| Self(text.to_owned()))
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What one terminal of this name is called in its VM. A later one of the same name is called otherwise.
    fn guest_name(&self) -> String {
        format!("{}~{}", self.0, uuid::Uuid::new_v4())
    }

    /// The name of a terminal that is called so in its VM.
    fn of_guest(name: &str) -> Option<Self> {
        let (id, _) = name.split_once('~')?;
        Self::parse(id)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these locks guard is whole between any two statements that could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a terminal is to run.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Its name.
    pub id: TerminalId,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Its first size.
    pub size: Size,
}

impl Wish {
    /// As the VM takes it.
    pub fn process(&self) -> Process {
        Process {
            program: Program::Command {
                argv: self.argv.clone(),
            },
            env: Default::default(),
            cwd: None,
            terminal: Some(self.size),
            name: Some(self.id.guest_name()),
        }
    }
}

/// One terminal.
#[derive(Debug)]
pub struct Terminal {
    /// Its name.
    pub id: TerminalId,
    /// When it was made.
    pub created_at: SystemTime,
    /// The way to it; none while its VM is suspended.
    input: watch::Sender<Option<ProcessInput>>,
    attender: Attender,
    size: Mutex<Size>,
    backlog: Backlog,
    exit: watch::Sender<Option<i32>>,
    /// Nobody knows it any more: it is to end, if need be when its VM wakes.
    is_unwanted: AtomicBool,
}

impl Terminal {
    fn new(id: TerminalId, input: Option<ProcessInput>, attender: Attender, size: Size) -> Self {
        Self {
            id,
            created_at: SystemTime::now(),
            input: watch::Sender::new(input),
            attender,
            size: Mutex::new(size),
            backlog: Backlog::default(),
            exit: watch::Sender::new(None),
            is_unwanted: AtomicBool::new(false),
        }
    }

    /// Its size.
    pub fn size(&self) -> Size {
        *lock(&self.size)
    }

    /// Gives it another size, if need be when its VM wakes.
    ///
    /// # Errors
    /// Its VM is gone.
    pub fn resize(&self, size: Size) -> anyhow::Result<()> {
        *lock(&self.size) = size;
        self.signal(Signal::Resize(size))
    }

    /// Types bytes; waits while it does not read, or its VM is suspended.
    ///
    /// # Errors
    /// It or its VM is gone.
    pub async fn write(&self, bytes: Bytes) -> anyhow::Result<()> {
        let mut input = self.input.subscribe();
        let input = input.wait_for(Option::is_some).await?.clone();
        input
            .context("a terminal without input")?
            .write(bytes)
            .await
    }

    /// Hangs up: what runs in it gets SIGHUP, and soon after a kill.
    pub fn hang_up(&self) {
        self.is_unwanted.store(true, Ordering::Release);
        if let Err(error) = self.signal(Signal::Hangup) {
            tracing::debug!("a terminal is gone already: {error:#}");
        }
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let input = self.input.borrow().clone();
        input.map_or(Ok(()), |input| input.signal(signal))
    }

    /// Its VM was suspended, and goes on.
    fn revived(&self, process: &ProcessHandle) -> anyhow::Result<()> {
        let input = process.input();
        input.signal(Signal::Resize(self.size()))?;
        if self.is_unwanted.load(Ordering::Acquire) {
            input.signal(Signal::Hangup)?;
        }
        self.input.send_replace(Some(input));
        Ok(())
    }

    /// Its exit code, once it has ended.
    pub fn exit_code(&self) -> Option<i32> {
        *self.exit.borrow()
    }

    /// Starts to view it, in the place of whoever viewed it before.
    pub fn view(self: &Arc<Self>) -> Viewer {
        Viewer {
            turn: self.backlog.attach(),
            exit: self.exit.subscribe(),
            terminal: self.clone(),
            _attendance: self.attender.attend(),
        }
    }
}

/// What a viewer sees next.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    /// Output.
    Bytes(Vec<u8>),
    /// It ended, and everything was seen.
    Exit(i32),
    /// Somebody else views it now.
    Replaced,
}

/// Somebody who looks at a terminal.
#[derive(Debug)]
pub struct Viewer {
    terminal: Arc<Terminal>,
    turn: u64,
    exit: watch::Receiver<Option<i32>>,
    /// The VM is not idle meanwhile.
    _attendance: Attendance,
}

impl Viewer {
    /// What is viewed.
    pub fn terminal(&self) -> &Arc<Terminal> {
        &self.terminal
    }

    /// What there is to see next. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Seen {
        loop {
            let changed = self.terminal.backlog.changed();
            tokio::pin!(changed);
            changed.as_mut().enable();
            // Before the backlog is looked at: output that came before the end is seen before it.
            let exit = *self.exit.borrow_and_update();
            match self.terminal.backlog.take(self.turn) {
                None => return Seen::Replaced,
                Some(bytes) if !bytes.is_empty() => return Seen::Bytes(bytes),
                Some(_) => {}
            }
            if let Some(code) = exit {
                return Seen::Exit(code);
            }
            tokio::select! {
                () = changed => {}
                changed = self.exit.changed() => if changed.is_err() {
                    return Seen::Exit(VM_ENDED);
                },
            }
        }
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        self.terminal.backlog.detach(self.turn);
    }
}

/// As [`keep`], for one of an earlier server, which sleeps.
async fn keep_sleeper(terminal: Arc<Terminal>, sleeper: Sleeper) {
    match sleeper.revive().await {
        Some(process) => {
            if let Err(error) = terminal.revived(&process) {
                tracing::debug!("a terminal did not wake: {error:#}");
            }
            keep(terminal, process).await;
        }
        None => {
            terminal.exit.send_replace(Some(VM_ENDED));
        }
    }
}

/// Reads what a terminal writes until it ends.
async fn keep(terminal: Arc<Terminal>, mut process: ProcessHandle) {
    let code = loop {
        match process.next().await {
            ProcessEvent::Stdout(bytes) | ProcessEvent::Stderr(bytes) => {
                terminal.backlog.push(&bytes).await;
            }
            ProcessEvent::Exit(exit) => {
                if let Some(note) = exit.note {
                    let line = format!("thaw: {note}\r\n");
                    terminal.backlog.push(line.as_bytes()).await;
                }
                break exit.exit_code;
            }
            ProcessEvent::Gone(note) => {
                terminal
                    .backlog
                    .push(format!("\r\n{note}\r\n").as_bytes())
                    .await;
                break VM_ENDED;
            }
            ProcessEvent::Asleep => {
                terminal.input.send_replace(None);
                match process.revive().await {
                    Some(revived) => process = revived,
                    None => break VM_ENDED,
                }
                if let Err(error) = terminal.revived(&process) {
                    tracing::debug!("a terminal did not wake: {error:#}");
                }
            }
        }
    };
    terminal.exit.send_replace(Some(code));
}

type Key = (TenantId, SessionId);

/// All terminals, by owner and session.
#[derive(Debug, Default)]
pub struct Terminals {
    // Guards are never held across an await.
    map: DashMap<Key, Vec<Arc<Terminal>>>,
}

/// Why a terminal is not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// The name is one of a terminal that runs.
    #[error("a terminal of this id runs already")]
    Taken,
    /// Too many run.
    #[error("{MOST_PER_SESSION} terminals are the most one session may have; close one")]
    TooMany,
}

impl Terminals {
    /// Takes a process in as a terminal.
    ///
    /// # Errors
    /// See [`Unfit`]; the process is killed then.
    pub fn insert(
        &self,
        tenant: &TenantId,
        session: &SessionId,
        id: TerminalId,
        size: Size,
        process: ProcessHandle,
    ) -> Result<Arc<Terminal>, Unfit> {
        let input = Some(process.input());
        let terminal = Arc::new(Terminal::new(id, input, process.attender(), size));
        {
            let mut all = self
                .map
                .entry((tenant.clone(), session.clone()))
                .or_default();
            let same = all.iter().position(|other| other.id == terminal.id);
            if let Some(at) = same {
                if all[at].exit_code().is_none() {
                    return Err(Unfit::Taken);
                }
                all.remove(at);
            }
            if all.len() >= MOST_PER_SESSION {
                let ended = all.iter().position(|other| other.exit_code().is_some());
                all.remove(ended.ok_or(Unfit::TooMany)?);
            }
            all.push(terminal.clone());
        }
        tokio::spawn(keep(terminal.clone(), process));
        Ok(terminal)
    }

    /// Takes in a terminal of a VM that an earlier server suspended. Its size is not known any more: it is a viewer's to
    /// say, and what it said before is gone.
    pub fn restore(&self, sleeper: Sleeper) {
        let Some(id) = TerminalId::of_guest(&sleeper.name) else {
            return;
        };
        let (key, attender) = (sleeper.owner(), sleeper.attender());
        let size = Size { cols: 80, rows: 24 };
        let terminal = Arc::new(Terminal::new(id, None, attender, size));
        self.map.entry(key).or_default().push(terminal.clone());
        tokio::spawn(keep_sleeper(terminal, sleeper));
    }

    /// A session's terminals, oldest first.
    pub fn list(&self, tenant: &TenantId, session: &SessionId) -> Vec<Arc<Terminal>> {
        let key = (tenant.clone(), session.clone());
        self.map
            .get(&key)
            .map(|all| all.value().clone())
            .unwrap_or_default()
    }

    /// One of a session's terminals.
    pub fn get(
        &self,
        tenant: &TenantId,
        session: &SessionId,
        id: &TerminalId,
    ) -> Option<Arc<Terminal>> {
        self.list(tenant, session)
            .into_iter()
            .find(|terminal| terminal.id == *id)
    }

    /// Forgets a terminal, and hangs it up.
    pub fn remove(
        &self,
        tenant: &TenantId,
        session: &SessionId,
        id: &TerminalId,
    ) -> Option<Arc<Terminal>> {
        let key = (tenant.clone(), session.clone());
        let removed = {
            let mut all = self.map.get_mut(&key)?;
            let at = all.iter().position(|terminal| terminal.id == *id)?;
            all.remove(at)
        };
        self.map.remove_if(&key, |_, all| all.is_empty());
        removed.hang_up();
        Some(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_fit_for_paths_and_logs() {
        assert!(TerminalId::parse("pty-1_a.B").is_some());
        for bad in ["", "a/b", "a b", "é", &"x".repeat(65)] {
            assert!(TerminalId::parse(bad).is_none(), "{bad}");
        }
        assert!(TerminalId::parse(TerminalId::mint().as_str()).is_some());
    }
}
