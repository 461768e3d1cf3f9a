"""`thaw snapshot`: what it does with a server, and from one host to another."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from harness import THAW, Server, Vm, make_data_dir, wait_for

CONFIG = {"session.pool.low": 1, "session.pool.high": 2}


def tool(server, *words, code=0):
    """The lines of `thaw snapshot WORDS --json`."""
    done = server.cli("snapshot", "--json", *words, check=False)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_snapshot_is_made_of_a_vm_or_a_session_by_the_command_line(make, server):
    vm = make()
    vm.run("x = 41")
    first = server.cli("snapshot", "create", vm.id, "--name", "first").stdout.strip()
    vm.run("x += 1")
    [second] = tool(server, "create", vm.session)
    assert second["parent_snapshot_id"] == first and second["vm_id"] == vm.id
    done = server.cli("snapshot", "exec", "first", "-l", "python", "--", "print(x)")
    assert done.stdout == "41\n"
    # What runs on a snapshot changes nothing, and leaves no VM.
    for _ in range(2):
        done = server.cli("snapshot", "exec", second["id"][:8], "-l", "python", "--", "x += 1; print(x)")
        assert done.stdout == "43\n"
    done = server.cli("snapshot", "exec", "first", "--", "sh", "-c", "echo 'a  b' >&2; exit 7", check=False)
    assert (done.returncode, done.stderr) == (7, "a  b\n")
    running = [one["vm_id"] for one in server.client().get("/v1/vms").json() if one["status"] == "active"]
    assert running == [vm.id]
    done = server.cli("snapshot", "exec", "nothing", "--", "true", check=False)
    assert done.returncode == 125 and "no snapshot nothing" in done.stderr
    done = server.cli("snapshot", "create", "nothing", check=False)
    assert done.returncode == 1 and "no VM and no session" in done.stderr


def test_bisect_finds_the_snapshot_that_broke_it(make, server):
    vm = make()
    ids = []
    for number in range(7):
        vm.run(f"open('/tmp/n', 'w').write('{number}')")
        ids.append(vm.snapshot()["id"])
    command = "read n < /tmp/n; test $n = 3 && exit 125; test $n -lt 5"
    said = tool(server, "bisect", f"{ids[0]}..{ids[6]}", "--", command)
    assert said[-1] == {"first_bad": ids[5], "last_good": ids[4], "untested_between": 0}
    assert len(said) <= 7 and {one["id"] for one in said[:-1]} <= set(ids)
    done = server.cli("snapshot", "bisect", f"{ids[5]}..{ids[6]}", "--", command, check=False)
    assert done.returncode == 1 and "fails on" in done.stderr
    done = server.cli("snapshot", "bisect", f"{ids[6]}..{ids[0]}", "--", command, check=False)
    assert done.returncode == 1 and "did not come from" in done.stderr


def test_diff_names_the_files_that_changed_and_by_how_much(make, server):
    vm = make()
    vm.run("open('/root/kept', 'w').write('same'); open('/root/grows', 'w').write('x' * 10); open('/root/goes', 'w')")
    first = vm.snapshot()["id"]
    vm.run("import os; open('/root/grows', 'a').write('y' * 5000); os.remove('/root/goes'); os.mkdir('/root/new')")
    vm.run(r"open('/root/new/odd\x1b[2J', 'w').write('z' * 7)")
    second = vm.snapshot()["id"]
    before = {one["vm_id"] for one in server.client().get("/v1/vms").json()}
    [said] = tool(server, "diff", first, second, "--files")
    changes = {one["path"]: (one["how"], one["bytes_before"], one["bytes_after"]) for one in said["files"]}
    assert changes["/root/grows"] == ("changed", 10, 5010)
    assert changes["/root/goes"] == ("removed", 0, None)
    assert changes["/root/new"][0] == "added" and changes["/root/new/odd\x1b[2J"] == ("added", None, 7)
    assert "/root/kept" not in changes and len(changes) < 12, changes
    shown = server.cli("snapshot", "diff", first, second, "--files").stdout
    assert "/root/new/odd?[2J" in shown and "\x1b" not in shown and "of memory differ" in shown
    # Both were restored for it, and both are gone.
    assert {one["vm_id"] for one in server.client().get("/v1/vms").json() if one["status"] == "active"} <= before
    assert "files" not in tool(server, "diff", first, second)[0]
    assert server.client().get(f"/v1/snapshots/{first}/diff?to=nothing").status_code == 404
    assert server.client().get(f"/v1/snapshots/{first}/diff").status_code == 422


@pytest.fixture
def other():
    """A server on what could be another host: a data directory of its own."""
    server = Server(CONFIG)
    server.start()
    yield server
    server.stop()


def test_a_snapshot_goes_to_another_server_and_runs_on(make, server, other, tmp_path):
    vm = make()
    vm.run("import os, hashlib; kept = os.urandom(6 << 20); told = hashlib.sha256(kept).hexdigest()")
    told = vm.out("print(told)")
    one = vm.snapshot()["id"]
    file = tmp_path / "one.thaw"
    [wrote] = tool(server, "export", one, str(file))
    assert wrote["bytes"] == file.stat().st_size < wrote["unpacked_bytes"]
    names = subprocess.run(["tar", "--zstd", "-tf", file], capture_output=True, text=True, check=True).stdout.split()
    assert names[:4] == ["manifest.json", "state", "map", "base"] and all(n.startswith("chunks/") for n in names[4:])
    assert "already" in server.cli("snapshot", "export", one, str(file), check=False).stderr
    # The server that it comes to runs all along.
    client = other.client()
    assert client.get(f"/v1/snapshots/{one}").status_code == 404
    [arrived] = tool(other, "import", str(file))
    assert (arrived["id"], arrived["new"]) == (one, True)
    assert client.get(f"/v1/snapshots/{one}").json()["status"] == "ready"
    copy = Vm(client, client.post("/v1/vms", {"snapshot_id": one}).json())
    assert copy.out("print(hashlib.sha256(kept).hexdigest())") == told
    copy.end()
    assert tool(other, "import", str(file))[0]["new"] is False
    assert tool(other, "verify")[0]["sound"]
    # By a pipe, after it was deleted there.
    assert client.http.delete(f"{client.url}/v1/snapshots/{one}").status_code == 200
    piped = f"'{THAW}' snapshot export {one} - --data-dir '{server.data}' | '{THAW}' snapshot import - --data-dir '{other.data}'"
    subprocess.run(["bash", "-o", "pipefail", "-c", piped], check=True, timeout=120)
    copy = Vm(client, client.post("/v1/vms", {"snapshot_id": one}).json())
    assert copy.out("print(told)") == told
    copy.end()


def test_export_and_import_go_on_after_kill_9(make, server, other, tmp_path):
    vm = make()
    vm.run("import os; kept = os.urandom(24 << 20)")
    one = vm.snapshot()["id"]
    whole, file = tmp_path / "whole.thaw", tmp_path / "file.thaw"
    started = time.monotonic()
    tool(server, "export", one, str(whole))
    took = time.monotonic() - started

    def killed(*words, after):
        process = subprocess.Popen([THAW, "snapshot", *words], stdout=subprocess.DEVNULL)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        process.wait()

    for part in (0.3, 0.6, 0.9):
        killed("export", one, str(file), "--data-dir", str(server.data), after=took * part)
        if not file.exists():
            assert not tool(other, "list")
    if not file.exists():
        tool(server, "export", one, str(file))
    assert file.read_bytes() == whole.read_bytes()
    for part in (0.2, 0.4, 0.6, 0.8):
        killed("import", str(file), "--data-dir", str(other.data), after=took * part)
        # Whole, or not there at all.
        assert all(said["sound"] for said in tool(other, "verify"))
    tool(other, "import", str(file))
    assert [said["id"] for said in tool(other, "verify")] == [one]
    assert not list((other.data / "snapshots/importing").iterdir())
    assert tool(other, "gc", "--dry-run")[0]["files"] == 0


def test_a_snapshot_moves_to_a_new_template_and_the_old_one_s_memory_goes():
    data = make_data_dir()
    (data / "templates").unlink()
    (data / "templates").mkdir()
    server = Server(CONFIG, data=data)
    server.owns_data = True
    server.start()
    try:
        client = server.client()
        vm = Vm(client, client.post("/v1/vms", {}).json())
        vm.run("import os, hashlib; kept = os.urandom(3 << 20); told = hashlib.sha256(kept).hexdigest()")
        told, one = vm.out("print(told)"), vm.snapshot()["id"]
        [before] = tool(server, "inspect", one)
        assert tool(server, "rebase", one)[0]["rebased"]["was_there"]
        # The next server builds its template anew, and no two are the same.
        server.terminate()
        server.wait()
        shutil.rmtree(data / "templates")
        (data / "templates").mkdir()
        server.start()
        client = server.client()
        newer = Vm(client, client.post("/v1/vms", {}).json())
        second = newer.snapshot()["id"]
        [done] = tool(server, "rebase", one)
        assert not done["rebased"]["was_there"] and done["rebased"]["pages"] > 0
        assert done["base"] == tool(server, "inspect", second)[0]["manifest"]["memory"]["base"] != before["manifest"]["memory"]["base"]
        copy = Vm(client, client.post("/v1/vms", {"snapshot_id": one}).json())
        assert copy.out("print(hashlib.sha256(kept).hexdigest())") == told
        assert all(said["sound"] for said in tool(server, "verify"))
        tool(server, "gc")
        assert len(list((data / "snapshots/bases").iterdir())) == 1
        # And back over another's base, while nothing of its own is lost.
        assert tool(server, "rebase", one, "--onto", second)[0]["rebased"]["was_there"]
    finally:
        server.stop()


def test_a_file_that_does_not_fit_or_is_damaged_is_refused_with_the_reason(make, server, other, tmp_path):
    vm = make()
    one = vm.snapshot()["id"]
    file = tmp_path / "one.thaw"
    tool(server, "export", one, str(file))

    def why(path, *words):
        done = other.cli("snapshot", "import", str(path), *words, check=False)
        assert done.returncode != 0
        assert not tool(other, "list")
        return done.stderr

    cut = tmp_path / "cut.thaw"
    cut.write_bytes(file.read_bytes()[:-100])
    assert "breaks off" in why(cut)
    flipped = bytearray(file.read_bytes())
    # More than one bit: zstd has some that mean nothing.
    middle = len(flipped) // 2
    flipped[middle : middle + 64] = os.urandom(64)
    cut.write_bytes(flipped)
    assert "damaged" in why(cut)
    cut.write_bytes(os.urandom(1 << 16))
    assert "cannot be imported" in why(cut)
    short = why(file, "--disk-floor-mib", str(shutil.disk_usage(other.data).free >> 20))
    assert "MiB short" in short
    assert "no such user" in why(file, "--user", "nobody")
    (other.data / "images").unlink()
    (other.data / "images").mkdir()
    assert "there is no image minimal" in why(file)
    wait_for(lambda: not tool(other, "list"), "nothing to be there")
