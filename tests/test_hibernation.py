"""Idle VMs go to disk by themselves and come back with the next command, as they were."""

import asyncio
import os
import pathlib
import time

import websockets

from harness import SLOW, wait_for

CONFIG = {"session.pool.low": 0, "session.pool.high": 0, "snapshot.hibernate_after_s": SLOW, "session.max_waiting": 200, "snapshot.max_per_tenant": 8}


def status(session):
    return session.client.get(f"/v1/sessions/status/{session.id}").json()["vm_status"]


def asleep(session):
    wait_for(lambda: status(session) == "suspended", "it to hibernate", bound=30)


def beat(session):
    # While it is written it is empty for a moment.
    return int(wait_for(lambda: session.run("cat /tmp/beat", language="bash")["stdout"].strip(), "a beat"))


def test_an_idle_session_hibernates_and_wakes_as_it_was(start_server):
    server = start_server(config=CONFIG)
    session = server.client().session(vm_lifetime_seconds=3600)
    session.python("state = {'n': 1}; open('/root/kept', 'w').write('file')")
    session.run("n=0; while :; do n=$((n + 1)); echo $n > /tmp/beat; sleep 0.05; done & echo $! > /tmp/pid", language="bash")
    before = server.workers()
    asleep(session)
    wait_for(lambda: len(server.workers()) < len(before), "its process to be gone")
    began = time.monotonic()
    done = session.python("state['n'] += 1; print(state, open('/root/kept').read())")
    print("woken after", time.monotonic() - began, "s")
    assert done["stdout"] == "{'n': 2} file\n" and not done.get("vm_restarted"), done
    first = beat(session)
    time.sleep(0.3)
    assert beat(session) > first, "the background process stands still"


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


def test_with_hibernation_a_stop_of_the_server_ends_no_session(start_server):
    server = start_server(config=CONFIG | {"snapshot.hibernate_after_s": 600})
    sessions = [server.client().session(vm_lifetime_seconds=3600) for _ in range(5)]
    for number, session in enumerate(sessions):
        session.python(f"mine = {number}")
    server.terminate()
    assert server.wait() == 0
    server.restart()
    for number, session in enumerate(sessions):
        session.client = server.client()
        assert status(session) == "suspended"
        done = session.python("print(mine)")
        assert done["stdout"] == f"{number}\n" and not done.get("vm_restarted")


def test_a_hibernated_session_that_cannot_wake_gets_a_fresh_vm(start_server):
    server = start_server(config=CONFIG)
    session = server.client().session(vm_lifetime_seconds=3600)
    session.python("kept = 1")
    asleep(session)
    # As if another thaw had frozen it.
    [manifest] = (server.data / "snapshots").glob("*/manifest.json")
    manifest.write_text(manifest.read_text().replace('"wire": 2', '"wire": 1'))
    done = session.python("print('kept' in globals())")
    assert done["stdout"] == "False\n" and done["vm_restarted"] is True
    wait_for(lambda: not manifest.exists(), "what cannot be restored to be removed")


def terminal(server, session, command):
    """A terminal, and where it is looked at."""
    opened = session.client.post(f"/v1/sessions/{session.id}/pty/sessions", {"command": command})
    assert opened.status_code == 200, opened.text
    id = opened.json()["id"]
    return id, f"ws{server.url[4:]}/v1/sessions/{session.id}/pty/{id}/connect?api_key={server.key}"


def test_a_session_that_is_used_or_looked_at_stays(start_server):
    server = start_server(config=CONFIG)
    session = server.client().session(vm_lifetime_seconds=3600)
    long = session.python(f"import time; time.sleep({3 * SLOW}); print('done')")
    assert long["stdout"] == "done\n"
    _, url = terminal(server, session, "cat")

    async def look():
        async with websockets.connect(url):
            await asyncio.sleep(3 * SLOW)
            assert status(session) == "active"

    asyncio.run(look())
    asleep(session)


