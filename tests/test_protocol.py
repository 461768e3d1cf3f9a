"""HTTP itself: versions, TLS, keep-alive, slow and broken peers, the drain."""

import json
import socket
import ssl
import threading
import time
import urllib.parse

import httpx
import pytest

import harness

CONFIG = {"server.header_timeout_s": 2, "server.idle_timeout_s": 4}


def connect(server):
    url = urllib.parse.urlsplit(server.url)
    connection = socket.create_connection((url.hostname, url.port), timeout=30)
    return connection


def raw(server, text):
    """Sends bytes, reads until the server closes, which it does after an error or a while."""
    with connect(server) as connection:
        connection.sendall(text)
        reply = b""
        while piece := connection.recv(65536):
            reply += piece
        return reply


def execute(http, server, key=None):
    body = {"command": "6 * 7"}
    return http.post(f"{server.url}/execute", json=body, headers={"X-API-Key": key or server.key}, timeout=60)


def test_http2_with_prior_knowledge(server):
    with httpx.Client(http1=False, http2=True, trust_env=False) as http:
        reply = execute(http, server)
        assert reply.http_version == "HTTP/2" and reply.json()["stdout"] == "42\n"
        assert http.get(f"{server.url}/nope").status_code == 404


def test_many_streams_of_one_http2_connection(server):
    import asyncio

    session = server.client().session()

    async def all_at_once():
        async with httpx.AsyncClient(http1=False, http2=True, trust_env=False, timeout=60) as http:
            headers = {"X-API-Key": server.key}

            async def one(i):
                body = {"command": f"{i} * 2", "session_id": session.id}
                return (await http.post(f"{server.url}/execute", json=body, headers=headers)).json()["stdout"]

            return await asyncio.gather(*(one(i) for i in range(40)))

    assert asyncio.run(all_at_once()) == [f"{i * 2}\n" for i in range(40)]
    session.kill()


def test_self_signed_tls_with_alpn_and_the_official_client(start_server, monkeypatch):
    server = start_server(args=["--tls-self-signed"])
    assert server.url.startswith("https://")
    pair = list((server.data / "tls").iterdir())
    cert = next(path for path in pair if b"CERTIFICATE" in path.read_bytes())
    private = next(path for path in pair if b"PRIVATE KEY" in path.read_bytes())
    assert private.stat().st_mode & 0o077 == 0
    trust = ssl.create_default_context(cafile=str(cert))
    for http2, version in ((True, "HTTP/2"), (False, "HTTP/1.1")):
        with httpx.Client(http2=http2, verify=trust, trust_env=False) as http:
            reply = execute(http, server)
            assert reply.http_version == version and reply.json()["stdout"] == "42\n"
    with httpx.Client(trust_env=False) as http, pytest.raises(httpx.ConnectError):
        http.get(f"{server.url}/health")
    from instavm import InstaVM

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cert))
    made = InstaVM(server.key, base_url=server.url)
    assert made.execute("print('over TLS')")["stdout"] == "over TLS\n"
    # The pair is kept: who trusted it still does after a restart.
    before = cert.read_bytes()
    server.terminate()
    assert server.wait() == 0
    server.restart()
    assert cert.read_bytes() == before


def test_plain_http_to_a_tls_port_and_rubbish_are_survived(start_server):
    server = start_server(args=["--tls-self-signed"], config={"server.handshake_timeout_s": 1})
    for rubbish in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + b"\xff" * 200, b""):
        with connect(server) as connection:
            connection.sendall(rubbish)
            connection.settimeout(30)
            assert len(connection.recv(4096)) < 100
            assert connection.recv(4096) == b""


def test_one_connection_serves_many_requests(server):
    with connect(server) as connection:
        stream = connection.makefile("rwb")
        for _ in range(5):
            stream.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            stream.flush()
            assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
            length = 0
            while (line := stream.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert json.loads(stream.read(length))["status"] == "ok"


def test_pipelined_requests_are_answered_in_order(server):
    one = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nope HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    reply = raw(server, one + one + last)
    assert [reply.count(b"HTTP/1.1 200"), reply.count(b"HTTP/1.1 404")] == [2, 1]
    assert reply.rindex(b"HTTP/1.1 200") < reply.index(b"HTTP/1.1 404")


@pytest.mark.parametrize("path", ["//execute", "///execute", "////execute"])
def test_duplicate_slashes_are_collapsed(client, path):
    reply = client.http.post(client.url + path, json={"command": "1"}, timeout=60)
    assert reply.status_code == 200 and reply.json()["stdout"] == "1\n"


def test_trailing_slashes_are_significant_and_nothing_redirects(client):
    for path in ("/execute/", "/v1/sessions/session/"):
        reply = client.post(path, {"command": "1"}, allow_redirects=False)
        assert reply.status_code == 404


@pytest.mark.parametrize("path", ["/", "/nope", "/v1", "/v1/vm", "/execute/x", "/..", "/v1/executions/a/b"])
def test_unknown_paths_are_404_in_json(client, path):
    reply = client.get(path)
    assert (reply.status_code, reply.json()) == (404, {"detail": "Not Found"})
    assert reply.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "method, path, allow",
    [
        ("GET", "/execute", "POST"),
        ("DELETE", "/execute", "POST"),
        ("PUT", "/v1/users/me", "GET"),
        ("POST", "/health", "GET"),
        ("PATCH", "/v1/executions/x", "GET, DELETE"),
        ("OPTIONS", "/execute", "POST"),
        ("BREW", "/health", "GET"),
    ],
)
def test_wrong_methods_are_405_with_allow(client, method, path, allow):
    reply = client.http.request(method, client.url + path, timeout=30)
    assert (reply.status_code, reply.json()) == (405, {"detail": "Method Not Allowed"})
    assert reply.headers["Allow"] == allow


