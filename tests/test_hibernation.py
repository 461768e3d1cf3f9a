"""Idle VMs go to disk by themselves and come back with the next command, as they were."""

import time

import pytest

from harness import wait_for

CONFIG = {"session.pool.low": 0, "session.pool.high": 0, "snapshot.hibernate_after_s": 1, "session.max_waiting": 200}


def status(session):
    return session.client.get(f"/v1/sessions/status/{session.id}").json()["vm_status"]


def asleep(session):
    wait_for(lambda: status(session) == "suspended", "it to hibernate", bound=30)


def test_an_idle_session_hibernates_and_wakes_as_it_was(start_server):
    server = start_server(config=CONFIG)
    session = server.client().session(vm_lifetime_seconds=3600)
    session.python("state = {'n': 1}; open('/root/kept', 'w').write('file')")
    session.run("for n in $(seq 1000000); do echo $n > /tmp/beat; sleep 0.05; done & echo $! > /tmp/pid", language="bash")
    before = server.workers()
    asleep(session)
    wait_for(lambda: len(server.workers()) < len(before), "its process to be gone")
    began = time.monotonic()
    done = session.python("state['n'] += 1; print(state, open('/root/kept').read())")
    print("woken after", time.monotonic() - began, "s")
    assert done["stdout"] == "{'n': 2} file\n" and not done.get("vm_restarted"), done
    first = int(session.run("cat /tmp/beat", language="bash")["stdout"])
    time.sleep(0.3)
    assert int(session.run("cat /tmp/beat", language="bash")["stdout"]) > first, "the background process stands still"


def test_a_hibernated_session_survives_the_server_and_ends_with_its_lifetime(start_server):
    server = start_server(config=CONFIG)
    session = server.client().session(vm_lifetime_seconds=3600)
    short = server.client().session(vm_lifetime_seconds=20)
    for each in (session, short):
        each.python("kept = 'yes'")
    made = time.monotonic()
    for each in (session, short):
        asleep(each)
    server.kill()
    server.restart()
    session.client = short.client = server.client()
    assert session.python("kept")["stdout"] == "'yes'\n"
    wait_for(lambda: status(short) != "suspended", "its lifetime to pass", bound=30)
    assert time.monotonic() - made > 18
    again = short.python("print('kept' in globals())")
    assert again["stdout"] == "False\n" and again["vm_restarted"] is True, again


def test_a_session_that_is_used_or_has_a_terminal_stays(start_server):
    server = start_server(config=CONFIG)
    session = server.client().session(vm_lifetime_seconds=3600)
    long = session.python("import time; time.sleep(3); print('done')")
    assert long["stdout"] == "done\n"
    opened = session.client.post(f"/v1/sessions/{session.id}/pty/sessions", {"command": "cat"})
    assert opened.status_code == 200, opened.text
    time.sleep(4)
    assert status(session) == "active"


@pytest.mark.parametrize("count", [12])
def test_many_hibernated_sessions_take_no_memory_and_all_come_back(start_server, count):
    server = start_server(config=CONFIG)
    sessions = [server.client().session(vm_lifetime_seconds=3600) for _ in range(count)]
    for number, session in enumerate(sessions):
        session.python(f"mine = {number}")
    for session in sessions:
        asleep(session)
    wait_for(lambda: not server.workers(), "no process to be left")
    for number, session in enumerate(sessions):
        assert session.python("print(mine)")["stdout"] == f"{number}\n"
