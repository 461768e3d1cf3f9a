//! What hyper does not tell: since when a connection has been idle, since when its peer has been sending a
//! request's head, and since when it has taken nothing of its answers.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// No head is being read.
const NONE: u64 = u64::MAX;

/// Bytes in a second that are no progress: HTTP/2's pings and farewells, which go on while an answer is stuck.
const CONTROL: u64 = 256;

/// First bytes of an HTTP/2 connection. Its peers send frames between requests, so that
/// "bytes but no request yet" says nothing there; hyper's own keep-alive pings watch those.
const HTTP2: &[u8] = b"PRI ";

/// One connection's times, in milliseconds since it was opened.
#[derive(Debug)]
pub(super) struct Pulse {
    opened: Instant,
    busy: AtomicUsize,
    last: AtomicU64,
    head_since: AtomicU64,
    blocked_since: AtomicU64,
    /// Bytes that the peer has taken, and how many there were at the last look.
    written: AtomicU64,
    looked: AtomicU64,
}

impl Pulse {
    /// A fresh connection owes a head from the start.
    pub(super) fn new() -> Self {
        Self {
            opened: Instant::now(),
            busy: AtomicUsize::new(0),
            last: AtomicU64::new(0),
            head_since: AtomicU64::new(0),
            blocked_since: AtomicU64::new(NONE),
            written: AtomicU64::new(0),
            looked: AtomicU64::new(0),
        }
    }

    fn now(&self) -> u64 {
        self.opened.elapsed().as_millis() as u64
    }

    /// The peer can send a head from now on.
    pub(super) fn owes_head(&self) {
        self.head_since.store(self.now(), Ordering::Relaxed);
    }

    /// A request's head has come whole. The guard's drop is its answer.
    pub(super) fn busy(self: &Arc<Self>) -> Busy {
        self.head_since.store(NONE, Ordering::Relaxed);
        self.busy.fetch_add(1, Ordering::Relaxed);
        Busy {
            pulse: self.clone(),
            counts: true,
        }
    }

    /// How long the peer has been sending a head.
    pub(super) fn head_for(&self) -> Duration {
        match self.head_since.load(Ordering::Relaxed) {
            NONE => Duration::ZERO,
            since => Duration::from_millis(self.now().saturating_sub(since)),
        }
    }

    /// How long the peer has taken nothing of what it is being sent.
    pub(super) fn blocked_for(&self) -> Duration {
        match self.blocked_since.load(Ordering::Relaxed) {
            NONE => Duration::ZERO,
            since => Duration::from_millis(self.now().saturating_sub(since)),
        }
    }

    /// Notes whether a write went through.
    fn wrote(&self, polled: &Poll<std::io::Result<usize>>) {
        if let Poll::Ready(result) = polled {
            let taken = result.as_ref().map_or(0, |taken| *taken as u64);
            self.written.fetch_add(taken, Ordering::Relaxed);
            self.blocked_since.store(NONE, Ordering::Relaxed);
        } else if self.blocked_since.load(Ordering::Relaxed) == NONE {
            self.blocked_since.store(self.now(), Ordering::Relaxed);
        }
    }

    /// To be called once a second: a peer that takes what it is sent is not idle.
    pub(super) fn look(&self) {
        let written = self.written.load(Ordering::Relaxed);
        let before = self.looked.swap(written, Ordering::Relaxed);
        if written - before > CONTROL {
            self.last.store(self.now(), Ordering::Relaxed);
        }
    }

    /// How long nothing has been asked.
    pub(super) fn idle_for(&self) -> Duration {
        if self.busy.load(Ordering::Relaxed) > 0 {
            return Duration::ZERO;
        }
        Duration::from_millis(self.now().saturating_sub(self.last.load(Ordering::Relaxed)))
    }
}

/// A request that is being answered.
#[derive(Debug)]
pub(super) struct Busy {
    pulse: Arc<Pulse>,
    counts: bool,
}

impl Busy {
    /// Whether it is this server that the peer waits for. While it is the peer that has to take what there is, the
    /// connection counts as idle.
    pub(super) fn owes(&mut self, owes: bool) {
        if self.counts == owes {
            return;
        }
        self.counts = owes;
        if owes {
            self.pulse.busy.fetch_add(1, Ordering::Relaxed);
        } else {
            self.pulse.last.store(self.pulse.now(), Ordering::Relaxed);
            self.pulse.busy.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.owes(false);
    }
}

/// A stream that tells its pulse about bytes that come.
#[derive(Debug)]
pub(super) struct Watched<S> {
    stream: S,
    pulse: Arc<Pulse>,
    http2: Option<bool>,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, pulse: Arc<Pulse>) -> Self {
        Self {
            stream,
            pulse,
            http2: None,
        }
    }

    fn note(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let http2 = *self.http2.get_or_insert_with(|| bytes.starts_with(HTTP2));
        let pulse = &self.pulse;
        if http2 {
            pulse.head_since.store(NONE, Ordering::Relaxed);
        } else if pulse.busy.load(Ordering::Relaxed) == 0
            && pulse.head_since.load(Ordering::Relaxed) == NONE
        {
            // Only the first byte after an answer starts the time.
            pulse.head_since.store(pulse.now(), Ordering::Relaxed);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.note(&buf.filled()[before..]);
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A stream that tells its pulse what the peer takes. It is the socket itself: a layer above, such as TLS, takes
/// bytes that the peer has not.
#[derive(Debug)]
pub(super) struct Weighed<S> {
    stream: S,
    pulse: Arc<Pulse>,
}

impl<S> Weighed<S> {
    pub(super) fn new(stream: S, pulse: Arc<Pulse>) -> Self {
        Self { stream, pulse }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Weighed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Weighed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.pulse.wrote(&polled);
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.pulse.wrote(&polled);
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
