"""Limits: each refuses with 429, JSON and Retry-After, and lets go again."""

from concurrent.futures import ThreadPoolExecutor

import pytest

import harness

CONFIG = {"session.max_waiting": 3, "task.max_open": 3, "session.max_vms": 4, "task.wait_for_vm_s": 60}


def refused(reply, words):
    assert reply.status_code == 429, reply.text
    assert int(reply.headers["Retry-After"]) >= 1
    assert set(reply.json()) == {"detail"} and words in reply.json()["detail"]


def test_requests_beyond_the_rate_are_refused(server):
    server.cli("plan", "set", "slow", "--requests-per-minute", "60", "--burst", "5", "--max-vms", "2")
    client = server.new_user("slow", plan="slow")
    replies = [client.get("/v1/users/me") for _ in range(10)]
    codes = [reply.status_code for reply in replies]
    assert codes[0] == 200 and codes[-1] == 429
    refused(replies[-1], "Rate limit exceeded")
    # Every endpoint counts, and nothing runs beyond the rate.
    refused(client.post("/execute", {"command": "1"}), "Rate limit exceeded")
    refused(client.post("/v1/sessions/session", {"api_key": client.key}), "Rate limit exceeded")
    # One a second comes back, and another tenant never noticed.
    assert server.client().get("/v1/users/me").status_code == 200
    harness.wait_for(lambda: client.get("/v1/users/me").status_code == 200, "a request to be allowed", pause=1)


def test_a_plan_s_vms_are_a_limit(server):
    server.cli("plan", "set", "small", "--requests-per-minute", "6000", "--burst", "1000", "--max-vms", "2")
    client = server.new_user("small", plan="small")
    sessions = [client.session() for _ in range(3)]
    for session in sessions[:2]:
        session.python("1")
    reply = client.post("/execute", {"command": "1", "session_id": sessions[2].id})
    refused(reply, "your plan allows 2 VMs at a time")
    sessions[0].kill()
    harness.wait_for(
        lambda: client.post("/execute", {"command": "1", "session_id": sessions[2].id}).status_code == 200,
        "a VM to be free",
    )
    for session in sessions:
        session.kill()


def test_a_task_waits_for_a_vm_instead(server):
    client = server.new_user("patient", plan="small")
    sessions = [client.session() for _ in range(3)]
    for session in sessions[:2]:
        session.python("1")
    task = sessions[2].submit("'at last'")
    reply = client.get(f"/v1/executions/{task}").json()
    assert reply["is_complete"] is False
    sessions[0].kill()
    assert client.task(task)["serialized_stdout"] == "'at last'\n"
    for session in sessions:
        session.kill()


def test_the_host_s_vms_are_a_limit(server):
    client = server.client()
    harness.wait_for(lambda: server.metric("thaw_session_vms") == 0, "earlier VMs to end")
    sessions = [client.session() for _ in range(5)]
    for session in sessions[:4]:
        session.python("1")
    refused(client.post("/execute", {"command": "1", "session_id": sessions[4].id}), "limit of 4 VMs")
    for session in sessions[:4]:
        session.kill()
    harness.wait_for(
        lambda: client.post("/execute", {"command": "1", "session_id": sessions[4].id}).status_code == 200,
        "a VM to be free",
    )
    sessions[4].kill()


def test_a_session_s_line_is_a_limit(session):
    session.python("1")
    copies = [session.copy() for _ in range(8)]
    body = {"session_id": session.id, "timeout": 60}

    def send(pair):
        number, copy = pair
        # Different bodies: equal ones could be taken for repetitions.
        return copy.client.post("/execute", {"command": f"import time; time.sleep(2); {number}", **body})

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(send, enumerate(copies)))
    codes = sorted(reply.status_code for reply in replies)
    assert codes == [200] * 4 + [429] * 4, "one runs, three wait"
    for reply in replies:
        if reply.status_code == 429:
            refused(reply, "3 commands already wait")
    assert session.python("'free'")["stdout"] == "'free'\n"


def test_open_tasks_are_a_limit(server):
    client = server.new_user("eager", plan="small")
    session = client.session()
    tasks = [session.submit("import time; time.sleep(1)") for _ in range(3)]
    reply = client.post("/execute_async", {"command": "1", "session_id": session.id})
    refused(reply, "3 of your tasks wait or run already")
    for task in tasks:
        client.task(task)
    client.task(session.submit("1"))
    session.kill()


@pytest.mark.parametrize("count", [3])
def test_sessions_of_a_tenant_are_a_limit(start_server, count):
    server = start_server(config={"session.max_sessions_per_tenant": count})
    client = server.client()
    sessions = [client.session() for _ in range(count)]
    for session in sessions:
        session.python("1")
    refused(client.post("/v1/sessions/session", {"api_key": client.key}), f"{count} sessions are the most")
    # One without a VM makes room: the one unused for longest is forgotten.
    sessions[1].kill()
    harness.wait_for(
        lambda: client.post("/v1/sessions/session", {"api_key": client.key}).status_code == 200, "room for a session"
    )
    assert client.get(f"/v1/sessions/status/{sessions[1].id}").status_code == 404


def test_a_vm_lives_as_long_as_it_was_said(server):
    session = server.client().session(vm_lifetime_seconds=20)
    session.python("kept = 1")
    left = session.status()["expires_in_seconds"]
    assert 0 < left <= 20
    harness.wait_for(lambda: not session.status()["vm_alive"], "the VM's lifetime to pass", bound=60, pause=1)
    out = session.python("'kept' in globals()")
    assert out["stdout"] == "False\n" and out["vm_restarted"] is True
    session.kill()