def test_terminals_sleep_and_wake_with_their_session(start_server):
    server = start_server(config=CONFIG)
    session = server.client().session(vm_lifetime_seconds=3600)
    shell, url = terminal(server, session, "exec bash --norc -i")
    _, editor = terminal(server, session, "trap 'echo drawn anew' WINCH; while :; do sleep 0.2; done")

    async def until(ws, wanted):
        seen = b""
        while wanted not in seen:
            seen += await asyncio.wait_for(ws.recv(), 30 * SLOW)
        return seen

    async def before():
        async with websockets.connect(url) as ws:
            await ws.send(b"mine=$((6 * 7)); cd /var; (sleep 1000; :) & echo job $!;\n")
            await until(ws, b"job ")

    async def after():
        # Looking at one wakes the VM, with both.
        async with websockets.connect(url) as ws:
            await ws.send(b"echo it is $mine in $PWD; jobs\n")
            seen = await until(ws, b"Running")
            assert b"it is 42 in /var" in seen, seen
        async with websockets.connect(editor) as ws:
            await until(ws, b"drawn anew")

    asyncio.run(before())
    for _ in range(2):
        asleep(session)
        wait_for(lambda: not server.workers(), "the VM to be gone")
        alive = session.client.get(f"/v1/sessions/{session.id}/pty/sessions/{shell}").json()
        assert alive["alive"] is True
        asyncio.run(after())
    # A copy has the programs, but nobody looks at its terminals: they are hung up.
    vm = session.status()["vm_id"]
    fork = session.client.post(f"/v1/vms/{vm}/fork", {"count": 1}).json()["forks"][0]
    body = {"command": "pgrep -cf '[n]orc -i$'", "language": "bash", "session_id": fork["session_id"]}
    wait_for(lambda: session.client.post("/execute", body).json()["stdout"] == "0\n", "its terminals to be hung up")
    # The shell, and its job.
    assert session.bash("pgrep -cf '[n]orc -i$'")["stdout"] == "2\n"
    # Hung up while it sleeps, it ends when it wakes.
    asleep(session)
    session.client.http.delete(f"{session.client.url}/v1/sessions/{session.id}/pty/sessions/{shell}")
    session.bash("true")
    wait_for(lambda: session.bash("pgrep -cf '[n]orc -i$'")["stdout"] == "0\n", "the shell to be hung up")


def test_terminals_of_a_suspended_vm_are_there_after_a_restart(start_server):
    server = start_server(config=CONFIG)
    session = server.client().session(vm_lifetime_seconds=3600)
    session.python("1")
    id, url = terminal(server, session, "exec bash --norc -i")

    async def say(url, line, wanted):
        async with websockets.connect(url) as ws:
            await ws.send(line)
            seen = b""
            while wanted not in seen:
                seen += await asyncio.wait_for(ws.recv(), 30 * SLOW)

    asyncio.run(say(url, b"mine=$((40 + 2)); echo r$mine\n", b"r42"))
    asleep(session)
    server.kill()
    server.restart()
    session.client = server.client()
    [known] = session.client.get(f"/v1/sessions/{session.id}/pty/sessions").json()["sessions"]
    assert known["id"] == id and known["alive"] is True
    url = f"ws{server.url[4:]}/v1/sessions/{session.id}/pty/{id}/connect?api_key={server.key}"
    asyncio.run(say(url, b"echo again $mine\n", b"again 42"))


def test_whoever_looks_at_a_terminal_stays_through_a_suspension(start_server):
    server = start_server(config=CONFIG)
    session = server.client().session(vm_lifetime_seconds=3600)
    session.python("1")
    _, url = terminal(server, session, "exec cat")
    vm = session.status()["vm_id"]

    async def look():
        async with websockets.connect(url) as ws:
            await ws.send(b"one\n")
            while b"one" not in await asyncio.wait_for(ws.recv(), 30 * SLOW):
                pass
            act = lambda what: asyncio.to_thread(session.client.post, f"/v1/vms/{vm}/{what}", {})
            assert (await act("suspend")).status_code == 200
            # Typed while it sleeps, it arrives when it wakes.
            await ws.send(b"two\n")
            assert (await act("resume")).status_code == 200
            seen = b""
            while seen.count(b"two") < 2:
                seen += await asyncio.wait_for(ws.recv(), 30 * SLOW)

    asyncio.run(look())


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
