//! Peers that are slow, deaf, greedy or speak no HTTP, and the end of the server.

use super::*;

#[tokio::test]
async fn slow_heads_and_idle_connections_are_cut_and_busy_ones_are_not() {
    let world = World::new(|config| {
        config.server.header_timeout_s = 1;
        config.server.idle_timeout_s = 3;
    })
    .await;
    let mut slow = world.connect().await;
    slow.0.write_all(b"GET /health HT").await.unwrap();
    let mut idle = world.connect().await;
    idle.ask("GET", "/health", "", "").await;
    let mut busy = world.connect().await;
    let head = format!("X-API-Key: {KEY}\r\n");
    busy.send("POST", "/execute", &head, br#"{"command":"sleep 4500"}"#)
        .await;
    assert!(slow.closes_within(Duration::from_millis(2800)).await);
    assert!(idle.closes_within(Duration::from_secs(4)).await);
    assert_eq!(busy.answer().await.status, 200);
}

#[tokio::test]
async fn what_is_no_http_is_answered_and_a_half_request_holds_nothing_up() {
    let world = World::new(|_| {}).await;
    let long = format!(
        "GET / HTTP/1.1\r\nHost: x\r\nA: {}\r\n\r\n",
        "x".repeat(20_000)
    );
    let many = format!(
        "GET / HTTP/1.1\r\nHost: x\r\n{}\r\n",
        "A: b\r\n".repeat(200)
    );
    let bad_chunk = format!(
        "POST /execute HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    );
    for (sent, status) in [
        ("GARBAGE\r\n\r\n", "400"),
        (long.as_str(), "431"),
        (many.as_str(), "431"),
        (bad_chunk.as_str(), "400"),
    ] {
        let mut stream = world.connect().await.0;
        stream.write_all(sent.as_bytes()).await.unwrap();
        let mut answer = vec![0; 64];
        let count = stream.read(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer[..count]).into_owned();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{answer:?}"
        );
    }
    let mut stream = world.connect().await.0;
    let one_and_a_half = "GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea";
    stream.write_all(one_and_a_half.as_bytes()).await.unwrap();
    let mut answer = vec![0; 64];
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut answer)).await;
    assert!(
        read.expect("the first request waits for the second")
            .unwrap()
            > 0
    );
}

#[tokio::test]
async fn strangers_bodies_are_small_and_take_no_room_from_others() {
    let world = World::new(|config| {
        config.server.body_memory_mib = 1;
        config.server.body_timeout_s = 1;
    })
    .await;
    let large = json!({ "command": "x".repeat(300_000), "api_key": KEY }).to_string();
    let mut wire = world.connect().await;
    let (status, said) = wire.ask("POST", "/execute", "", &large).await.json();
    assert_eq!(status, 413);
    assert!(said["detail"].as_str().unwrap().contains("in a header"));
    // All the room that strangers have.
    let mut slow = world.connect().await;
    let head = "POST /execute HTTP/1.1\r\nHost: x\r\nContent-Length: 262000\r\n\r\n";
    slow.0.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let body = json!({ "command": "x".repeat(60_000), "api_key": KEY });
    let (mut stranger, text) = (world.connect().await, body.to_string());
    stranger.send("POST", "/execute", "", text.as_bytes()).await;
    let known = json!({ "command": "x".repeat(600_000) });
    assert_eq!(world.post("/execute", known).await.0, 200);
    assert_eq!(world.runs(), 1, "the second stranger waits for the first");
    assert_eq!(slow.answer().await.status, 408);
    assert_eq!(stranger.answer().await.status, 200);
}

#[tokio::test]
async fn room_for_a_body_is_kept_as_long_as_its_code() {
    let world = World::new(|config| {
        config.server.body_memory_mib = 1;
        config.server.body_timeout_s = 1;
    })
    .await;
    let head = format!("X-API-Key: {KEY}\r\n");
    let code = format!("sleep {}1500", " ".repeat(700_000));
    let body = json!({ "command": code }).to_string();
    let mut first = world.connect().await;
    first.send("POST", "/execute", &head, body.as_bytes()).await;
    while world.runs() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The client is gone, the command is not.
    drop(first);
    let other = json!({ "command": "x".repeat(700_000) });
    assert_eq!(world.post("/execute", other.clone()).await.0, 429);
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(world.post("/execute", other).await.0, 200);
}

