//! The front end over real connections, with sessions that have no VMs.

mod peers;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::app::{App, Control};
use super::auth::{Auth, Tokens, first_key, key};
use super::server::{Server, begin_drain};
use crate::backend::fake::FakeSessions;
use crate::config::Config;
use crate::store::{PlanRow, Store, UserRow, scratch};
use crate::task::Tasks;

const KEY: &str = "Zk3v9QpL0wTy7RbN";
const OTHER: &str = "Yk3v9QpL0wTy7RbM";

struct World {
    _dir: tempfile::TempDir,
    store: Store,
    app: Arc<App>,
    backend: Arc<FakeSessions>,
    address: String,
    stop: watch::Sender<bool>,
    serving: tokio::task::JoinHandle<()>,
}

impl World {
    async fn new(change: impl FnOnce(&mut Config)) -> Self {
        let (dir, store) = scratch();
        let mut config = Config::default();
        config.server.listen = ([127, 0, 0, 1], 0).into();
        config.server.data_dir = dir.path().into();
        change(&mut config);
        first_key(&store, Some(KEY.into())).await.unwrap();
        let made = store.call(|c| {
            let id = UserRow::insert(c, "other", None, "default")?;
            key::row(OTHER, &id, "k", None).insert(c)
        });
        made.await.unwrap();
        let tokens = Tokens::open(dir.path(), 60).unwrap();
        let plan = config.default_plan.clone();
        let auth = Auth::start(store.clone(), tokens, &config.auth, plan)
            .await
            .unwrap();
        let backend = Arc::new(FakeSessions::default());
        let tasks = Tasks::start(store.clone(), backend.clone(), config.task.clone())
            .await
            .unwrap();
        let server = Server::bind(&config.server).await.unwrap();
        let registry = Registry::with_prefix("thaw");
        let vms = crate::vms::tests::World::over(dir.path(), store.clone())
            .await
            .vms;
        let control = Control {
            store: store.clone(),
            vms,
        };
        let app = App::new(
            config,
            auth,
            backend.clone(),
            tasks,
            control,
            registry,
            "pv",
        )
        .unwrap();
        let address = server.url().split("//").nth(1).unwrap().to_owned();
        let (stop, stopped) = watch::channel(false);
        let serving = tokio::spawn(server.serve(app.clone(), stopped));
        Self {
            _dir: dir,
            store,
            app,
            backend,
            address,
            stop,
            serving,
        }
    }

    async fn connect(&self) -> Wire {
        Wire(TcpStream::connect(&self.address).await.unwrap())
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.post_as(KEY, path, body).await
    }

    async fn post_as(&self, key: &str, path: &str, body: Value) -> (u16, Value) {
        let head = format!("X-API-Key: {key}\r\nContent-Type: application/json\r\n");
        self.connect()
            .await
            .ask("POST", path, &head, &body.to_string())
            .await
            .json()
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let head = format!("X-API-Key: {KEY}\r\n");
        self.connect()
            .await
            .ask("GET", path, &head, "")
            .await
            .json()
    }

    async fn session(&self) -> String {
        let (status, made) = self
            .post("/v1/sessions/session", json!({ "api_key": KEY }))
            .await;
        assert_eq!(status, 200);
        made["session_id"].as_str().unwrap().to_owned()
    }

    fn runs(&self) -> usize {
        self.backend.runs.load(Ordering::SeqCst)
    }
}

/// A connection that speaks HTTP/1.1.
struct Wire(TcpStream);

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> (u16, Value) {
        (
            self.status,
            serde_json::from_slice(&self.body).unwrap_or(Value::Null),
        )
    }
}

