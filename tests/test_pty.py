"""Terminals over WebSocket, as the official client frames them."""

import asyncio
import json
import os
import pty
import select
import signal
import sys
import time

import pytest
import websockets
from instavm import InstaVM


@pytest.fixture
def vm(server):
    made = InstaVM(server.key, base_url=server.url)
    made.execute("1")
    yield made
    server.client().post("/kill", {"session_id": made.session_id})


async def until(ws, wanted):
    seen = b""
    while wanted not in seen:
        message = await asyncio.wait_for(ws.recv(), 30)
        assert isinstance(message, bytes), (message, seen)
        seen += message
    return seen


async def rest(ws):
    """All messages until the socket is closed, and the close code."""
    messages = []
    try:
        while True:
            messages.append(await asyncio.wait_for(ws.recv(), 30))
    except websockets.ConnectionClosed as closed:
        return messages, closed.rcvd.code


def test_a_terminal_is_created_used_resized_and_ends_with_its_code(vm):
    made = vm.pty.create(vm.session_id, cols=91, rows=33)
    assert made["session_id"] == made["id"] and made["alive"] is True

    async def use():
        async with websockets.connect(vm.pty.ws_url(vm.session_id, made["session_id"])) as ws:
            await ws.send(b"stty size; echo $TERM\n")
            assert b"33 91" in await until(ws, b"xterm-256color")
            await ws.send(json.dumps({"type": "resize", "cols": 120, "rows": 40}))
            await ws.send(b"stty size\n")
            await until(ws, b"40 120")
            await ws.send("not json")
            await ws.send(b"exit 7\n")
            messages, code = await rest(ws)
            assert json.loads(messages[-1]) == {"type": "exit", "exit_code": 7} and code == 1000

    asyncio.run(use())
    found = vm.pty.get(vm.session_id, made["id"])
    assert found["alive"] is False and found["exit_code"] == 7 and (found["cols"], found["rows"]) == (120, 40)
    assert [each["id"] for each in vm.pty.list(vm.session_id)] == [made["id"]]
    vm.pty.kill(vm.session_id, made["id"])
    assert vm.pty.list(vm.session_id) == []


def test_a_terminal_is_reconnected_to_with_what_was_missed(vm):
    made = vm.pty.create(vm.session_id, pty_id="mine")
    assert made["id"] == "mine"
    where = vm.pty.ws_url(vm.session_id, "mine")

    async def use():
        async with websockets.connect(where) as ws:
            await ws.send(b"sleep 1; echo miss''ed; v=kept\n")
            await until(ws, b"sleep")
        await asyncio.sleep(2)
        async with websockets.connect(where) as ws:
            await until(ws, b"missed")
            # Another viewer takes over.
            async with websockets.connect(where) as second:
                assert (await rest(ws))[1] == 1000
                await second.send(b"echo $v''!\n")
                await until(second, b"kept!")

    asyncio.run(use())


def test_a_command_line_and_a_shell_are_what_runs(vm):
    async def output(made):
        async with websockets.connect(vm.pty.ws_url(vm.session_id, made["id"])) as ws:
            messages, _ = await rest(ws)
            return b"".join(m for m in messages if isinstance(m, bytes)), json.loads(messages[-1])

    line = vm.pty.create(vm.session_id, login_command="echo one && echo $((1 + 1)); exit 3")
    text, end = asyncio.run(output(line))
    assert text.split() == [b"one", b"2"] and end["exit_code"] == 3
    missing = vm.pty.create(vm.session_id, command="/no/such/shell")
    text, end = asyncio.run(output(missing))
    assert end["exit_code"] == 127 and b"thaw:" in text


def test_by_the_vm_and_killed(vm, server):
    vm_id = server.client().get(f"/v1/sessions/status/{vm.session_id}").json()["vm_id"]
    made = vm.pty.create_for_vm(vm_id)

    async def use():
        async with websockets.connect(vm.pty.ws_url_for_vm(vm_id, made["id"])) as ws:
            await ws.send(b"echo h''i\n")
            await until(ws, b"hi")
            await asyncio.get_running_loop().run_in_executor(None, vm.pty.kill_for_vm, vm_id, made["id"])
            messages, code = await rest(ws)
            assert json.loads(messages[-1])["type"] == "exit" and code == 1000

    asyncio.run(use())


