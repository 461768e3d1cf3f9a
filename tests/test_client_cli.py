"""The official client's command line, unmodified, as a person would use it."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def instavm(server, tmp_path_factory):
    """`instavm WORDS -j` against this server: what it printed, as JSON."""
    home = tmp_path_factory.mktemp("home")
    env = {name: value for name, value in os.environ.items() if not name.startswith("INSTAVM_")}
    env |= {"HOME": str(home), "INSTAVM_BASE_URL": server.url, "INSTAVM_API_KEY": server.key}
    env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def run(*words, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "instavm", *words, "-j"], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout) if code == 0 else done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def vm(instavm):
    made = instavm("create", "--memory", "512", "--timeout", "3600")
    yield made
    instavm("rm", made["vm_id"])


def rows(shown):
    """Lists come bare or under one name."""
    if isinstance(shown, list):
        return shown
    return next(value for value in shown.values() if isinstance(value, list))


def test_whoami_knows_the_key_s_owner(instavm):
    assert "owner" in json.dumps(instavm("whoami"))


def test_a_vm_is_created_listed_used_and_removed(instavm, vm):
    assert vm["vm_id"] in [row["vm_id"] for row in rows(instavm("ls"))]
    said = instavm("exec", "--cmd", "x = 20; x + 22", "--session", vm["session_id"])
    assert said["stdout"] == "42\n" and said["exit_code"] == 0
    said = instavm("exec", "--cmd", "echo hi; exit 3", "--language", "bash", "--session", vm["session_id"])
    assert said["stdout"] == "hi\n" and said["exit_code"] == 3
    other = instavm("create")
    instavm("rm", other["vm_id"])
    assert other["vm_id"] not in [row["vm_id"] for row in rows(instavm("ls"))]
    assert other["vm_id"] in [row["vm_id"] for row in rows(instavm("ls", "-a"))]


def test_a_file_s_code_runs_and_an_asynchronous_one_is_fetched(instavm, vm, tmp_path):
    (tmp_path / "code.py").write_text("print('from a file')")
    assert instavm("exec", str(tmp_path / "code.py"), "--session", vm["session_id"])["stdout"] == "from a file\n"
    task = instavm("exec", "--cmd", "print('later')", "--async", "--session", vm["session_id"])
    assert "later" in json.dumps(instavm("exec", "result", task["task_id"]))


def test_a_snapshot_keeps_memory_and_a_vm_comes_from_it(instavm, vm):
    instavm("exec", "--cmd", "kept = 'in memory'", "--session", vm["session_id"])
    made = instavm("snapshot", "create", vm["vm_id"], "--name", "cli")
    snapshot = made.get("snapshot_id") or made["id"]
    assert instavm("snapshot", "get", snapshot)["status"] == "ready"
    assert snapshot in json.dumps(instavm("snapshot", "ls"))
    copy = instavm("create", "--snapshot", snapshot)
    assert instavm("exec", "--cmd", "kept", "--session", copy["session_id"])["stdout"] == "'in memory'\n"
    instavm("rm", copy["vm_id"])
    instavm("snapshot", "rm", snapshot)
    assert snapshot not in json.dumps(instavm("snapshot", "ls"))


def test_egress_is_stored_and_told(instavm, vm):
    assert isinstance(instavm("egress", "get", "--session", vm["session_id"]), dict)
    assert isinstance(instavm("egress", "get", "--vm", vm["vm_id"]), dict)


def test_what_is_not_there_is_an_error_not_a_crash(instavm):
    told = instavm("snapshot", "get", "nope", code=1)
    assert "Traceback" not in told and told.strip()
