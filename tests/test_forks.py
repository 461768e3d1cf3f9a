"""Forks of running VMs, and snapshots of VMs that came from snapshots: shared memory, and each on its own."""

import json
import os
import subprocess
import threading
import time

import pytest
import requests

from harness import Vm, wait_for

CONFIG = {"session.pool.low": 1, "session.pool.high": 2}


def cut_off(client, vm_id):
    """Asks for a snapshot of whose server nothing more is heard."""
    try:
        client.post(f"/v1/vms/{vm_id}/snapshot?wait=false", {})
    except requests.ConnectionError:
        pass


def adopt(vm, said):
    return [Vm(vm.client, one) for one in said["forks"]]


def test_forks_go_on_from_where_the_source_is_and_each_is_another(make):
    vm = make()
    vm.run("import random, uuid, os; state = [1]; open('/root/f', 'w').write('x'); random.random()")
    vm.run("sleep 1000 & echo $! > /root/pid", language="bash")
    said = vm.fork(4)
    assert said["created"] == said["requested"] == 4 and said["pause_ms"] > 0, said
    forks = adopt(vm, said)
    assert len({fork.session for fork in forks} | {vm.session}) == 5
    seen = set()
    for number, fork in enumerate([vm, *forks]):
        assert fork.out(f"state.append({number}); print(state, open('/root/f').read())") == f"[1, {number}] x"
        assert fork.out("kill -0 $(cat /root/pid) && echo alive", language="bash") == "alive"
        drawn = fork.out("print(os.urandom(8).hex(), uuid.uuid4(), random.random(), os.uname().nodename)")
        seen.update(drawn.split())
        assert abs(float(fork.out("import time; print(time.time())")) - time.time()) < 2
    assert len(seen) == 5 * 4, seen
    for fork in forks:
        fork.end()
    assert vm.out("print(state)") == "[1, 0]"


def test_the_source_s_output_is_whole_while_it_is_forked(make):
    vm = make()
    vm.run("pass")
    lines, replies = 3000, []
    code = f"import time\nfor n in range({lines}):\n    print(n, flush=True)\n    if n % 30 == 0: time.sleep(0.01)"
    running = threading.Thread(target=lambda: replies.append(vm.run(code, timeout=60)))
    running.start()
    time.sleep(0.2)
    forks = []
    while running.is_alive() and len(forks) < 6:
        forks += adopt(vm, vm.fork(2))
    running.join()
    assert replies[0]["stdout"].split() == [str(n) for n in range(lines)]
    for fork in forks:
        assert fork.out("print(6 * 7)") == "42"
        fork.end()


def test_a_fork_of_a_fork_and_its_snapshot_have_everything_before_them(make, server):
    vm = make()
    line = [vm]
    for generation in range(5):
        line[-1].run(f"g{generation} = bytes([{generation}]) * 3_000_000")
        line += adopt(line[-1], line[-1].fork(1))
    frozen = line[-1].snapshot()
    for fork in line[1:]:
        fork.end()
    copy = make(snapshot_id=frozen["id"])
    assert copy.out("print([g[5] for g in (g0, g1, g2, g3, g4)])") == "[0, 1, 2, 3, 4]"
    copy.client.http.delete(f"{copy.client.url}/v1/snapshots/{frozen['id']}")
    # The files are gone by name only: it has them open.
    assert copy.out("print(len(g0) + len(g4))") == "6000000"


def test_five_generations_of_snapshots_share_what_they_have_in_common(make, server):
    vm, frozen = make(), []
    vm.run("import os; kept = os.urandom(20 << 20); import hashlib; print(hashlib.sha256(kept).hexdigest())")
    digest = vm.out("print(hashlib.sha256(kept).hexdigest())")
    for generation in range(5):
        vm.run(f"g{generation} = {generation}")
        frozen.append(vm.snapshot())
        vm = make(snapshot_id=frozen[-1]["id"])
        assert vm.out("print(hashlib.sha256(kept).hexdigest())") == digest
    assert vm.out("print(g0 + g1 + g2 + g3 + g4)") == "10"
    sizes = [one["size_bytes"] for one in frozen]
    print("added to the disk, MiB:", [round(size / (1 << 20), 1) for size in sizes])
    assert 20 << 20 <= sizes[0] <= 40 << 20, sizes
    assert all(size < 15 << 20 for size in sizes[1:]), sizes
    # The first may go: the others have what they need of it.
    for one in frozen[:-1]:
        vm.client.http.delete(f"{vm.client.url}/v1/snapshots/{one['id']}")
    last = make(snapshot_id=frozen[-1]["id"])
    assert last.out("print(hashlib.sha256(kept).hexdigest())") == digest
    vm.client.http.delete(f"{vm.client.url}/v1/snapshots/{frozen[-1]['id']}")
    chunks = server.data / "snapshots/chunks"
    wait_for(lambda: not any(chunks.iterdir()), "what nobody needs to be removed")


