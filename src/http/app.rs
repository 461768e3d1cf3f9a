//! What every request can use, and the way of a request from its head to its reply.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Body as HttpBody;
use hyper::header::HeaderValue;
use hyper::http::request::Parts;
use hyper::{Request, StatusCode};
use prometheus_client::registry::Registry;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::auth::{Auth, Caller, Presented, Refusal, presented};
use super::body::Body;
use super::body::fields::Fields;
use super::error::ApiError;
use super::metrics::{Metrics, Route, Served};
use super::reply::Reply;
use super::retry::Retries;
use super::router::{Params, Router};
use crate::backend::Backend;
use crate::config::Config;
use crate::store::Store;
use crate::task::Tasks;
use crate::terminal::Terminals;
use crate::vms::Vms;

/// Bodies up to this size need no room of their own: connections are bounded, and so are these.
const SMALL_BODY: usize = 16 << 10;

/// Largest body of somebody whose key is in it: a new session's metadata and environment, escaped as JSON, fit.
/// Who is known by a header may send more.
pub const STRANGERS_BODY: usize = 256 << 10;

/// Strangers' part of the memory for bodies, which is theirs alone: they can take no room from who is known.
const STRANGERS_PART: usize = 8;

/// How long the rest of a refused request is waited for.
const DISCARD: Duration = Duration::from_secs(1);

/// What the calls about VMs, snapshots and accounts need.
#[derive(Debug)]
pub struct Control {
    /// What outlives the server.
    pub store: Store,
    /// The VMs.
    pub vms: Vms,
}

/// Memory for bodies, in KiB.
#[derive(Clone, Debug)]
struct Room {
    whole: u32,
    left: Arc<Semaphore>,
}

impl Room {
    fn new(kib: usize) -> Self {
        let kib = u32::try_from(kib.min(Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        Self {
            whole: kib,
            left: Arc::new(Semaphore::new(kib as usize)),
        }
    }

    /// Waits for room for a body. One that is larger than all the room takes all of it.
    async fn take(self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        let taken = self.left.acquire_many_owned(kib.min(self.whole));
        taken.await.ok()
    }
}

/// What the requests share.
#[derive(Debug)]
pub struct App {
    /// The configuration.
    pub config: Config,
    /// Who may use the server.
    pub auth: Arc<Auth>,
    /// The sessions.
    pub backend: Arc<dyn Backend>,
    /// The task queue.
    pub tasks: Tasks,
    /// The sessions' terminals.
    pub terminals: Terminals,
    /// Room for bodies; see [`SMALL_BODY`].
    bodies: Room,
    /// The same for callers who are not known yet.
    strangers: Room,
    /// VMs, snapshots, accounts.
    pub control: Control,
    /// Requests that run, for those who send one again.
    pub retries: Retries,
    /// What is counted here.
    pub metrics: Metrics,
    /// Everything that is counted.
    pub registry: Registry,
    /// How VMs run their kernel.
    pub machine: &'static str,
    /// Set when the server is going down.
    pub draining: AtomicBool,
    router: Router,
    request_ids: RequestIds,
}

impl App {
    /// Puts it together. `registry` has everything but the front end's own metrics.
    pub fn new(
        config: Config,
        auth: Arc<Auth>,
        backend: Arc<dyn Backend>,
        tasks: Tasks,
        control: Control,
        mut registry: Registry,
        machine: &'static str,
    ) -> anyhow::Result<Arc<Self>> {
        let metrics = Metrics::register(&mut registry);
        let all = config.server.body_memory_mib as usize * 1024;
        let strangers = (all / STRANGERS_PART).max(STRANGERS_BODY / 1024);
        Ok(Arc::new(Self {
            bodies: Room::new(all.saturating_sub(strangers)),
            strangers: Room::new(strangers),
            config,
            auth,
            backend,
            tasks,
            terminals: Terminals::default(),
            control,
            retries: Retries::default(),
            metrics,
            registry,
            machine,
            draining: AtomicBool::new(false),
            router: Router::new()?,
            request_ids: RequestIds::new(),
        }))
    }

    /// Answers a request. Never fails: whatever goes wrong is a reply.
    pub async fn answer<B>(self: Arc<Self>, request: Request<B>) -> Reply
    where
        B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let began = Instant::now();
        let id = self.request_ids.next();
        let in_flight = InFlight::new(&self.metrics);
        let (parts, body) = request.into_parts();
        let body = body.map_err(|error| BrokenOff(error.into().to_string()));
        let body = Arc::new(Mutex::new(Some(body.boxed_unsync())));
        let method = parts.method.clone();
        let (route, result) = match self.router.find(&parts.method, parts.uri.path()) {
            Ok((endpoint, params)) => {
                let call = Call {
                    parts,
                    held: None,
                    body: body.clone(),
                    params,
                    app: self.clone(),
                };
                (endpoint.path, (endpoint.handler)(call).await)
            }
            Err(error) => ("unknown", Err(error)),
        };
        if let Some(unread) = take(&body) {
            discard(unread).await;
        }
        let mut reply = result.unwrap_or_else(|error| error.reply());
        let status = reply.status().as_u16();
        if let Ok(value) = HeaderValue::from_str(&id) {
            reply.headers_mut().insert("x-request-id", value);
        }
        let took = began.elapsed();
        self.metrics
            .requests
            .get_or_create(&Served { route, status })
            .inc();
        self.metrics
            .seconds
            .get_or_create(&Route { route })
            .observe(took.as_secs_f64());
        drop(in_flight);
        // The route's pattern, not the path: paths have session ids in them.
        tracing::debug!(id, %method, route, status, us = took.as_micros() as u64, "request");
        reply
    }
}

struct InFlight<'a>(&'a Metrics);