def test_refusals_are_close_codes_before_anything_is_sent(vm, server):
    made = vm.pty.create(vm.session_id)
    good = vm.pty.ws_url(vm.session_id, made["id"])
    other = server.new_user("pty-other")

    async def code(where):
        async with websockets.connect(where) as ws:
            messages, code = await rest(ws)
            assert messages == []
            return code

    assert asyncio.run(code(good.replace("api_key=", "api_key=x"))) == 4401
    assert asyncio.run(code(good.split("?")[0])) == 4401
    assert asyncio.run(code(good.replace(server.key, other.key))) == 4502
    assert asyncio.run(code(vm.pty.ws_url(vm.session_id, "nope"))) == 4502
    assert other.get(f"/v1/sessions/{vm.session_id}/pty/sessions").status_code == 404
    plain = server.client().get(f"/v1/sessions/{vm.session_id}/pty/{made['id']}/connect")
    assert plain.status_code == 426 and plain.json()["detail"]
    assert server.key not in server.log(), "keys in queries must not be logged"


BAD = [{"cols": 0}, {"rows": 1001}, {"cols": "x"}, {"id": "a/b"}, {"command": ""}, {"shell": "a\0b"}, {"command": "x" * 40000}]


@pytest.mark.parametrize("body", BAD)
def test_bad_wishes_are_422(shared, body):
    reply = shared.client.post(f"/v1/sessions/{shared.id}/pty/sessions", body)
    assert reply.status_code == 422, reply.text


def test_floods_and_deaf_viewers_cost_their_terminal_only(vm):
    made = vm.pty.create(vm.session_id, login_command="yes")

    async def use():
        async with websockets.connect(vm.pty.ws_url(vm.session_id, made["id"]), max_queue=1) as ws:
            await asyncio.sleep(2)
            assert vm.execute("1 + 1")["stdout"] == "2\n"
            await until(ws, b"y")

    asyncio.run(use())
    # Nobody looks on: it runs on against a bounded memory.
    time.sleep(1)
    assert vm.execute("1 + 1")["stdout"] == "2\n"
    vm.pty.kill(vm.session_id, made["id"])


def test_terminals_are_bounded_and_end_with_their_vm(vm, server):
    made = [vm.pty.create(vm.session_id, login_command="sleep 600")["id"] for _ in range(32)]
    reply = server.client().post(f"/v1/sessions/{vm.session_id}/pty/sessions", {})
    assert reply.status_code == 429, reply.text

    async def use():
        async with websockets.connect(vm.pty.ws_url(vm.session_id, made[0])) as ws:
            server.client().post("/kill", {"session_id": vm.session_id})
            messages, code = await rest(ws)
            assert json.loads(messages[-1]) == {"type": "exit", "exit_code": 137} and code == 1000
            assert b"killed" in messages[0]

    asyncio.run(use())


def test_the_client_s_command_line_is_usable(vm, server, tmp_path):
    """`instavm pty` on a real terminal of its own."""
    vm_id = server.client().get(f"/v1/sessions/status/{vm.session_id}").json()["vm_id"]
    env = dict(os.environ, HOME=str(tmp_path), INSTAVM_BASE_URL=server.url, INSTAVM_API_KEY=server.key, TERM="xterm")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "instavm", "pty", vm_id], env)
    try:
        seen = b""

        def wait(wanted):
            nonlocal seen
            end = time.monotonic() + 60
            while wanted not in seen:
                assert time.monotonic() < end, seen
                if select.select([terminal], [], [], 1)[0]:
                    seen += os.read(terminal, 65536)
            seen = seen.split(wanted, 1)[1]

        wait(b"# ")
        os.write(terminal, b"top -b -n 1 | head -1; echo do''ne\r")
        wait(b"done")
        os.write(terminal, b"exit\r")
        # A terminal whose program has gone answers an error when it is read.
        end = time.monotonic() + 30
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            assert time.monotonic() < end, seen
            try:
                if select.select([terminal], [], [], 0.1)[0]:
                    seen += os.read(terminal, 65536)
            except OSError:
                time.sleep(0.1)
        pid = None
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)
