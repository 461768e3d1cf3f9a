"""Idle VMs go to disk by themselves and come back with the next command, as they were."""

import os
import pathlib
import time

from harness import wait_for

CONFIG = {"session.pool.low": 0, "session.pool.high": 0, "snapshot.hibernate_after_s": 1, "session.max_waiting": 200, "snapshot.max_per_tenant": 8}


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


# As many as THAW_SLEEPERS says: CI is content with fewer than the figure of docs/operations.md.
SLEEPERS = int(os.environ.get("THAW_SLEEPERS", "60"))


def resident_kib(pid):
    """Memory of a process, KiB, of its own."""
    rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(("Private_", "Pss_Anon")))


def test_many_hibernated_sessions_take_no_memory_and_all_come_back(start_server):
    server = start_server(config=CONFIG | {"session.max_vms": 40})
    client = server.client()
    warm = client.session(vm_lifetime_seconds=3600)
    warm.python("1")
    asleep(warm)
    before, sessions = resident_kib(server.process.pid), []
    for number in range(SLEEPERS):
        session = client.session(vm_lifetime_seconds=3600)
        # A host that is full for a moment has idle VMs that will hibernate.
        wait_for(lambda: client.post("/execute", {"command": f"mine = {number}", "session_id": session.id}).ok, "a place")
        sessions.append(session)
    wait_for(lambda: not server.workers(), "no process to be left", bound=120)
    each = (resident_kib(server.process.pid) - before) / SLEEPERS
    disk = sum(path.stat().st_blocks * 512 for path in (server.data / "snapshots").rglob("*") if path.is_file())
    print(f"{SLEEPERS} hibernated: {each:.1f} KiB of the server's memory each, {disk / SLEEPERS / 2**20:.2f} MiB on disk each")
    assert each < 256
    took = []
    for number, session in enumerate(sessions):
        began = time.monotonic()
        done = session.python("print(mine)")
        took.append(time.monotonic() - began)
        assert done["stdout"] == f"{number}\n" and not done.get("vm_restarted")
        session.kill()
    took.sort()
    print(f"woken in {took[len(took) // 2] * 1000:.1f} ms p50, {took[len(took) * 99 // 100] * 1000:.1f} ms p99")


def test_a_full_host_makes_room_by_freezing_what_is_idle_longest(start_server):
    config = {"session.max_vms": 2, "session.pool.low": 0, "session.pool.high": 0, "snapshot.pressure_idle_s": 2}
    server = start_server(config=config)
    first, second, third = (server.client().session(vm_lifetime_seconds=3600) for _ in range(3))
    for number, session in enumerate((first, second)):
        session.python(f"mine = {number}")
    # None is idle for long enough.
    reply = third.client.post("/execute", {"command": "1", "session_id": third.id})
    assert reply.status_code == 429 and "limit of 2 VMs" in reply.json()["detail"]
    time.sleep(1.2)
    first.python("mine += 10")
    time.sleep(1.2)
    # Now the second is, and the first is not.
    assert third.python("print('room')")["stdout"] == "room\n"
    assert (status(first), status(second)) == ("active", "suspended")
    time.sleep(2.2)
    done = second.python("print(mine)")
    assert done["stdout"] == "1\n" and not done.get("vm_restarted")
    time.sleep(2.2)
    assert first.python("print(mine)")["stdout"] == "10\n"
    assert sorted(status(each) for each in (first, second, third)) == ["active", "active", "suspended"]