impl Wire {
    async fn send(&mut self, method: &str, path: &str, head: &str, body: &[u8]) {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n{head}\r\n",
            body.len()
        );
        self.0.write_all(request.as_bytes()).await.unwrap();
        self.0.write_all(body).await.unwrap();
    }

    async fn ask(&mut self, method: &str, path: &str, head: &str, body: &str) -> Answer {
        self.send(method, path, head, body.as_bytes()).await;
        self.answer().await
    }

    async fn answer(&mut self) -> Answer {
        let mut bytes = Vec::new();
        let end = loop {
            if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                break end + 4;
            }
            assert_ne!(
                self.0.read_buf(&mut bytes).await.unwrap(),
                0,
                "closed before an answer"
            );
        };
        let head = String::from_utf8(bytes[..end].to_vec())
            .unwrap()
            .to_lowercase();
        let length = head.split("content-length: ").nth(1).unwrap();
        let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
        while bytes.len() < end + length {
            assert_ne!(
                self.0.read_buf(&mut bytes).await.unwrap(),
                0,
                "closed in an answer"
            );
        }
        let status = head[9..12].parse().unwrap();
        Answer {
            status,
            head,
            body: bytes.split_off(end),
        }
    }

    /// Whether the server closes the connection within the time.
    async fn closes_within(&mut self, time: Duration) -> bool {
        let mut byte = [0; 1];
        matches!(
            tokio::time::timeout(time, self.0.read(&mut byte)).await,
            Ok(Ok(0) | Err(_))
        )
    }
}

#[tokio::test]
async fn a_command_runs_and_a_session_is_made_when_none_is_named() {
    let world = World::new(|_| {}).await;
    let (status, done) = world
        .post("/execute", json!({ "command": "print(1)" }))
        .await;
    assert_eq!(
        (status, &done["stdout"], &done["exit_code"]),
        (200, &json!("print(1)"), &json!(0))
    );
    let id = done["session_id"].as_str().unwrap();
    let (status, state) = world.get(&format!("/v1/sessions/status/{id}")).await;
    assert_eq!(
        (status, &state["vm_status"], &state["exists"]),
        (200, &json!("active"), &json!(true))
    );
    let (status, info) = world.get(&format!("//v1/sessions/session/{id}")).await;
    assert_eq!((status, &info["session_id"]), (200, &json!(id)));
    let (status, killed) = world.post("/kill", json!({ "session_id": id })).await;
    assert_eq!((status, &killed["vm_id"]), (200, &json!("vm-1")));
    let (status, me) = world.get("/v1/users/me").await;
    assert_eq!((status, &me["name"]), (200, &json!("owner")));
}

