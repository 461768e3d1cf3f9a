"""Keys, tokens and passwords."""

import base64
import json
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

import harness

BAD = {"detail": "Could not validate credentials"}
NONE = {"detail": "Not authenticated"}


def me(server, **headers):
    return harness.requests_session().get(f"{server.url}/v1/users/me", headers=headers, timeout=30)


def post(server, path, body, **headers):
    return harness.requests_session().post(server.url + path, json=body, headers=headers, timeout=60)


def test_a_key_is_taken_from_header_bearer_or_body(server):
    assert me(server, **{"X-API-Key": server.key}).status_code == 200
    assert me(server, Authorization=f"Bearer {server.key}").status_code == 200
    assert me(server, Authorization=f"bearer {server.key}").status_code == 200
    body = {"command": "1", "api_key": server.key}
    for path in ("/execute", "/execute_async"):
        assert post(server, path, body).status_code == 200
    made = post(server, "/v1/sessions/session", {"api_key": server.key})
    assert made.status_code == 200
    session = {"session_id": made.json()["session_id"], "api_key": server.key}
    assert post(server, "/execute", {"command": "1", **session}).status_code == 200
    assert post(server, "/kill", session).status_code == 200


def test_a_session_can_be_made_with_the_key_in_a_header_only(server):
    assert post(server, "/v1/sessions/session", {}, **{"X-API-Key": server.key}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": "instavm_sk_wrong"},
        {"X-API-Key": "x" * 5000},
        {"Authorization": "Bearer instavm_sk_wrong"},
        {"Authorization": "Bearer a.b.c"},
        {"Authorization": "Bearer "},
        {"X-API-Key": "' OR 1=1 --"},
    ],
    ids=lambda headers: str(headers)[:40],
)
def test_wrong_credentials_are_401(server, headers):
    reply = me(server, **headers)
    assert reply.status_code == 401
    assert reply.json() in (BAD, NONE)
    assert reply.headers["WWW-Authenticate"] == "Bearer"


def test_no_credentials_are_401_before_anything_is_told_about_the_body(server):
    assert (me(server).status_code, me(server).json()) == (401, NONE)
    for body in ({}, {"command": 5}, {"command": "1"}):
        reply = post(server, "/execute", body)
        assert (reply.status_code, reply.json()) == (401, NONE)
    raw = harness.requests_session().post(f"{server.url}/execute", data=b"{nonsense", timeout=30)
    assert raw.status_code == 401


def test_a_wrong_key_in_the_body_is_401(server):
    for path in ("/execute", "/execute_async", "/kill", "/v1/sessions/session"):
        reply = post(server, path, {"command": "1", "session_id": "x", "api_key": "instavm_sk_wrong"})
        assert reply.status_code == 401, path


def test_a_header_beats_the_body(server):
    reply = post(server, "/execute", {"command": "1", "api_key": server.key}, **{"X-API-Key": "instavm_sk_wrong"})
    assert reply.status_code == 401


def test_a_key_header_beats_basic_authorization(server):
    # requests adds Basic from a .netrc; that must not get in the way.
    basic = "Basic " + base64.b64encode(b"user:password").decode()
    assert me(server, **{"X-API-Key": server.key, "Authorization": basic}).status_code == 200


def test_nobody_needs_a_key_for_health_and_the_document(server):
    for path in ("/health", "/openapi.json", "/metrics"):
        assert harness.requests_session().get(server.url + path, timeout=30).status_code == 200


def token(server, **form):
    return harness.requests_session().post(f"{server.url}/token", data=form, timeout=60)


