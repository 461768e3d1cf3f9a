//! A worker's process: started with one end of a socket, killed and reaped off everybody's path.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use command_fds::{CommandFdExt, FdMapping};

/// The descriptor at which a worker finds its socket.
const SOCKET_FD: i32 = 3;

/// One child process.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    /// Gone once it is reaped, so that a recycled process id is never signalled.
    child: Arc<Mutex<Option<Child>>>,
}

impl Process {
    /// Starts `program vmm` and returns our end of its socket. Blocks for the fork.
    pub(super) fn start(program: &Path) -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(program);
        command
            .arg("vmm")
            // A worker needs nothing from our environment, and must not learn our secrets from it.
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Ctrl-C at a terminal is for the server, which drains before it ends its workers.
            .process_group(0)
            .fd_mappings(vec![FdMapping {
                parent_fd: OwnedFd::from(theirs),
                child_fd: SOCKET_FD,
            }])
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
        let child = command.spawn()?;
        Ok((
            Self {
                pid: child.id(),
                child: Arc::new(Mutex::new(Some(child))),
            },
            ours,
        ))
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills it and waits until it is reaped. Tearing a VM down takes the kernel milliseconds
    /// that no request should wait for: that happens on a thread for blocking work.
    pub(super) async fn end(&self) {
        let child = self.child.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || reap(&child)).await {
            tracing::error!(pid = self.pid, %error, "the thread that reaps a worker failed");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let child = self.child.clone();
        let gone = child
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_none();
        if gone {
            return;
        }
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || reap(&child))),
            Err(_) => reap(&child),
        }
    }
}

fn reap(child: &Mutex<Option<Child>>) {
    let taken = child.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(mut child) = taken else { return };
    let pid = child.id();
    // `kill` answers `Ok` for a child that has ended by itself and is not reaped yet.
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        tracing::error!(pid, %error, "a worker could not be reaped");
    }
}