def test_the_command_line_sees_snapshots_as_they_are(make, server):
    def thaw(*words):
        command = [os.environ["THAW_BIN"], "snapshot", *words, "--json", "--data-dir", str(server.data)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done, [json.loads(line) for line in done.stdout.splitlines()]

    vm = make()
    vm.run("import os; kept = os.urandom(8 << 20)")
    first = vm.snapshot()["id"]
    child = make(snapshot_id=first)
    child.run("more = os.urandom(4 << 20)")
    second = child.snapshot()["id"]
    _, listed = thaw("list")
    assert [one["id"] for one in listed] == [first, second] and listed[1]["parent"] == first
    assert listed[0]["own_bytes"] < 1 << 20 < listed[1]["own_bytes"] < 12 << 20
    assert [one["depth"] for one in thaw("tree")[1]] == [0, 1]
    memory = thaw("diff", first, second[:8])[1][0]["memory"]
    assert 4 << 20 <= memory["pages"] * 4096 <= 12 << 20 and memory["runs"] == []
    runs = thaw("diff", first, second, "--pages")[1][0]["memory"]["runs"]
    assert sum(count for _, count in runs) == memory["pages"] and runs == sorted(runs)
    [swept] = thaw("gc", "--dry-run")[1]
    assert (swept["files"], swept["bytes"]) == (0, 0)
    assert {"base", "chunk"} == {one["kind"] for one in swept["reached"]}
    assert [first, second] in [one["snapshots"] for one in swept["reached"]], "what both need"
    done, said = thaw("verify")
    assert done.returncode == 0 and all(one["sound"] for one in said)
    # One byte of one page that both have.
    manifest = json.loads((server.data / "snapshots" / first / "manifest.json").read_text())
    chunk = max(manifest["memory"]["chunks"], key=lambda chunk: chunk["bytes"])["sha256"]
    with open(server.data / "snapshots/chunks" / chunk, "r+b") as file:
        file.seek(1000 * 4096 + 5)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    done, said = thaw("verify", first)
    assert done.returncode == 1 and "guest address 0x" in said[0]["faults"][0] and chunk in said[0]["faults"][0]
    assert len(said[0]["faults"]) == 1 and "1 of 1 snapshots are damaged" in done.stderr
    assert thaw("inspect", "nonsense")[0].returncode == 1
    for snapshot in (second, first):
        vm.client.http.delete(f"{vm.client.url}/v1/snapshots/{snapshot}")


def test_a_server_that_is_killed_while_it_freezes_keeps_what_it_acknowledged(start_server):
    server = start_server(config=CONFIG)
    client = server.client()
    vm = Vm(client, client.post("/v1/vms", {}).json())
    kept = []
    for number in range(8):
        vm.run(f"n = {number}; import os; blob{number} = os.urandom(4 << 20)")
        kept.append((vm.snapshot()["id"], number))
        # One more that is under way when the server dies.
        threading.Thread(target=cut_off, args=(client, vm.id), daemon=True).start()
        time.sleep(0.02 * number)
        server.kill()
        server.restart()
        client = server.client()
        known = {one["id"] for one in client.get("/v1/snapshots").json()}
        assert {id for id, _ in kept} <= known
        vm = Vm(client, client.post("/v1/vms", {"snapshot_id": kept[-1][0]}).json())
        assert vm.out("print(n, len(blob0))") == f"{number} {4 << 20}"
    for id, number in kept:
        copy = Vm(client, client.post("/v1/vms", {"snapshot_id": id}).json())
        assert copy.out("print(n)") == str(number)
        copy.end()