def test_a_password_gives_a_bearer_token(server):
    user = server.new_user("jane@example.org")
    assert token(server, username="jane@example.org", password="anything").status_code == 401
    server.cli("user", "passwd", "jane@example.org", stdin="correct horse battery\n")
    reply = harness.wait_for(
        lambda: (r := token(server, username="jane@example.org", password="correct horse battery")).ok and r,
        "the password to work",
        pause=1,
    )
    shown = reply.json()
    assert shown["token_type"] == "bearer" and shown["expires_in"] == 3600
    assert reply.headers["Cache-Control"] == "no-store"
    found = me(server, Authorization=f"Bearer {shown['access_token']}")
    assert found.status_code == 200 and found.json() == user.get("/v1/users/me").json()
    client = harness.Client(server.url, None)
    client.http.headers["Authorization"] = f"Bearer {shown['access_token']}"
    assert client.run("'by token'")["stdout"] == "'by token'\n"
    # A changed token, and one whose signature was cut off.
    head, claims, signature = shown["access_token"].split(".")
    forged = json.loads(base64.urlsafe_b64decode(claims + "=="))
    forged["exp"] += 3600
    forged = base64.urlsafe_b64encode(json.dumps(forged).encode()).decode().rstrip("=")
    for bad in (f"{head}.{forged}.{signature}", f"{head}.{claims}.", f"{head}.{claims}"):
        assert me(server, Authorization=f"Bearer {bad}").status_code == 401


def test_a_key_can_be_the_password(server):
    name = me(server, **{"X-API-Key": server.key}).json()["name"]
    reply = token(server, username=name, password=server.key, grant_type="password")
    assert reply.status_code == 200
    assert me(server, Authorization=f"Bearer {reply.json()['access_token']}").status_code == 200


def test_bad_logins(server):
    reply = token(server, username="nobody", password="nothing")
    assert (reply.status_code, reply.json()) == (401, {"detail": "Incorrect username or password"})
    reply = token(server, username="nobody")
    assert reply.status_code == 422
    assert [(f["type"], f["loc"]) for f in reply.json()["detail"]] == [("missing", ["body", "password"])]


def test_guessing_passwords_is_limited(server):
    # At once: a check of a password is slow on purpose, and the limit is by the minute.
    with ThreadPoolExecutor(20) as pool:
        codes = list(pool.map(lambda i: token(server, username="guessed", password=f"guess {i}").status_code, range(30)))
    assert codes.count(401) >= 10 and codes.count(429) >= 10 and set(codes) == {401, 429}


def test_a_revoked_key_is_refused_at_once(server):
    client = server.new_user("leaver")
    session = client.session()
    assert session.python("1")["stdout"] == "1\n"
    listed = [json.loads(line) for line in server.cli("key", "list", "--json").stdout.splitlines()]
    (row,) = [row for row in listed if row["user"] == "leaver"]
    assert client.key not in json.dumps(listed)
    server.cli("key", "revoke", row["id"])
    harness.wait_for(lambda: client.get("/v1/users/me").status_code == 401, "the key to be refused", bound=5)
    assert client.post("/execute", {"command": "1", "session_id": session.id}).status_code == 401


def test_a_disabled_user_is_refused_and_can_come_back(server):
    client = server.new_user("paused")
    server.cli("user", "disable", "paused")
    harness.wait_for(lambda: client.get("/v1/users/me").status_code == 401, "the user to be refused", bound=5)
    server.cli("user", "enable", "paused")
    harness.wait_for(lambda: client.get("/v1/users/me").status_code == 200, "the user to be let in", bound=5)


def test_keys_are_stored_hashed_and_nowhere_in_the_log(server):
    client = server.new_user("secretive")
    client.run("1")
    for path in server.data.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found = path.read_bytes()
            assert client.key.encode() not in found and server.key.encode() not in found, path
    assert stat.S_IMODE((server.data / "thaw.db").stat().st_mode) & 0o077 == 0


def test_the_first_key_is_made_and_shown_once(start_server):
    server = start_server(key="")
    line = server.ready_line
    first = server.first_key
    assert first.startswith("instavm_sk_") and first not in line
    assert server.client(first).get("/v1/users/me").status_code == 200
    server.kill()
    server.restart()
    assert server.first_key is None, "it was shown twice"
    assert server.client(first).get("/v1/users/me").status_code == 200