#[tokio::test]
async fn nobody_gets_in_without_a_key_and_others_sessions_do_not_exist() {
    let world = World::new(|_| {}).await;
    let mut wire = world.connect().await;
    for head in [
        "",
        "X-API-Key: wrong\r\n",
        "Authorization: Bearer a.b.c\r\n",
        "Authorization: Basic eDp5\r\n",
    ] {
        let answer = wire
            .ask("POST", "/execute", head, r#"{"command":"1"}"#)
            .await;
        assert_eq!(answer.status, 401, "{head}");
        assert!(answer.head.contains("www-authenticate: bearer"));
    }
    assert_eq!(world.runs(), 0);
    let answer = wire
        .ask(
            "POST",
            "/execute",
            "",
            &json!({"command": "1", "api_key": KEY}).to_string(),
        )
        .await;
    assert_eq!(answer.status, 200);
    let bearer = format!("Authorization: Bearer {KEY}\r\n");
    assert_eq!(
        wire.ask("GET", "/v1/users/me", &bearer, "").await.status,
        200
    );

    let id = world.session().await;
    for path in ["/execute", "/execute_async", "/kill"] {
        let body = json!({ "command": "1", "session_id": id });
        assert_eq!(world.post_as(OTHER, path, body).await.0, 404, "{path}");
    }
    let (status, _) = world
        .post("/v1/sessions/session", json!({ "api_key": "wrong" }))
        .await;
    assert_eq!(status, 200, "a header's key wins");
    let answer = wire
        .ask("POST", "/v1/sessions/session", "", r#"{"api_key":"wrong"}"#)
        .await;
    assert_eq!(answer.status, 401);
}

#[tokio::test]
async fn a_password_gives_a_token_that_works() {
    let world = World::new(|_| {}).await;
    let mut wire = world.connect().await;
    let form = format!("grant_type=password&username=owner&password={KEY}");
    let head = "Content-Type: application/x-www-form-urlencoded\r\n";
    let (status, token) = wire.ask("POST", "/token", head, &form).await.json();
    assert_eq!((status, &token["token_type"]), (200, &json!("bearer")));
    let head = format!(
        "Authorization: Bearer {}\r\n",
        token["access_token"].as_str().unwrap()
    );
    assert_eq!(wire.ask("GET", "/v1/users/me", &head, "").await.status, 200);
    let (status, said) = wire
        .ask(
            "POST",
            "/token",
            head.as_str(),
            "username=owner&password=no",
        )
        .await
        .json();
    assert_eq!(
        (status, &said["detail"]),
        (401, &json!("Incorrect username or password"))
    );
}

#[tokio::test]
async fn wrong_paths_methods_and_bodies_have_clear_answers() {
    let world = World::new(|config| config.server.max_body_bytes = 1000).await;
    assert_eq!(
        world.get("/nope").await,
        (404, json!({ "detail": "Not Found" }))
    );
    let answer = world.connect().await.ask("GET", "/execute", "", "").await;
    assert_eq!(
        answer.json(),
        (405, json!({ "detail": "Method Not Allowed" }))
    );
    assert!(answer.head.contains("allow: post"));
    assert_eq!(world.get("/v1/executions/../../x").await.0, 404);
    assert_eq!(world.get("/v1/executions/7a").await.0, 404);
    assert_eq!(world.get("/v1/sessions/status/..%2f..").await.0, 404);
    assert_eq!(world.post("/execute", json!({ "timeout": 0 })).await.0, 422);
    assert_eq!(
        world
            .post("/execute", json!({ "command": "x".repeat(2000) }))
            .await
            .0,
        413
    );
    let (status, said) = world
        .post("/execute", json!({ "command": "1", "vault_ids": ["v"] }))
        .await;
    assert_eq!(status, 404);
    assert!(said["detail"].as_str().unwrap().contains("vault"));
    assert_eq!(world.runs(), 0);
    let mut wire = world.connect().await;
    let head = format!("X-API-Key: {KEY}\r\n");
    wire.send("POST", "/execute", &head, b"{\"command\":\"\xff\"}")
        .await;
    assert_eq!(wire.answer().await.status, 400);
}

#[tokio::test]
async fn a_task_is_polled_to_its_end_and_belongs_to_its_owner() {
    let world = World::new(|_| {}).await;
    let id = world.session().await;
    let body = json!({ "command": "sleep 200", "session_id": id });
    let (status, task) = world.post("/execute_async", body).await;
    assert_eq!((status, &task["status"]), (200, &json!("queued")));
    let path = format!("/v1/executions/{}", task["task_id"].as_str().unwrap());
    // One poll: it waits for the end.
    let (status, done) = world.get(&path).await;
    assert_eq!((status, &done["is_complete"]), (200, &json!(true)));
    assert_eq!(done["serialized_stdout"], "sleep 200");
    let head = format!("X-API-Key: {OTHER}\r\n");
    assert_eq!(
        world
            .connect()
            .await
            .ask("GET", &path, &head, "")
            .await
            .status,
        404
    );
}

#[tokio::test]
async fn a_retried_request_does_not_run_twice() {
    let world = World::new(|_| {}).await;
    let id = world.session().await;
    let body = json!({ "command": "sleep 300", "session_id": id });
    let head = format!("X-API-Key: {KEY}\r\n");
    let mut first = world.connect().await;
    first
        .send("POST", "/execute", &head, body.to_string().as_bytes())
        .await;
    while world.runs() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The client's time-out: it closes the connection and sends the request again.
    drop(first);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(world.post("/execute", body.clone()).await.0, 200);
    assert_eq!(world.runs(), 1);
    // Two who both wait are two requests.
    let (a, b) = tokio::join!(
        world.post("/execute", body.clone()),
        world.post("/execute", body.clone())
    );
    assert_eq!((a.0, b.0, world.runs()), (200, 200, 3));

    for path in ["/execute", "/execute_async"] {
        let before = world.runs();
        let named = format!("{head}Idempotency-Key: {path}\r\n");
        let (mut one, mut two) = (world.connect().await, world.connect().await);
        let text = body.to_string();
        let (a, b) = tokio::join!(
            one.ask("POST", path, &named, &text),
            two.ask("POST", path, &named, &text)
        );
        assert_eq!((a.status, b.status), (200, 200));
        assert_eq!(a.body, b.body);
        let other = json!({ "command": "other", "session_id": id }).to_string();
        assert_eq!(one.ask("POST", path, &named, &other).await.status, 409);
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(world.runs(), before + 1, "{path}");
    }
}

#[tokio::test]
async fn a_task_that_is_known_or_not_taken_makes_no_session() {
    let world = World::new(|config| config.task.max_open = 1).await;
    let head = format!("X-API-Key: {KEY}\r\nIdempotency-Key: once\r\n");
    let body = json!({ "command": "sleep 400" }).to_string();
    let mut wire = world.connect().await;
    let first = wire.ask("POST", "/execute_async", &head, &body).await;
    assert_eq!(first.status, 200);
    let (status, _) = world
        .post("/execute_async", json!({ "command": "1" }))
        .await;
    assert_eq!(status, 429);
    // As after a restart, or ten minutes later: only the database knows the name.
    world.app.retries.forget_all();
    let again = wire.ask("POST", "/execute_async", &head, &body).await;
    let ids = |answer: &Answer| {
        let (status, told) = answer.json();
        (status, told["task_id"].clone(), told["session_id"].clone())
    };
    assert_eq!(ids(&again), ids(&first));
    assert_eq!(world.backend.sessions(), 1);
}

#[tokio::test]
async fn beyond_the_plan_s_rate_is_429_with_the_time_to_wait() {
    let world = World::new(|_| {}).await;
    let plan = PlanRow {
        name: "default".into(),
        requests_per_minute: 1,
        burst: 2,
        max_vms: 1,
    };
    world.store.call(move |c| plan.set(c)).await.unwrap();
    world.app.auth.reload().await.unwrap();
    let mut wire = world.connect().await;
    let head = format!("X-API-Key: {KEY}\r\n");
    for _ in 0..2 {
        assert_eq!(wire.ask("GET", "/v1/users/me", &head, "").await.status, 200);
    }
    let answer = wire.ask("GET", "/v1/users/me", &head, "").await;
    assert_eq!(answer.status, 429);
    assert!(answer.head.contains("retry-after: "));
    assert!(
        answer.json().1["detail"]
            .as_str()
            .unwrap()
            .contains("Rate limit")
    );
}

#[tokio::test]
async fn open_routes_are_open() {
    let world = World::new(|_| {}).await;
    let mut wire = world.connect().await;
    let (status, health) = wire.ask("GET", "/health", "", "").await.json();
    assert_eq!(
        (status, &health["status"], &health["machine"]),
        (200, &json!("ok"), &json!("pv"))
    );
    assert_eq!(
        wire.ask("GET", "/openapi.json", "", "").await.json().1["openapi"],
        "3.1.0"
    );
    let metrics = wire.ask("GET", "/metrics", "", "").await;
    let text = String::from_utf8(metrics.body).unwrap();
    assert!(
        text.contains("thaw_http_requests_total{route=\"/health\",status=\"200\"} 1"),
        "{text}"
    );
}

#[tokio::test]
async fn http2_and_tls_work() {
    use http_body_util::{BodyExt, Full};
    let world = World::new(|config| config.server.tls_self_signed = true).await;
    let pem = std::fs::read(world._dir.path().join("tls/cert.pem")).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    for cert in rustls_pemfile::certs(&mut pem.as_slice()) {
        roots.add(cert.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(tls));
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
    let stream = TcpStream::connect(&world.address).await.unwrap();
    let stream = connector.connect(name, stream).await.unwrap();
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io)
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = hyper::Request::post("https://127.0.0.1/execute")
        .header("x-api-key", KEY)
        .body(Full::new(bytes::Bytes::from_static(
            br#"{"command":"two"}"#,
        )))
        .unwrap();
    let reply = sender.send_request(request).await.unwrap();
    assert_eq!(
        (reply.status().as_u16(), reply.version()),
        (200, hyper::Version::HTTP_2)
    );
    let body = reply.into_body().collect().await.unwrap().to_bytes();
    let done: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(done["stdout"], "two");
}
