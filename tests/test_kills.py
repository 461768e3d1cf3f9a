"""kill -9 of the server, a worker or the command line at any moment: what was acknowledged stays, whole, and nothing else does."""

import json
import os
import random
import signal
import subprocess
import threading
import time

import pytest

from harness import SLOW, THAW, Vm, wait_for

# As many as THAW_KILLS says: CI is content with fewer than the figure of docs/operations.md.
KILLS = int(os.environ.get("THAW_KILLS", str(max(5, 25 // SLOW))))
SEED = int(os.environ.get("THAW_SEED", "0")) or random.randrange(1 << 30)

CONFIG = {"session.pool.low": 1, "session.pool.high": 1, "snapshot.disk_floor_mib": 0}

# Snapshots that are kept at a time: every one is read through after each kill.
MOST = 5


class Killing:
    def __init__(self, server, tmp_path):
        self.server, self.random, self.kept = server, random.Random(SEED), {}
        self.file, self.number, self.done = tmp_path / "imported.thaw", 0, {}

    def words(self, *words):
        done = self.server.cli("snapshot", "--json", *words)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def begin(self):
        """A snapshot in a file, to be imported again and again."""
        vm = self.vm()
        self.carried, self.carried_value = vm.snapshot()["id"], vm.value
        self.words("export", self.carried, str(self.file))
        self.kept[self.carried] = vm.value

    def vm(self):
        self.number += 1
        client = self.server.client()
        vm = Vm(client, client.post("/v1/vms", {}).json())
        vm.value = self.number
        vm.run(f"import os; value = {vm.value}; more = os.urandom({self.random.randrange(1 << 20)})")
        return vm

    # What is under way when something is killed. Each notes what was acknowledged, and nothing else.

    def snapshot(self):
        vm = self.vm()

        def work():
            reply = vm.client.post(f"/v1/vms/{vm.id}/snapshot", {})
            if reply.ok:
                self.kept[reply.json()["id"]] = vm.value

        return work, None

    def suspend(self):
        vm = self.vm()

        def work():
            reply = vm.client.post(f"/v1/vms/{vm.id}/suspend", {})
            if reply.ok:
                self.done["suspended"] = vm

        return work, None

    def delete(self):
        # The file stays, so this one may go, too.
        gone = self.random.choice(sorted(self.kept)) if self.kept else self.carried
        value = self.kept.pop(gone, None)
        client = self.server.client()

        def work():
            reply = client.http.delete(f"{client.url}/v1/snapshots/{gone}")
            self.done["deleted" if reply.ok else "maybe"] = (gone, value)

        return work, None

    def command(self, *words):
        process = subprocess.Popen(
            [THAW, "snapshot", *words, "--data-dir", str(self.server.data)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def work():
            if process.wait() == 0 and words[0] == "import":
                self.kept[self.carried] = self.carried_value

        return work, process

    def imported(self):
        return self.command("import", str(self.file), "--disk-floor-mib", "0")

    def gc(self):
        return self.command("gc")

    def cycle(self):
        self.done = {}
        what = self.random.choice([self.snapshot, self.snapshot, self.suspend, self.delete, self.imported, self.gc])
        if len(self.kept) > MOST:
            what = self.delete
        work, process = what()

        def quietly():
            try:
                work()
            except OSError:
                pass  # The server went, before it acknowledged anything.

        thread = threading.Thread(target=quietly)
        thread.start()
        time.sleep(self.random.uniform(0, 0.15 if process is None else 0.6))
        victim = self.random.choice(["server", "server", "worker", "command"])
        if victim == "command" and process:
            process.send_signal(signal.SIGKILL)
        elif victim == "worker" and self.server.workers():
            try:
                os.kill(self.random.choice(self.server.workers()), signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:
            victim = "server"
            self.server.kill()
        thread.join(timeout=60 * SLOW)
        assert not thread.is_alive()
        if victim == "server":
            self.server.restart()
        self.check(f"{what.__name__}, {victim} killed, seed {SEED}")

    def check(self, after):
        sound = {one["id"]: one["sound"] for one in self.words("verify")}
        assert all(sound.values()), (after, sound)
        client = self.server.client()
        offered = {one["id"] for one in client.get("/v1/snapshots").json()}
        assert set(self.kept) <= offered, (after, set(self.kept) - offered)
        assert set(self.kept) <= set(sound), after
        if "deleted" in self.done:
            assert self.done["deleted"][0] not in offered, after
        # What was not acknowledged may be there, whole, or not.
        for id in offered - set(self.kept):
            client.http.delete(f"{client.url}/v1/snapshots/{id}")
        if vm := self.done.get("suspended"):
            again = Vm(client, {"vm_id": vm.id, "session_id": vm.session})
            reply = client.post(f"/v1/vms/{vm.id}/resume", {})
            assert reply.status_code == 200, (after, reply.text)
            assert again.out("print(value)") == str(vm.value), after
            client.http.delete(f"{client.url}/v1/vms/{reply.json()['vm_id']}")
        for one in client.get("/v1/vms").json():
            client.http.delete(f"{client.url}/v1/vms/{one['vm_id']}")


@pytest.mark.timeout(120 + 3 * KILLS)
def test_what_was_acknowledged_survives_kill_9_at_any_moment(start_server, tmp_path):
    server = start_server(config=CONFIG)
    killing = Killing(server, tmp_path)
    killing.begin()
    began = time.monotonic()
    for number in range(KILLS):
        killing.cycle()
        if number % 10 == 9 and killing.kept:
            id, value = killing.random.choice(sorted(killing.kept.items()))
            client = server.client()
            copy = Vm(client, client.post("/v1/vms", {"snapshot_id": id}).json())
            assert copy.out("print(value)") == str(value)
            copy.end()
    print(f"{KILLS} kills in {time.monotonic() - began:.0f} s, seed {SEED}: {len(killing.kept)} snapshots kept, all sound")
    # Nothing is left that no snapshot needs.
    client = server.client()
    for id in [one["id"] for one in client.get("/v1/snapshots").json()]:
        assert client.http.delete(f"{client.url}/v1/snapshots/{id}").ok
    shelf = server.data / "snapshots"
    left = lambda: [path for place in ("chunks", "bases") for path in (shelf / place).iterdir()]
    named = lambda: [path.name for path in shelf.iterdir() if len(path.name) == 36]
    wait_for(lambda: not left() and not named(), "everything to be removed")
    # A killed command's scratch goes with a sweep, which the last deletion asked for.
    wait_for(lambda: not list((server.data / "tmp").iterdir()), "the scratch of killed commands to be removed")
