//! Listens, keeps connections within their limits, and drains.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;

use super::app::App;
use super::pulse::{Pulse, Watched, Weighed};
use super::reply::guarded;
use crate::config::ServerConfig;

/// HTTP/2 requests that one connection may have open.
const MOST_STREAMS: u32 = 128;

/// Pause after `accept` fails for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How often a connection's age is looked at: a quarter of the shortest limit would do.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// A bound server.
pub struct Server {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    address: SocketAddr,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Binds the address and loads the certificate, so that what is wrong with them shows before
    /// anything else starts.
    ///
    /// # Errors
    /// The address is taken or not ours; the certificate cannot be used.
    pub async fn bind(config: &ServerConfig) -> anyhow::Result<Self> {
        let tls = super::tls::acceptor(config)?;
        let listener = TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("cannot listen on {}", config.listen))?;
        let address = listener.local_addr()?;
        Ok(Self {
            listener,
            tls,
            address,
        })
    }

    /// As a client writes it.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Serves until `stop` says so, then takes no more connections, lets requests in flight finish and returns
    /// when all connections are gone. The caller bounds that time.
    pub async fn serve(self, app: Arc<App>, mut stop: watch::Receiver<bool>) {
        let config = app.config.server.clone();
        let slots = Arc::new(Semaphore::new(config.max_connections));
        let builder = Arc::new(builder(&config));
        // Every connection holds a sender; when all are gone, so are the connections.
        let (alive, mut all_gone) = mpsc::channel::<()>(1);
        let stopping = stop.clone();
        loop {
            // Beyond the cap, connections wait in the kernel's backlog.
            let slot = tokio::select! {
                slot = slots.clone().acquire_owned() => slot,
                () = stopped(&mut stop) => break,
            };
            let Ok(slot) = slot else { break };
            let stream = tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
                () = stopped(&mut stop) => break,
            };
            let connection = Connection {
                app: app.clone(),
                builder: builder.clone(),
                config: config.clone(),
                stop: stopping.clone(),
            };
            let (tls, alive) = (self.tls.clone(), alive.clone());
            tokio::spawn(async move {
                connection.run(stream, tls).await;
                drop((slot, alive));
            });
        }
        drop((self.listener, alive));
        // Nothing is ever sent: this waits for the senders to be dropped.
        while all_gone.recv().await.is_some() {}
    }
}

/// Resolves when the server is to stop. A sender that is gone means the same.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}

fn builder(config: &ServerConfig) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // hyper runs this timer between requests, too, so it is the idle limit here; slow heads
        // are seen by `Pulse`.
        .header_read_timeout(Duration::from_secs(config.idle_timeout_s))
        .max_buf_size(config.max_header_bytes.max(8192));
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MOST_STREAMS)
        .max_header_list_size(u32::try_from(config.max_header_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(Duration::from_secs(config.idle_timeout_s.div_ceil(2)))
        .keep_alive_timeout(Duration::from_secs(config.header_timeout_s));
    builder
}

struct Connection {
    app: Arc<App>,
    builder: Arc<Builder<TokioExecutor>>,
    config: ServerConfig,
    stop: watch::Receiver<bool>,
}

impl Connection {
    async fn run(self, stream: TcpStream, tls: Option<TlsAcceptor>) {
        // Without it, small replies wait for the peer's delayed acknowledgement: 40 ms.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        self.app.metrics.connections.inc();
        let pulse = Arc::new(Pulse::new());
        let stream = Weighed::new(stream, pulse.clone());
        match tls {
            None => self.serve(stream, pulse).await,
            Some(tls) => {
                let most = Duration::from_secs(self.config.handshake_timeout_s);
                match tokio::time::timeout(most, tls.accept(stream)).await {
                    Ok(Ok(stream)) => {
                        pulse.owes_head();
                        self.serve(stream, pulse).await;
                    }
                    Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                    Err(_) => {
                        self.app.metrics.cut.inc();
                        tracing::debug!("a TLS handshake took too long");
                    }
                }
            }
        }
        self.app.metrics.connections.dec();
    }

    async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        &self,
        stream: S,
        pulse: Arc<Pulse>,
    ) {
        let (app, beat) = (self.app.clone(), pulse.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            let app = app.clone();
            let busy = beat.busy();
            async move {
                let reply = app.answer(request).await;
                // A stream keeps its connection from being idle.
                Ok::<_, Infallible>(guarded(reply, busy))
            }
        });
        let io = TokioIo::new(Watched::new(stream, pulse.clone()));
        let mut connection =
            std::pin::pin!(self.builder.serve_connection_with_upgrades(io, service));
        let mut stop = self.stop.clone();
        let mut stopping = false;
        let mut tick = tokio::time::interval(WATCH_EVERY);
        let head = Duration::from_secs(self.config.header_timeout_s);
        let idle = Duration::from_secs(self.config.idle_timeout_s);
        loop {
            tokio::select! {
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection ended");
                    }
                    return;
                }
                () = stopped(&mut stop), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                _ = tick.tick() => {
                    if pulse.head_for() > head {
                        self.app.metrics.cut.inc();
                        tracing::debug!("a request's head took too long");
                        return;
                    }
                    pulse.look();
                    // What was asked to end by itself, being idle, and cannot, waits for a peer that lets
                    // nothing of an HTTP/2 answer through.
                    if pulse.blocked_for() > idle || pulse.idle_for() > idle * 2 {
                        self.app.metrics.cut.inc();
                        tracing::debug!("a peer takes nothing of its answer");
                        return;
                    }
                    if !stopping && pulse.idle_for() > idle {
                        stopping = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        }
    }
}

/// Marks the server as going down, so that health checks fail and long polls return.
pub fn begin_drain(app: &App) {
    app.draining.store(true, Ordering::Relaxed);
}
