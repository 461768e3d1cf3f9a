//! Saying things to `serve`.

use std::io;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::AsRawFd;
use thaw_wire::frame::{CONTROL, Frame, Kind};

use super::End;
use super::socket::Socket;
use crate::protocol::{Cause, Report};

/// How long a dying worker waits for `serve` to take its last words.
const PATIENCE: Duration = Duration::from_secs(1);

/// Queues a report.
///
/// # Errors
/// It is longer than a frame.
pub(super) fn say(socket: &mut Socket, report: &Report) -> Result<(), End> {
    let frame = Frame::json(CONTROL, Kind::Report, report)
        .map_err(|error| End::Died(Cause::Worker, format!("a report cannot be sent: {error}")))?;
    socket.queue(&frame);
    Ok(())
}

/// Sends the last report and closes the connection, however the other end behaves.
///
/// # Errors
/// The other end did not take it in time.
pub(super) fn last_words(socket: &mut Socket, report: &Report) -> io::Result<()> {
    let frame = Frame::json(CONTROL, Kind::Report, report)?;
    socket.queue(&frame);
    let until = Instant::now() + PATIENCE;
    loop {
        socket.flush().map_err(io::Error::other)?;
        if !socket.is_clogged() {
            break;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match nix::poll::poll(&mut [PollFd::new(socket.fd(), PollFlags::POLLOUT)], wait) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    shutdown(socket.fd().as_raw_fd(), Shutdown::Both)?;
    Ok(())
}
