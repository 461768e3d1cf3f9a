"""Bad requests: each has its exact status and words, and nothing runs."""

import json
import uuid

import pytest

CONFIG = {"server.max_body_bytes": 256 << 10}

ID = str(uuid.uuid4())



STRING = "Input should be a valid string"
INT = "Input should be a valid integer"
UNPARSED = "Input should be a valid integer, unable to parse string as an integer"
LANGUAGE = "Input should be 'python', 'bash' or 'javascript'"
NEITHER = "Value error, either 'command' or 'code' is required"
NUL = "Value error, NUL characters are not allowed"
OBJECT = "Input should be a valid dictionary or object to extract fields from"

# (body, what is wrong with it: type, loc and msg of every fault in order)
BODIES = [
    ({}, [("value_error", [], NEITHER)]),
    ({"command": None, "code": None}, [("value_error", [], NEITHER)]),
    ([], [("model_attributes_type", [], OBJECT)]),
    ("text", [("model_attributes_type", [], OBJECT)]),
    (None, [("model_attributes_type", [], OBJECT)]),
    ({"command": 5}, [("string_type", ["command"], STRING)]),
    ({"command": ["ls"]}, [("string_type", ["command"], STRING)]),
    ({"code": {"a": 1}}, [("string_type", ["code"], STRING)]),
    ({"command": True}, [("string_type", ["command"], STRING)]),
    ({"command": "1", "language": "ruby"}, [("enum", ["language"], LANGUAGE)]),
    ({"command": "1", "language": "Python"}, [("enum", ["language"], LANGUAGE)]),
    ({"command": "1", "language": None}, [("enum", ["language"], LANGUAGE)]),
    ({"command": "1", "language": 3}, [("enum", ["language"], LANGUAGE)]),
    ({"command": "1", "timeout": 0}, [("greater_than_equal", ["timeout"], "Input should be greater than or equal to 1")]),
    ({"command": "1", "timeout": -5}, [("greater_than_equal", ["timeout"], "Input should be greater than or equal to 1")]),
    ({"command": "1", "timeout": 601}, [("less_than_equal", ["timeout"], "Input should be less than or equal to 600")]),
    ({"command": "1", "timeout": 10**30}, [("less_than_equal", ["timeout"], "Input should be less than or equal to 600")]),
    ({"command": "1", "timeout": "soon"}, [("int_parsing", ["timeout"], UNPARSED)]),
    ({"command": "1", "timeout": None}, [("int_type", ["timeout"], INT)]),
    ({"command": "1", "timeout": [1]}, [("int_type", ["timeout"], INT)]),
    (
        {"command": "1", "timeout": 1.5},
        [("int_from_float", ["timeout"], INT + ", got a number with a fractional part")],
    ),
    ({"command": "1", "vault_ids": "v"}, [("list_type", ["vault_ids"], "Input should be a valid list")]),
    (
        {"command": "1", "vault_ids": ["v", 1, None]},
        [("string_type", ["vault_ids", 1], STRING), ("string_type", ["vault_ids", 2], STRING)],
    ),
    ({"command": "a\0b"}, [("value_error", ["command"], NUL)]),
    ({"code": "\0"}, [("value_error", ["code"], NUL)]),
    ({"command": "1", "session_id": 5}, [("string_type", ["session_id"], STRING)]),
    ({"command": "1", "api_key": 5}, [("string_type", ["api_key"], STRING)]),
    (
        {"command": 5, "language": "q", "timeout": "x", "vault_ids": 1},
        [
            ("string_type", ["command"], STRING),
            ("enum", ["language"], LANGUAGE),
            ("int_parsing", ["timeout"], UNPARSED),
            ("list_type", ["vault_ids"], "Input should be a valid list"),
        ],
    ),
]


def shown(body):
    return json.dumps(body)[:60]


@pytest.mark.parametrize("path", ["/execute", "/execute_async"])
@pytest.mark.parametrize("body, faults", BODIES, ids=[shown(body) for body, _ in BODIES])
def test_a_bad_body_is_422_with_every_fault(client, path, body, faults):
    reply = client.http.post(
        client.url + path, data=json.dumps(body), headers={"Content-Type": "application/json"}, timeout=30
    )
    assert reply.status_code == 422, reply.text
    detail = reply.json()["detail"]
    assert [(f["type"], f["loc"], f["msg"]) for f in detail] == [(k, ["body", *loc], msg) for k, loc, msg in faults]
    assert all("input" in f for f in detail)


# (bytes, position, decoder's words): as Python's own decoder has them.
MALFORMED = [
    b"{",
    b'{"command": "1"',
    b'{"command": }',
    b"{'command': 1}",
    b'{"command": "1",}',
    b'{"command": "1"} extra',
    b"nonsense",
    b'{"command": "\x01"}',
    b'{"command" "1"}',
    b'[1, 2',
    b'{"command": "\\x"}',
    "ü{".encode(),
]


@pytest.mark.parametrize("raw", MALFORMED, ids=repr)
def test_malformed_json_is_422_with_position_and_words(client, raw):
    try:
        json.loads(raw)
        raise AssertionError("the test's own mistake: this is JSON")
    except json.JSONDecodeError as error:
        position, words = error.pos, error.msg
    reply = client.http.post(client.url + "/execute", data=raw, timeout=30)
    assert reply.status_code == 422
    assert reply.json()["detail"] == [
        {
            "type": "json_invalid",
            "loc": ["body", position],
            "msg": "JSON decode error",
            "input": {},
            "ctx": {"error": words},
        }
    ]


