"""Recorded sessions: every command is a step, with a checkpoint before it, to go back to or to branch from."""

import json

import pytest
from instavm import InstaVM

from harness import wait_for

CONFIG = {"session.pool.low": 1, "session.pool.high": 2, "snapshot.checkpoints_per_tape": 5}


def lines(server, *words):
    done = server.cli("session", "--json", *words)
    return [json.loads(line) for line in done.stdout.splitlines()]


def record(session):
    reply = session.client.post(f"/v1/sessions/{session.id}/tape/start", {})
    assert reply.status_code == 200, reply.text
    return reply.json()


def checkpoints(server):
    shown = server.cli("snapshot", "--json", "list", "--all").stdout.splitlines()
    return [one for one in map(json.loads, shown) if one["kind"] == "checkpoint"]


def test_a_session_goes_back_and_comes_back_and_branches(server):
    session = server.client().session(vm_lifetime_seconds=600)
    session.python("x = 0")
    tape = record(session)
    assert tape["status"] == "recording" and record(session)["id"] == tape["id"]
    for number in (1, 2, 3):
        session.python(f"x += {number}; open('/root/{number}', 'w').write('{number}' * 10)")
    session.bash("exit 3")
    events = lines(server, "log", session.id)
    starts = [one for one in events if one["kind"] == "tool_call_start"]
    ends = {one["step_id"]: one["payload"] for one in events if one["kind"] == "tool_call_end"}
    assert [one["step_id"] for one in starts] == [1, 2, 3, 4] and all(one["checkpoint_id"] for one in starts)
    assert starts[1]["payload"]["code"].startswith("x += 2") and starts[3]["payload"]["language"] == "bash"
    assert [ends[step]["exit_code"] for step in (1, 2, 3, 4)] == [0, 0, 0, 3]
    [diff] = lines(server, "diff", session.id, "2", "4")
    assert {"/root/2", "/root/3"} <= set(diff["changed_paths"]) and "/root/1" not in diff["changed_paths"]
    # A branch begins before step 3, and is on its own.
    [branch] = lines(server, "branch", session.id, "--at", "3")
    run = lambda session_id, code: session.client.post("/execute", {"command": code, "session_id": session_id}).json()
    assert run(branch["session_id"], "x")["stdout"] == "3\n"
    assert run(branch["session_id"], "x = 'branched'")["exit_code"] == 0
    own = session.client.get(f"/v1/tapes/{branch['tape_id']}").json()
    assert (own["parent_tape_id"], own["parent_step_id"], own["total_steps"]) == (tape["id"], 3, 2)
    # The session itself goes back to before step 2, without the client noticing anything but the past.
    [back] = lines(server, "rewind", session.id, "--to", "2")
    again = session.python("print(x, __import__('os').path.exists('/root/2'))")
    assert again["stdout"] == "1 False\n" and not again.get("vm_restarted")
    # And forth again.
    server.cli("session", "rewind", session.id, "--to", str(back["step_id"]))
    assert session.python("x")["stdout"] == "6\n"
    assert run(branch["session_id"], "x")["stdout"] == "'branched'\n"
    shown = server.cli("session", "log", session.id).stdout
    assert "(back to before step 2)" in shown and "x += 2" in shown and branch["session_id"] in shown


def test_a_tape_keeps_so_many_checkpoints_and_gives_them_back(start_server):
    server = start_server(config=CONFIG)
    session = server.client().session(vm_lifetime_seconds=600)
    tape = record(session)
    for number in range(9):
        session.python(f"n = {number}")
    starts = [one for one in lines(server, "log", session.id) if one["kind"] == "tool_call_start"]
    assert [bool(one["checkpoint_id"]) for one in starts] == [False] * 4 + [True] * 5
    assert sorted(one["id"] for one in checkpoints(server)) == sorted(one["checkpoint_id"] for one in starts[4:])
    done = server.cli("session", "rewind", session.id, "--to", "2", check=False)
    assert done.returncode == 1 and "step 2" in done.stderr and "no checkpoint" in done.stderr
    assert session.python("n")["stdout"] == "8\n", "a rewind that is refused changes nothing"
    # Checkpoints are none of the snapshots that a user made.
    client = session.client
    assert client.get("/v1/snapshots").json() == []
    assert client.get(f"/v1/snapshots/{starts[8]['checkpoint_id']}").status_code == 404
    # The tape goes on after kill -9, and its checkpoints are there.
    server.kill()
    server.restart()
    session.client = client = server.client()
    assert session.python("'n' in globals()")["stdout"] == "False\n"
    [branch] = lines(server, "branch", session.id, "--at", "9")
    body = {"command": "n", "session_id": branch["session_id"]}
    assert client.post("/execute", body).json()["stdout"] == "7\n"
    assert client.get(f"/v1/tapes/{tape['id']}").json()["total_steps"] == 11
    # Stopped, nothing is added; deleted, nothing is left.
    assert lines(server, "stop", session.id)[0]["status"] == "stopped"
    session.python("1")
    assert client.get(f"/v1/tapes/{tape['id']}").json()["total_steps"] == 11
    for one in client.get("/v1/tapes").json():
        assert client.http.delete(f"{client.url}/v1/tapes/{one['id']}").status_code == 200
    assert not checkpoints(server) and client.get("/v1/tapes").json() == []


