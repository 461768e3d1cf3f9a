//! The socket to a worker: frames out in order, frames in to whoever waits for them.
//!
//! Sending never waits: what the socket does not take at once is written by the link's own
//! task. So a sender may be dropped at any point without leaving half a frame behind.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use thaw_vmm::protocol::{Cause, Death, Order, Report};
use thaw_wire::frame::{CONTROL, Frame, HEADER, Header, Kind};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, watch};

use super::WorkerError;
use super::running::{Event, Inbox};

/// Reports that may wait for whoever ordered something. An honest worker has two at most.
const MAX_REPORTS: usize = 16;

/// Bytes that may wait for the socket. Orders are small and input spends credit, so this is
/// reached only if a worker stops reading; it is ended then.
const MAX_OUTGOING: usize = 8 * 1024 * 1024;

/// Bytes read at once. Each worker has a buffer of it, and most messages are small.
const READ: usize = 16 * 1024;

/// Bytes and the descriptors that go with the first of them.
#[derive(Debug)]
struct Segment {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

#[derive(Debug, Default)]
struct Outgoing {
    segments: VecDeque<Segment>,
    bytes: usize,
}

#[derive(Debug, Default)]
struct Streams {
    /// The last number given out.
    last: u32,
    open: HashMap<u32, Inbox>,
}

/// One worker's socket.
#[derive(Debug)]
pub(super) struct Link {
    socket: UnixStream,
    outgoing: Mutex<Outgoing>,
    /// Something waits in `outgoing`.
    waiting: Notify,
    streams: Mutex<Streams>,
    death: watch::Sender<Option<Death>>,
}

/// Answers to orders.
#[derive(Debug)]
pub(super) struct Reports {
    incoming: mpsc::Receiver<Report>,
    death: watch::Receiver<Option<Death>>,
}

impl Reports {
    /// Throws away what has arrived.
    pub(super) fn forget(&mut self) {
        while self.incoming.try_recv().is_ok() {}
    }