def test_head_has_no_body(client):
    for path in ("/health", "/nope"):
        reply = client.http.head(client.url + path, timeout=30)
        assert reply.status_code in (200, 404, 405) and reply.content == b""


def test_every_reply_has_a_request_id_of_its_own(client):
    ids = [client.get(path).headers["X-Request-Id"] for path in ("/health", "/nope", "/v1/users/me")]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    "head",
    [
        b"NONSENSE\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header: y\r\n\r\n",
        b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Length: nine\r\n\r\n",
        b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"\x00\x01\x02\x03",
    ],
    ids=lambda head: repr(head[:30]),
)
def test_broken_heads_cost_their_connection_only(server, head):
    try:
        reply = raw(server, head)
    except ConnectionError:
        reply = b""
    assert reply == b"" or reply[:10].startswith(b"HTTP/1.") and reply.split()[1][:1] == b"4", reply[:200]
    assert server.client().get("/health").status_code == 200


def test_a_slow_head_is_cut(server):
    with connect(server) as connection:
        began = time.monotonic()
        with pytest.raises(OSError):
            connection.sendall(b"GET /health HTTP/1.1\r\n")
            for _ in range(600):
                connection.sendall(b"X-Slow: 1\r\n")
                connection.settimeout(0.1)
                try:
                    if connection.recv(1000) == b"":
                        raise ConnectionResetError
                except TimeoutError:
                    pass
        assert time.monotonic() - began < 30


def test_an_idle_connection_is_closed(server):
    with connect(server) as connection:
        connection.settimeout(60)
        assert connection.recv(1000) == b""


def test_a_slow_body_is_answered_with_408(start_server):
    server = start_server(config={"server.body_timeout_s": 1, "session.pool.low": 0})
    with connect(server) as connection:
        head = f"POST /execute HTTP/1.1\r\nHost: x\r\nX-API-Key: {server.key}\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b'{"comm')
        connection.settimeout(60)
        assert b" 408 " in connection.recv(4096).splitlines()[0]


def test_connections_beyond_the_cap_wait(start_server):
    server = start_server(config={"server.max_connections": 2})
    held = [connect(server) for _ in range(2)]
    time.sleep(0.3)
    answer = harness.background(lambda: server.client().get("/health").status_code)
    time.sleep(0.5)
    assert not answer.done()
    held[0].close()
    assert answer.result(timeout=30) == 200
    held[1].close()


def test_sigterm_lets_a_running_command_finish(start_server):
    server = start_server()
    client = server.client()
    session = client.session()
    session.python("1")
    answer = harness.background(lambda: session.copy().python("import time; time.sleep(3); print('finished')"))
    harness.wait_for(lambda: server.metric("thaw_session_running") >= 1, "the command to run")
    server.terminate()
    assert answer.result(timeout=60)["stdout"] == "finished\n"
    assert server.wait() == 0
    with pytest.raises(Exception):
        client.copy().get("/health", timeout=5)


def test_a_second_sigterm_ends_at_once(start_server):
    server = start_server(config={"server.drain_s": 300})
    session = server.client().session()
    session.python("1")
    threading.Thread(target=lambda: swallow(session), daemon=True).start()
    harness.wait_for(lambda: server.metric("thaw_session_running") >= 1, "the command to run")
    workers = server.workers()
    server.terminate()
    time.sleep(0.5)
    server.terminate()
    assert server.wait(30) == 0
    assert all(harness.wait_gone(pid) for pid in workers)


def swallow(session):
    """Sends a command whose answer will never come."""
    try:
        session.copy().python("import time; time.sleep(200)", timeout=300)
    except Exception:
        return


def test_the_drain_s_grace_is_a_bound(start_server):
    server = start_server(config={"server.drain_s": 1})
    session = server.client().session()
    session.python("1")
    answer = harness.background(lambda: session.copy().client.post(
        "/execute", {"command": "import time; time.sleep(200)", "session_id": session.id, "timeout": 300}
    ))
    harness.wait_for(lambda: server.metric("thaw_session_running") >= 1, "the command to run")
    server.terminate()
    assert server.wait(60) == 0
    reply = answer.result(timeout=10)
    assert reply.status_code == 200 and "shut down" in reply.json()["stderr"]