def test_the_official_client_s_tapes(server):
    api = InstaVM(server.key, base_url=server.url)
    try:
        api.execute("rows = [1]")
        tape = api.tapes.start(api.session_id)
        api.execute("rows.append(2); open('/root/rows', 'w').write(str(rows))")
        api.execute("rows.append(3)")
        assert [one["id"] for one in api.tapes.list(session_id=api.session_id)] == [tape["id"]]
        assert api.tapes.list(status="stopped") == []
        step = api.tapes.append_event(tape["id"], "llm_call", {"model": "m"})["step_id"]
        assert api.tapes.append_event(tape["id"], "tool_call_end", {"ok": True}, step_id=step)["step_id"] == step == 3
        assert [one["kind"] for one in api.tapes.events(tape["id"], after_step=2)] == ["llm_call", "tool_call_end"]
        assert api.tapes.events(tape["id"], kind="llm_call")[0]["payload"] == {"model": "m"}
        lanes = api.tapes.lanes(tape["id"])["lanes"]
        assert lanes == {"fs_summary": 2, "llm_call": 1, "tool_call_end": 3, "tool_call_start": 2}
        files = [one["payload"] for one in api.tapes.events(tape["id"], kind="fs_summary")]
        assert "/root/rows" in files[0]["changed_paths"] and "/root/rows" not in files[1]["changed_paths"], files
        assert files[0]["count"] < 20
        diff = api.tapes.diff(tape["id"], 1, 2)
        assert "/root/rows" in diff["changed_paths"] and diff["mode"] == "fs"
        branch = api.tapes.branch(tape["id"], at_step=2)
        other = InstaVM(server.key, base_url=server.url, auto_start_session=False)
        other.session_id = branch["session_id"]
        assert other.execute("rows")["stdout"] == "[1, 2]\n"
        assert api.execute("rows")["stdout"] == "[1, 2, 3]\n"
        assert api.tapes.export(tape["id"])["format"] and api.tapes.stop(tape["id"])["status"] == "stopped"
        assert api.tapes.delete(tape["id"])["success"]
        assert api.tapes.get(branch["tape_id"])["parent_tape_id"] == tape["id"]
    finally:
        api.kill()


def test_a_hibernating_session_goes_back_too(start_server):
    server = start_server(config=CONFIG | {"snapshot.hibernate_after_s": 1, "session.pool.low": 0})
    session = server.client().session(vm_lifetime_seconds=600)
    record(session)
    session.python("y = 1")
    session.python("y = 2")
    wait_for(lambda: session.status()["vm_status"] == "suspended", "it to hibernate")
    lines(server, "rewind", session.id, "--to", "2")
    assert session.python("y")["stdout"] == "1\n"


@pytest.mark.parametrize("step", ["0", "99"])
def test_steps_that_are_none_are_refused(server, step):
    session = server.client().session()
    tape = record(session)
    session.python("1")
    reply = session.client.post(f"/v1/tapes/{tape['id']}/rewind", {"to_step": int(step)})
    assert reply.status_code == (422 if step == "0" else 404), reply.text
    other = server.new_user(f"other{step}")
    assert other.get(f"/v1/tapes/{tape['id']}").status_code == 404
    assert other.post(f"/v1/tapes/{tape['id']}/branch", {"at_step": 1}).status_code == 404
    assert other.post(f"/v1/sessions/{session.id}/tape/start", {}).status_code == 404
