"""Files into and out of a session's VM."""

import hashlib
import json
import os
import threading

import pytest
from instavm import InstaVM


def url(session, rest=""):
    return f"{session.client.url}/v1/sessions/{session.id}/files{rest}"


def ask(session, method, rest="", **how):
    return session.client.http.request(method, url(session, rest), timeout=60, **how)


def put(session, path, data, **query):
    return ask(session, "PUT", params={"path": path, **query}, data=data)


@pytest.fixture
def vm(server):
    made = InstaVM(server.key, base_url=server.url)
    yield made
    server.client().post("/kill", {"session_id": made.session_id})


@pytest.mark.parametrize("size", [0, 1, 3 * 48 * 1024, 1_000_003])
def test_the_official_client_s_upload_and_download_round_trip(vm, tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "in").write_bytes(data)
    written = vm.upload_file(str(tmp_path / "in"), "/srv/deep/er/out.bin")
    assert written["success"] is True and written["size"] == size
    assert vm.execute("stat -c %s /srv/deep/er/out.bin", "bash")["stdout"] == f"{size}\n"
    vm.download_file("/srv/deep/er/out.bin", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data


def test_a_hundred_mebibytes_stay_whole(session):
    data = os.urandom(1 << 20) * 100
    assert put(session, "/tmp/big", data).json() == {"success": True, "path": "/tmp/big", "size": len(data)}
    digest = hashlib.sha256(data).hexdigest()
    assert session.bash("sha256sum /tmp/big")["stdout"].split()[0] == digest
    back = ask(session, "GET", params={"path": "/tmp/big"})
    assert back.status_code == 200 and hashlib.sha256(back.content).hexdigest() == digest


def test_files_move_while_a_command_runs(session):
    session.python("1")
    busy = threading.Thread(target=lambda: session.copy().python("import time; time.sleep(3)"))
    busy.start()
    assert put(session, "note", "text").status_code == 200
    assert ask(session, "GET", params={"path": "note"}).text == "text"
    assert busy.is_alive()
    busy.join()
    assert session.bash("cat ~/note")["stdout"] == "text"


def test_a_tree_is_made_listed_changed_and_removed(session):
    assert ask(session, "POST", "/mkdir", json={"path": "/tmp/t/a", "parents": True}).status_code == 200
    assert ask(session, "POST", "/mkdir", json={"path": "/tmp/t/a"}).status_code == 409
    assert put(session, "/tmp/t/a/run.sh", "echo ran", mode="755").status_code == 200
    assert session.bash("/tmp/t/a/run.sh")["stdout"] == "ran\n"
    entries = ask(session, "GET", "/list", params={"path": "/tmp/t", "recursive": "true"}).json()
    assert [entry["path"] for entry in entries["entries"]] == ["/tmp/t/a", "/tmp/t/a/run.sh"]
    assert entries["truncated"] is False
    assert ask(session, "GET", "/list", params={"path": "/usr/bin", "limit": 3}).json()["truncated"] is True
    assert ask(session, "POST", "/rename", json={"from": "/tmp/t/a/run.sh", "to": "/tmp/t/b"}).status_code == 200
    info = ask(session, "GET", "/stat", params={"path": "/tmp/t/b"}).json()
    assert (info["kind"], info["size"], info["mode"]) == ("file", 8, 0o755)
    assert ask(session, "DELETE", params={"path": "/tmp/t"}).status_code == 409
    assert ask(session, "DELETE", params={"path": "/tmp/t", "recursive": 1}).status_code == 200
    assert ask(session, "GET", "/stat", params={"path": "/tmp/t"}).status_code == 404


CASES = [
    ("GET", {"path": "/nope"}, 404),
    ("GET", {"path": "/tmp"}, 409),
    ("GET", {"path": ""}, 400),
    ("GET", {"path": "a\0b"}, 400),
    ("GET", {"path": "x" * 5000}, 400),
    ("GET", {}, 422),
    ("PUT", {"path": "/proc/x"}, 404),
    ("PUT", {"path": "/missing/x"}, 404),
    ("PUT", {"path": "/tmp"}, 409),
    ("PUT", {"path": "/tmp/x", "mode": "9"}, 422),
    ("DELETE", {"path": "/", "recursive": "true"}, 409),
]


@pytest.mark.parametrize("method, query, status", CASES)
def test_what_cannot_be_is_said_in_the_status(shared, method, query, status):
    reply = ask(shared, method, params=query)
    assert reply.status_code == status and reply.json()["detail"], reply.text


def test_a_device_that_never_answers_holds_up_nobody(session):
    session.bash("mkfifo /tmp/fifo")
    assert ask(session, "GET", params={"path": "/tmp/fifo"}).status_code == 400
    assert ask(session, "GET", params={"path": "/dev/zero"}).status_code == 400
    assert session.python("'alive'")["stdout"] == "'alive'\n"


def test_half_an_upload_leaves_nothing(session):
    put(session, "/tmp/kept", "old")

    def broken():
        yield b"new"
        raise ConnectionError("the client goes away")

    with pytest.raises(Exception):
        session.client.copy().http.put(url(session), params={"path": "/tmp/kept"}, data=broken(), timeout=30)
    session.bash("sleep 1")
    assert ask(session, "GET", params={"path": "/tmp/kept"}).text == "old"
    assert put(session, "/tmp/kept", "newer").status_code == 200
    assert session.bash("ls -A /tmp")["stdout"].count("thaw-upload") == 0


def test_a_full_vm_says_so_and_lives(session):
    reply = put(session, "/tmp/too-big", (b"x" * (1 << 20) for _ in range(700)))
    assert reply.status_code in (409, 413), reply.text
    assert session.python("'alive'")["stdout"] == "'alive'\n"


def test_a_form_without_its_parts_is_422(client):
    reply = client.http.post(client.url + "/upload", files={"file": ("x", b"1")}, timeout=30)
    assert reply.status_code == 422
    assert {fault["loc"][1] for fault in reply.json()["detail"]} == {"remote_path", "session_id"}
    assert client.http.post(client.url + "/download", data={"filename": "x"}, timeout=30).status_code == 422


def test_somebody_else_s_session_has_no_files(server, session):
    put(session, "/tmp/mine", "1")
    other = server.new_user("files-other")
    for method, rest in [("GET", ""), ("PUT", ""), ("DELETE", ""), ("GET", "/list"), ("GET", "/stat"), ("GET", "/watch")]:
        reply = other.http.request(method, url(session, rest), params={"path": "/tmp/mine"}, timeout=30)
        assert reply.status_code == 404, (method, rest)
    form = {"filename": "/tmp/mine", "session_id": session.id}
    assert other.http.post(other.url + "/download", data=form, timeout=30).status_code == 404


def test_changes_are_told(session):
    session.bash("mkdir /tmp/w")
    reply = session.client.copy().http.get(url(session, "/watch"), params={"path": "/tmp/w", "recursive": 1}, stream=True, timeout=30)
    lines = reply.iter_lines(decode_unicode=True)

    def event():
        name = next(line for line in lines if line.startswith("event: ")).removeprefix("event: ")
        return name, json.loads(next(line for line in lines if line.startswith("data: ")).removeprefix("data: "))

    assert event()[0] == "ready"
    session.bash("mkdir /tmp/w/d; echo x > /tmp/w/d/f")
    seen = []
    while ("created", {"path": "/tmp/w/d/f"}) not in seen:
        seen.append(event())
    session.bash("rm -r /tmp/w")
    while seen[-1][0] != "end":
        seen.append(event())
    assert ("removed", {"path": "/tmp/w/d/f"}) in seen