#[tokio::test]
async fn a_peer_that_takes_nothing_is_cut_and_a_stream_with_nothing_to_say_is_not() {
    let world = World::new(|config| {
        config.server.idle_timeout_s = 1;
        config.server.max_body_bytes = 16 << 20;
    })
    .await;
    let cut = || world.app.metrics.cut.get();
    let head = format!("X-API-Key: {KEY}\r\n");
    let silent = json!({ "command": "sleep 6000" }).to_string();
    let mut stream = world.connect().await;
    stream
        .send("POST", "/v1/executions/stream", &head, silent.as_bytes())
        .await;
    let much = json!({ "command": "x".repeat(15 << 20) }).to_string();
    let mut deaf = world.connect().await;
    deaf.send("POST", "/execute", &head, much.as_bytes()).await;
    let io = hyper_util::rt::TokioIo::new(TcpStream::connect(&world.address).await.unwrap());
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io)
        .await
        .unwrap();
    let h2 = tokio::spawn(connection);
    let request = hyper::Request::post(format!("http://{}/execute", world.address))
        .header("x-api-key", KEY)
        .body(http_body_util::Full::new(bytes::Bytes::from(much)))
        .unwrap();
    // Answers pings, but gives no room for the body.
    let reply = sender.send_request(request).await.unwrap();
    assert_eq!(reply.status(), 200);
    let ended = tokio::time::timeout(Duration::from_secs(5), h2).await;
    assert!(ended.is_ok(), "the HTTP/2 peer is still there");
    drop(reply);
    assert_eq!(cut(), 2);
    let mut told = Vec::new();
    let end = async { while stream.0.read_buf(&mut told).await.unwrap() > 0 {} };
    tokio::time::timeout(Duration::from_secs(10), end)
        .await
        .unwrap();
    let told = String::from_utf8(told).unwrap();
    assert!(told.contains("event: exit"), "{told}");
}

#[tokio::test]
async fn the_connection_cap_makes_others_wait() {
    let world = World::new(|config| config.server.max_connections = 1).await;
    let mut first = world.connect().await;
    first.ask("GET", "/health", "", "").await;
    let mut second = world.connect().await;
    second.send("GET", "/health", "", b"").await;
    let early = tokio::time::timeout(Duration::from_millis(200), second.answer()).await;
    assert!(early.is_err());
    drop(first);
    assert_eq!(second.answer().await.status, 200);
}

#[tokio::test]
async fn a_drain_finishes_what_is_in_flight_and_takes_nothing_new() {
    let world = World::new(|_| {}).await;
    let mut busy = world.connect().await;
    let head = format!("X-API-Key: {KEY}\r\n");
    busy.send("POST", "/execute", &head, br#"{"command":"sleep 400"}"#)
        .await;
    let mut idle = world.connect().await;
    assert_eq!(idle.ask("GET", "/health", "", "").await.status, 200);
    tokio::time::sleep(Duration::from_millis(50)).await;
    begin_drain(&world.app);
    world.stop.send_replace(true);
    assert!(idle.closes_within(Duration::from_secs(1)).await);
    let answer = busy.answer().await;
    assert_eq!(answer.status, 200);
    world.serving.await.unwrap();
    assert!(TcpStream::connect(&world.address).await.is_err());
}

#[tokio::test]
async fn a_body_that_nobody_reads_does_not_cost_the_connection() {
    let world = World::new(|_| {}).await;
    let mut wire = world.connect().await;
    for path in ["/v1/users/me", "/nope", "/v1/executions/x"] {
        // Head and body in two packets, as common clients send them.
        let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n");
        wire.0.write_all(head.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        wire.0.write_all(b"{}").await.unwrap();
        let status = wire.answer().await.status;
        assert!(matches!(status, 401 | 404), "{path}: {status}");
    }
    assert_eq!(wire.ask("GET", "/health", "", "").await.status, 200);
}