impl<'a> InFlight<'a> {
    fn new(metrics: &'a Metrics) -> Self {
        metrics.in_flight.inc();
        Self(metrics)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.dec();
    }
}

/// A request's body as it comes.
pub type Incoming = UnsyncBoxBody<Bytes, BrokenOff>;

/// A body that did not come whole.
#[derive(Debug, thiserror::Error)]
#[error("the request body broke off: {0}")]
pub struct BrokenOff(String);

/// One request.
pub struct Call {
    /// What the requests share.
    pub app: Arc<App>,
    /// Its head.
    pub parts: Parts,
    params: Params,
    /// Room for the body, until the request is answered.
    held: Option<OwnedSemaphorePermit>,
    /// Never contended: what the call has not taken at its end is read to its end.
    body: Arc<Mutex<Option<Incoming>>>,
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Call")
            .field("path", &self.parts.uri.path())
            .finish_non_exhaustive()
    }
}

impl Call {
    /// A parameter of the route's path.
    pub fn path(&self, name: &str) -> &str {
        let found = self.params.iter().find(|(known, _)| known == name);
        found.map_or("", |(_, value)| value)
    }

    /// The query's parameters, read by the types that the route declares.
    ///
    /// # Errors
    /// 422 with everything that is wrong.
    pub fn query<T>(&self, read: impl FnOnce(&mut Fields<'_>) -> T) -> Result<T, ApiError> {
        let query = self.parts.uri.query().unwrap_or_default();
        let parameters: serde_json::Map<_, _> = form_urlencoded::parse(query.as_bytes())
            .map(|(name, value)| (name.into_owned(), value.into_owned().into()))
            .collect();
        let mut fields = Fields::of_query(&parameters);
        let value = read(&mut fields);
        match fields.finish() {
            Ok(()) => Ok(value),
            Err(faults) => Err(ApiError::invalid(&faults)),
        }
    }

    /// The body as it comes, once: for what is too large to be held. Its size and time are the
    /// caller's to bound.
    pub fn incoming(&mut self) -> Option<Incoming> {
        take(&self.body)
    }

    /// The body's bytes, of a caller who is known.
    ///
    /// # Errors
    /// It is too large, too slow or broken off.
    pub async fn bytes(&mut self) -> Result<Bytes, ApiError> {
        let limit = self.app.config.server.max_body_bytes;
        let room = self.app.bodies.clone();
        self.bytes_within(limit, room, "").await
    }

    /// The body's bytes, of a caller whom only the body makes known.
    ///
    /// # Errors
    /// As [`Self::bytes`].
    pub async fn strangers_bytes(&mut self) -> Result<Bytes, ApiError> {
        let limit = self.app.config.server.max_body_bytes;
        let room = self.app.strangers.clone();
        if limit <= STRANGERS_BODY {
            return self.bytes_within(limit, room, "").await;
        }
        let hint = ", which is the most without a key in a header";
        self.bytes_within(STRANGERS_BODY, room, hint).await
    }

    async fn bytes_within(
        &mut self,
        limit: usize,
        room: Room,
        hint: &str,
    ) -> Result<Bytes, ApiError> {
        let Some(body) = self.incoming() else {
            return Ok(Bytes::new());
        };
        let most = Duration::from_secs(self.app.config.server.body_timeout_s);
        // What is certain to be refused needs no room.
        let is_too_large = body.size_hint().lower() > limit as u64;
        let expected = body.size_hint().upper().unwrap_or(limit as u64);
        let expected = usize::try_from(expected).unwrap_or(limit).min(limit);
        if expected > SMALL_BODY && !is_too_large {
            match tokio::time::timeout(most, room.take(expected)).await {
                Ok(room) => self.held = room,
                Err(_) => {
                    discard(body).await;
                    let detail = "Too many large requests at once; try again shortly";
                    return Err(ApiError::too_many(detail, 1));
                }
            }
        }
        let reading = read(body, limit, hint);
        tokio::time::timeout(most, reading)
            .await
            .unwrap_or_else(|_| {
                Err(ApiError::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "The request body took too long",
                ))
            })
    }