def test_an_empty_body_is_a_missing_field(client):
    reply = client.http.post(client.url + "/execute", data=b"", timeout=30)
    assert reply.status_code == 422
    assert reply.json()["detail"] == [{"type": "missing", "loc": ["body"], "msg": "Field required", "input": None}]


def test_invalid_utf8_is_400(client):
    reply = client.http.post(client.url + "/execute", data=b'{"command": "\xff\xfe"}', timeout=30)
    assert reply.status_code == 400
    assert reply.json() == {"detail": "There was an error parsing the body"}


def test_deep_nesting_is_refused(client):
    raw = b'{"command": ' + b"[" * 100_000
    reply = client.http.post(client.url + "/execute", data=raw, timeout=30)
    assert reply.status_code == 422 and reply.json()["detail"][0]["type"] == "json_invalid"


@pytest.mark.parametrize("chunked", [False, True])
def test_an_oversized_body_is_413(client, chunked):
    raw = json.dumps({"command": "x" * (300 << 10)}).encode()
    data = iter([raw[:1000], raw[1000:]]) if chunked else raw
    reply = client.http.post(client.url + "/execute", data=data, timeout=30)
    assert reply.status_code == 413
    assert reply.json() == {"detail": f"The request body is larger than {256 << 10} bytes"}
    # The connection, or a new one, serves the next request.
    assert client.get("/v1/users/me").status_code == 200


@pytest.mark.parametrize("text", ["not-a-uuid", "", "../../etc/passwd", "..%2f..%2fetc", "\\..\\", "a" * 1000, "1; ls"])
def test_ids_that_are_not_ids_are_refused(client, text):
    reply = client.post("/execute", {"command": "1", "session_id": text})
    assert reply.status_code == 422
    (found,) = reply.json()["detail"]
    assert (found["type"], found["loc"]) == ("uuid_parsing", ["body", "session_id"])
    assert found["msg"].startswith("Input should be a valid UUID, ")
    reply = client.post("/kill", {"session_id": text})
    assert reply.status_code == 400 and "UUID" in reply.json()["detail"]


@pytest.mark.parametrize("text", ["not-a-uuid", "..%2f..%2fetc%2fpasswd", "%00", "%ff%fe", "a" * 2000, "%2e%2e"])
@pytest.mark.parametrize("path", ["/v1/executions/", "/v1/sessions/session/", "/v1/sessions/status/"])
def test_path_like_ids_in_paths_are_not_found(client, path, text):
    reply = client.get(path + text)
    assert reply.status_code == 404 and set(reply.json()) == {"detail"}


def test_unknown_ids_are_not_found(client):
    for path in ("/execute", "/execute_async"):
        reply = client.post(path, {"command": "1", "session_id": ID})
        assert (reply.status_code, reply.json()) == (404, {"detail": f"no session {ID}"})
    assert client.post("/kill", {"session_id": ID}).status_code == 404
    for path in ("executions", "sessions/session", "sessions/status"):
        assert client.get(f"/v1/{path}/{ID}").status_code == 404


def test_vaults_are_not_found_and_nothing_runs(client, session):
    for path in ("/execute", "/execute_async"):
        body = {"command": "open('/tmp/ran', 'w')", "session_id": session.id, "vault_ids": ["vault_1"]}
        reply = client.post(path, body)
        assert reply.status_code == 404
        assert "vault_1" in reply.json()["detail"] and "nothing was run" in reply.json()["detail"]
    # No list and an empty list are as good as none.
    for none in (None, []):
        assert client.run("import os; os.path.exists('/tmp/ran')", session_id=session.id, vault_ids=none)["stdout"] == "False\n"


@pytest.mark.parametrize("timeout", ["5", " 5 ", 5.0, "5.0", "1_0", True])
def test_numbers_are_read_as_leniently_as_pydantic_reads_them(shared, timeout):
    assert shared.client.post("/execute", {"command": "1", "session_id": shared.id, "timeout": timeout}).status_code == 200


def test_unknown_fields_are_ignored(shared):
    assert shared.python("1", whatever={"a": 1})["stdout"] == "1\n"


SESSIONS = [
    ({"memory_mb": 127}, "greater_than_equal", ["memory_mb"]),
    ({"memory_mb": 8193}, "less_than_equal", ["memory_mb"]),
    ({"vcpu_count": 3}, "literal_error", ["vcpu_count"]),
    ({"vm_lifetime_seconds": 19}, "greater_than_equal", ["vm_lifetime_seconds"]),
    ({"vm_lifetime_seconds": 86401}, "less_than_equal", ["vm_lifetime_seconds"]),
    ({"metadata": []}, "dict_type", ["metadata"]),
    ({"env": {"A": 5}}, "string_type", ["env", "A"]),
    ({"env": {"A=B": "x"}}, "value_error", ["env", "A=B"]),
    ({"env": {"A": "x\0"}}, "value_error", ["env", "A"]),
]


@pytest.mark.parametrize("body, kind, loc", SESSIONS, ids=[shown(body) for body, _, _ in SESSIONS])
def test_bad_session_wishes_are_422(client, body, kind, loc):
    reply = client.post("/v1/sessions/session", {"api_key": client.key, **body})
    assert reply.status_code == 422
    assert [(f["type"], f["loc"]) for f in reply.json()["detail"]] == [(kind, ["body", *loc])]


def test_secrets_are_never_sent_back(client):
    reply = client.post("/execute", {"api_key": client.key, "env": {"A": "hush"}})
    assert reply.status_code == 422
    assert client.key not in reply.text and "hush" not in reply.text