    /// The next report, within `limit`.
    pub(super) async fn next(
        &mut self,
        order: &'static str,
        limit: Duration,
    ) -> Result<Report, WorkerError> {
        match tokio::time::timeout(limit, self.incoming.recv()).await {
            Ok(Some(Report::Died(death))) => Err(WorkerError::Died(death)),
            Ok(Some(report)) => Ok(report),
            Ok(None) => Err(WorkerError::Died(
                self.death.borrow().clone().unwrap_or_else(lost),
            )),
            Err(_) => Err(WorkerError::Silent { order, limit }),
        }
    }
}

/// What is known of a worker whose socket closed without a word.
fn lost() -> Death {
    Death {
        cause: Cause::Worker,
        detail: "the worker process ended without a word (killed, or out of memory)".to_owned(),
        console: String::new(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these locks guard is whole between any two statements that could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    /// Takes the socket over and starts to read it.
    pub(super) fn open(socket: std::os::unix::net::UnixStream) -> io::Result<(Arc<Self>, Reports)> {
        socket.set_nonblocking(true)?;
        let (death, watch) = watch::channel(None);
        let (reports, incoming) = mpsc::channel(MAX_REPORTS);
        let link = Arc::new(Self {
            socket: UnixStream::from_std(socket)?,
            outgoing: Mutex::default(),
            waiting: Notify::new(),
            streams: Mutex::default(),
            death,
        });
        // The task ends with the process: a worker that is not needed any more is killed.
        tokio::spawn(serve(link.clone(), reports));
        Ok((
            link,
            Reports {
                incoming,
                death: watch,
            },
        ))
    }

    /// Why the worker ended, once it has.
    pub(super) fn died(&self) -> impl Future<Output = Death> + Send + 'static {
        let mut death = self.death.subscribe();
        async move {
            match death.wait_for(Option::is_some).await {
                Ok(death) => death.clone().unwrap_or_else(lost),
                Err(_) => lost(),
            }
        }
    }

    fn ended(&self) -> Option<Death> {
        self.death.borrow().clone()
    }

    /// Sends an order and its descriptors.
    pub(super) fn order(&self, order: &Order, fds: Vec<OwnedFd>) -> Result<(), WorkerError> {
        self.send(&Frame::json(CONTROL, Kind::Order, order)?, fds)
    }

    /// Sends one frame.
    pub(super) fn send(&self, frame: &Frame, fds: Vec<OwnedFd>) -> Result<(), WorkerError> {
        if let Some(death) = self.ended() {
            return Err(WorkerError::Died(death));
        }
        let mut bytes = Vec::with_capacity(HEADER + frame.payload.len());
        bytes.extend_from_slice(&frame.header().encode());
        bytes.extend_from_slice(&frame.payload);
        let mut outgoing = lock(&self.outgoing);
        if outgoing.bytes + bytes.len() > MAX_OUTGOING {
            return Err(WorkerError::Died(Death {
                cause: Cause::Unresponsive,
                detail: format!("the worker left {MAX_OUTGOING} bytes unread"),
                console: String::new(),
            }));
        }
        outgoing.bytes += bytes.len();
        outgoing.segments.push_back(Segment {
            bytes,
            sent: 0,
            fds,
        });
        // Directly in the usual case: no other task need wake for it.
        match self.flush(&mut outgoing) {
            Ok(true) => {}
            // The link's task writes on, or meets the same error and ends the link.
            Ok(false) | Err(_) => self.waiting.notify_one(),
        }
        Ok(())
    }

    /// Writes what the socket takes; `true` when nothing is left.
    fn flush(&self, outgoing: &mut Outgoing) -> io::Result<bool> {
        while let Some(segment) = outgoing.segments.front_mut() {
            let result = self.socket.try_io(Interest::WRITABLE, || {
                let fds: Vec<i32> = segment.fds.iter().map(AsRawFd::as_raw_fd).collect();
                let rights = [ControlMessage::ScmRights(&fds)];
                let parts = [IoSlice::new(&segment.bytes[segment.sent..])];
                let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                Ok(sendmsg::<()>(
                    self.socket.as_raw_fd(),
                    &parts,
                    control,
                    flags,
                    None,
                )?)
            });
            match result {
                Ok(sent) => {
                    segment.sent += sent;
                    // They went with the first byte.
                    segment.fds.clear();
                    if segment.sent == segment.bytes.len() {
                        outgoing.bytes -= segment.bytes.len();
                        outgoing.segments.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Opens a stream. Frames for it go to the receiver; the last value tells of room for input.
    pub(super) fn open_stream(
        &self,
    ) -> Result<(u32, mpsc::UnboundedReceiver<Event>, Arc<Notify>), WorkerError> {
        // What can wait in the channel is bounded by the credit that the receiver grants.
        let (events, receiver) = mpsc::unbounded_channel();
        let mut streams = lock(&self.streams);
        // Checked under the lock under which the end empties the table: no stream is left behind.
        if let Some(death) = self.ended() {
            return Err(WorkerError::Died(death));
        }
        loop {
            streams.last = streams.last.wrapping_add(1);
            let stream = streams.last;
            if stream != CONTROL && !streams.open.contains_key(&stream) {
                let inbox = Inbox::new(events);
                let room = inbox.room();
                streams.open.insert(stream, inbox);
                return Ok((stream, receiver, room));
            }
        }
    }

    /// Sends as much of a stream's input as the guest has granted credit for.
    ///
    /// The streams stay locked until the pieces are in the socket's queue. The stream's opener and the
    /// link's task both come here, and pieces taken in one order but queued in the other would
    /// reach the guest as a text that nobody wrote.
    pub(super) fn pump(&self, stream: u32, mut grant: u32) -> Result<(), WorkerError> {
        let mut streams = lock(&self.streams);
        let Some(inbox) = streams.open.get_mut(&stream) else {
            return Ok(());
        };
        while let Some(chunk) = inbox.next_chunk(std::mem::take(&mut grant)) {
            self.send(&Frame::new(stream, Kind::Stdin, chunk), Vec::new())?;
        }
        Ok(())
    }

    /// Adds to a stream's input. A stream that has ended takes it and forgets it.
    pub(super) fn feed(&self, stream: u32, bytes: Bytes) -> Result<(), WorkerError> {
        if let Some(inbox) = lock(&self.streams).open.get_mut(&stream) {
            inbox.push(bytes);
        }
        self.pump(stream, 0)
    }

    /// Ends a stream's input.
    pub(super) fn finish_input(&self, stream: u32) -> Result<(), WorkerError> {
        if let Some(inbox) = lock(&self.streams).open.get_mut(&stream) {
            inbox.end();
        }
        self.pump(stream, 0)
    }

    /// Bytes of input that wait for credit; `None` when the stream has ended.
    pub(super) fn waiting_input(&self, stream: u32) -> Option<usize> {
        lock(&self.streams).open.get(&stream).map(Inbox::waiting)
    }

    /// Why a stream that is gone takes nothing.
    pub(super) fn why_closed(&self) -> Death {
        self.ended().unwrap_or_else(|| Death {
            cause: Cause::Worker,
            detail: "the process has ended".to_owned(),
            console: String::new(),
        })
    }

    fn take(&self, frame: Frame, reports: &mpsc::Sender<Report>) -> Result<(), String> {
        let breach = |what: &str| Err(format!("the worker sent {what}"));
        if frame.stream == CONTROL {
            if frame.kind != Kind::Report {
                return breach("something that is no report on the control stream");
            }
            let report = serde_json::from_slice(&frame.payload)
                .map_err(|error| format!("bad report: {error}"))?;
            if let Report::Died(death) = &report {
                self.death.send_if_modified(|known| {
                    known.is_none() && known.replace(death.clone()).is_none()
                });
            }
            return reports
                .try_send(report)
                .map_err(|_| "reports that nobody asked for".to_owned());
        }
        let event = match frame.kind {
            Kind::Stdout => Event::Stdout(frame.payload),
            Kind::Stderr => Event::Stderr(frame.payload),
            Kind::Rich => Event::Rich(frame.payload),
            Kind::Exit => match serde_json::from_slice(&frame.payload) {
                Ok(exit) => Event::Exit(exit),
                Err(error) => return Err(format!("bad exit: {error}")),
            },
            Kind::Credit => {
                let bytes = frame
                    .payload
                    .try_into()
                    .map_err(|_| "a credit of the wrong length".to_owned())?;
                return self
                    .pump(frame.stream, u32::from_le_bytes(bytes))
                    .map_err(|error| error.to_string());
            }
            _ => return breach("a frame that only `serve` may send"),
        };
        let mut streams = lock(&self.streams);
        let last = matches!(event, Event::Exit(_));
        // A stream whose receiver is gone is drained to its end and forgotten.
        if let Some(inbox) = streams.open.get(&frame.stream) {
            let bytes = event.bytes();
            if inbox.events.send(event).is_err() && bytes > 0 && !last {
                drop(streams);
                let credit = Frame::credit(frame.stream, bytes);
                return self
                    .send(&credit, Vec::new())
                    .map_err(|error| error.to_string());
            }
        }
        if last && let Some(inbox) = streams.open.remove(&frame.stream) {
            inbox.close();
        }
        Ok(())
    }

    fn end(&self, death: Death) {
        self.death
            .send_if_modified(|known| known.is_none() && known.replace(death).is_none());
        let known = self.ended().unwrap_or_else(lost);
        for (_, inbox) in lock(&self.streams).open.drain() {
            inbox.close();
            if inbox.events.send(Event::Died(known.clone())).is_err() {
                // Its command is of no interest to anybody any more.
            }
        }
    }
}

/// Reads and writes until the socket closes.
async fn serve(link: Arc<Link>, reports: mpsc::Sender<Report>) {
    let reason = tokio::select! {
        reason = read(&link, &reports) => reason,
        reason = write(&link) => reason,
    };
    link.end(Death {
        cause: Cause::Worker,
        detail: reason,
        console: String::new(),
    });
}

async fn write(link: &Link) -> String {
    loop {
        link.waiting.notified().await;
        loop {
            if let Err(error) = link.socket.writable().await {
                return format!("the worker's socket failed: {error}");
            }
            match link.flush(&mut lock(&link.outgoing)) {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => return format!("the worker does not take orders: {error}"),
            }
        }
    }
}

async fn read(link: &Link, reports: &mpsc::Sender<Report>) -> String {
    let mut buffer: Vec<u8> = Vec::new();
    let mut chunk = vec![0; READ];
    loop {
        if let Err(error) = link.socket.readable().await {
            return format!("the worker's socket failed: {error}");
        }
        match link.socket.try_read(&mut chunk) {
            Ok(0) => return lost().detail,
            Ok(count) => buffer.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return format!("the worker's socket failed: {error}"),
        }
        let mut parsed = 0;
        while let Some((header, rest)) = buffer[parsed..].split_first_chunk::<HEADER>() {
            let header = match Header::decode(*header) {
                Ok(header) => header,
                Err(error) => return format!("the worker broke the protocol: {error}"),
            };
            let Some(payload) = rest.get(..header.len as usize) else {
                break;
            };
            let frame = Frame {
                stream: header.stream,
                kind: header.kind,
                payload: payload.to_vec(),
            };
            parsed += HEADER + payload.len();
            if let Err(breach) = link.take(frame, reports) {
                return breach;
            }
        }
        buffer.drain(..parsed);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use thaw_wire::frame::INITIAL_CREDIT;

    use super::*;

    /// The payloads of the next frames on the guest's end, up to `bytes` of them.
    fn received(peer: &mut std::os::unix::net::UnixStream, bytes: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < bytes {
            let mut header = [0; HEADER];
            peer.read_exact(&mut header).unwrap();
            let mut payload = vec![0; Header::decode(header).unwrap().len as usize];
            peer.read_exact(&mut payload).unwrap();
            all.extend(payload);
        }
        all
    }

    /// The command's opener and the link's task pump at the same time; the text must not care.
    #[tokio::test(flavor = "multi_thread")]
    async fn input_arrives_in_order_whoever_sends_it() {
        let window = INITIAL_CREDIT as usize;
        let text: Vec<u8> = (0..4 * window).map(|n| (n / 1000) as u8).collect();
        for _ in 0..200 {
            let (ours, mut peer) = std::os::unix::net::UnixStream::pair().unwrap();
            let (link, _reports) = Link::open(ours).unwrap();
            let (stream, _events, _room) = link.open_stream().unwrap();
            lock(&link.streams)
                .open
                .get_mut(&stream)
                .unwrap()
                .push(text.clone().into());
            let reader = {
                let bytes = text.len();
                std::thread::spawn(move || received(&mut peer, bytes))
            };
            let pumps: Vec<_> = (0..4)
                .map(|_| {
                    let link = link.clone();
                    std::thread::spawn(move || link.pump(stream, INITIAL_CREDIT).unwrap())
                })
                .collect();
            for pump in pumps {
                pump.join().unwrap();
            }
            let arrived = tokio::task::spawn_blocking(|| reader.join().unwrap()).await;
            assert!(arrived.unwrap() == text, "pieces were swapped");
        }
    }
}