    /// What keeps room for the body, for who keeps (parts of) the body beyond the request's answer.
    pub fn room(&mut self) -> Option<OwnedSemaphorePermit> {
        self.held.take()
    }

    /// Who makes a request that has no body.
    ///
    /// # Errors
    /// Nobody that may, or too often.
    pub fn caller(&self) -> Result<Caller, ApiError> {
        match presented(&self.parts.headers) {
            Presented::Secret(secret) => self.admit(secret),
            Presented::Garbage => Err(self.refuse(Refusal::BadCredentials)),
            Presented::Nothing => Err(self.refuse(Refusal::NoCredentials)),
        }
    }

    /// Who makes a request, and its body, which may be what says so. Nothing is told about the
    /// body of somebody unknown.
    ///
    /// # Errors
    /// Nobody that may, or too often; the body is not JSON.
    pub async fn caller_and_body(&mut self) -> Result<(Caller, Body), ApiError> {
        if presented(&self.parts.headers) != Presented::Nothing {
            let caller = self.caller()?;
            return Ok((caller, Body::parse(&self.bytes().await?)?));
        }
        let body = Body::parse(&self.strangers_bytes().await?).ok();
        let body = body.ok_or_else(|| self.refuse(Refusal::NoCredentials))?;
        match body.api_key().map(str::to_owned) {
            Some(secret) => Ok((self.admit(&secret)?, body)),
            None => Err(self.refuse(Refusal::NoCredentials)),
        }
    }

    /// As [`Self::caller_and_body`], for calls that usually have no body.
    ///
    /// # Errors
    /// As there.
    pub async fn caller_and_optional_body(&mut self) -> Result<(Caller, Body), ApiError> {
        let caller = self.caller()?;
        Ok((caller, Body::parse_optional(&self.bytes().await?)?))
    }

    /// Who has this key or token, counted against the plan.
    ///
    /// # Errors
    /// Nobody, or too often.
    pub fn admit(&self, secret: &str) -> Result<Caller, ApiError> {
        let caller = self
            .app
            .auth
            .check(secret)
            .map_err(|refusal| self.refuse(refusal))?;
        caller.spend().map_err(|seconds| {
            self.app.metrics.rate_limited.inc();
            let detail = format!("Rate limit exceeded; try again in {seconds} s");
            ApiError::too_many(detail, seconds)
        })?;
        Ok(caller)
    }

    fn refuse(&self, refusal: Refusal) -> ApiError {
        self.app.metrics.refused.inc();
        refusal.into()
    }

    /// Whether the server is going down.
    pub fn is_draining(&self) -> bool {
        self.app.draining.load(Ordering::Relaxed)
    }
}

fn take(body: &Mutex<Option<Incoming>>) -> Option<Incoming> {
    body.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Reads the rest of a body and forgets it, frame by frame. An answer before the end of the request would close
/// the connection, and a client that still sends might never see the answer.
async fn discard(mut body: Incoming) {
    if body.is_end_stream() {
        return;
    }
    let rest = async { while let Some(Ok(_)) = body.frame().await {} };
    if let Err(error) = tokio::time::timeout(DISCARD, rest).await {
        tracing::debug!(%error, "the rest of a refused request did not come");
    }
}

async fn read(mut body: Incoming, limit: usize, hint: &str) -> Result<Bytes, ApiError> {
    if body.size_hint().lower() <= limit as u64 {
        match Limited::new(&mut body, limit).collect().await {
            Ok(whole) => return Ok(whole.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => {}
            Err(_) => {
                let detail = "The request body broke off";
                return Err(ApiError::new(StatusCode::BAD_REQUEST, detail));
            }
        }
    }
    discard(body).await;
    let detail = format!("The request body is larger than {limit} bytes{hint}");
    Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, detail))
}

/// Names requests in the log and to the client: unique in this run, not guessable across runs.
#[derive(Debug)]
struct RequestIds {
    run: u32,
    next: AtomicU64,
}

impl RequestIds {
    fn new() -> Self {
        Self {
            run: rand::random(),
            next: AtomicU64::new(1),
        }
    }

    fn next(&self) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{:08x}-{number:x}", self.run)
    }
}
