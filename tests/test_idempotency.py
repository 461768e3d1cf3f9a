"""A request that is sent again does not run again."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

import harness

COUNT = "open('/tmp/count', 'a').write('x'); import time; time.sleep({seconds}); 'ran'"


def count(session):
    return len(session.bash("cat /tmp/count 2>/dev/null")["stdout"])


def send(session, code, wait=60, path="/execute", **headers):
    body = {"command": code, "session_id": session.id, "timeout": 60}
    return session.copy().client.post(path, body, timeout=wait, headers=headers)


@pytest.fixture
def idle(server):
    """Whether no command runs on the module's server."""
    return lambda: server.metric("thaw_session_running") == 0


def test_a_retry_after_a_lost_connection_runs_once(session):
    code = COUNT.format(seconds=3)
    with pytest.raises(requests.exceptions.ReadTimeout):
        send(session, code, wait=1)
    # What clients of this API do then: the same body again.
    reply = send(session, code)
    assert reply.status_code == 200 and reply.json()["stdout"] == "'ran'\n"
    assert count(session) == 1


def test_a_retry_gets_an_answer_that_nobody_waited_for(session, idle):
    code = COUNT.format(seconds=1)
    with pytest.raises(requests.exceptions.ReadTimeout):
        send(session, code, wait=0.5)
    harness.wait_for(idle, "the command to end")
    assert send(session, code).json()["stdout"] == "'ran'\n"
    assert count(session) == 1


def test_two_clients_who_both_wait_are_two_requests(session):
    code = COUNT.format(seconds=1)
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: send(session, code), range(2)))
    assert [reply.json()["stdout"] for reply in replies] == ["'ran'\n"] * 2
    assert count(session) == 2


def test_the_same_request_later_runs_again(session):
    code = COUNT.format(seconds=0)
    for _ in range(3):
        assert send(session, code).status_code == 200
    assert count(session) == 3


def test_a_named_request_runs_once_even_when_both_wait(session):
    code, name = COUNT.format(seconds=1), {"Idempotency-Key": str(uuid.uuid4())}
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: send(session, code, **name), range(4)))
    assert len({reply.text for reply in replies}) == 1 and replies[0].status_code == 200
    assert send(session, code, **name).text == replies[0].text
    assert count(session) == 1


def test_a_name_cannot_be_used_for_another_request(session):
    name = {"Idempotency-Key": str(uuid.uuid4())}
    assert send(session, "1", **name).status_code == 200
    reply = send(session, "2", **name)
    assert reply.status_code == 409
    assert reply.json() == {"detail": "This Idempotency-Key was used for a different request"}


def test_a_name_is_checked(session):
    assert send(session, "1", **{"Idempotency-Key": "x" * 256}).status_code == 400
    assert send(session, "1", **{"Idempotency-Key": ""}).status_code == 400


def test_a_named_task_is_one_task_even_after_a_crash(start_server):
    server = start_server()
    session = server.client().session()
    code, name = COUNT.format(seconds=0), {"Idempotency-Key": "task-1"}
    first = send(session, code, path="/execute_async", **name).json()
    session.client.task(first["task_id"])
    server.kill()
    server.restart()
    session = harness.Session(server.client(), session.id)
    again = send(session, code, path="/execute_async", **name)
    assert again.status_code == 200 and again.json()["task_id"] == first["task_id"]
    other = send(session, "'other'", path="/execute_async", **name)
    assert other.status_code == 409


def test_the_official_client_s_retries_run_once(session):
    from instavm import InstaVM

    made = InstaVM(session.client.key, base_url=session.client.url, auto_start_session=False, max_retries=1)
    made.session_id = session.id
    session.python("1")

    # Its first try is cut off from below, as by a network; its own time-out never passes, since
    # the answer comes before it.
    sent = []
    real = made.session.request

    def cut_once(method, url, **more):
        sent.append(url)
        if len(sent) == 1:
            more["timeout"] = 0.5
        return real(method, url, **more)

    made.session.request = cut_once
    out = made.execute(COUNT.format(seconds=2), timeout=30)
    assert len(sent) == 2 and out["stdout"] == "'ran'\n"
    assert count(session) == 1
