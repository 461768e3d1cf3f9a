"""Guests that attack what serves them: a clear answer, one session's cost, and on it goes."""

import concurrent.futures

import pytest

import harness

SELFTEST = "/tmp/selftest"


@pytest.fixture(scope="module")
def program():
    """The guest's self-test, which has the hostile modes too."""
    path = harness.ROOT / "target/x86_64-unknown-linux-gnu/guest/thaw-selftest"
    assert path.is_file(), f"{path} is missing; `make guest` builds it"
    return path.read_bytes()


@pytest.fixture(scope="module")
def witness(server):
    """Another session, in which nothing may be noticed."""
    made = server.client().session(vm_lifetime_seconds=3600)
    made.python("value = 'witness'")
    yield made
    out = made.python("value")
    made.kill()
    assert out["stdout"] == "'witness'\n" and "vm_restarted" not in out


@pytest.fixture
def attacker(server, witness, program):
    made = server.client().session(vm_lifetime_seconds=600)
    made.upload(SELFTEST, program)
    yield made
    # Whatever happened: the session works, and so does everybody else.
    out = made.copy().python("print('usable')", timeout=60)
    assert out["stdout"] == "usable\n" and out["exit_code"] == 0, out
    assert made.copy().bash("echo usable", timeout=60)["stdout"] == "usable\n"
    assert witness.python("value")["stdout"] == "'witness'\n"
    made.kill()


def clear(out):
    """An answer that says what happened: the command's own end, a time-out, or the VM's."""
    assert isinstance(out["exit_code"], int)
    if out["timed_out"]:
        assert out["exit_code"] == 124 and "timed out" in out["stderr"]
    elif out["exit_code"] == 137 and "thaw:" in out["stderr"]:
        assert "VM" in out["stderr"] or "memory" in out["stderr"] or "interpreter" in out["stderr"]
    return out


MODES = ["rings", "doorbell-loop", "ports", "ports permitted", "flood", "eat-memory", "fork-bomb", "panic"]


@pytest.mark.parametrize("mode", MODES)
def test_a_hostile_guest_costs_its_own_session_only(attacker, witness, mode):
    answer = harness.background(lambda: attacker.copy().bash(f"{SELFTEST} hostile {mode}", timeout=20))
    # Meanwhile another session is served.
    while not answer.done():
        assert witness.python("value", timeout=15)["stdout"] == "'witness'\n"
        concurrent.futures.wait([answer], timeout=0.2)
    out = clear(answer.result())
    assert out["exit_code"] != 2, f"the program has no such mode: {out}"


def test_a_guest_kernel_panic_is_told_with_its_last_words(attacker):
    out = attacker.bash("sync; echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 30", timeout=20)
    assert out["exit_code"] == 137 and out["timed_out"] is False, out
    assert "thaw:" in out["stderr"] and "VM ended" in out["stderr"]
    assert attacker.python("1")["vm_restarted"] is True


def test_a_killed_agent_is_a_dead_vm_not_a_hang(attacker):
    out = attacker.bash("kill -9 1; sleep 1; kill -SEGV 1; sleep 1; echo init lives", timeout=20)
    clear(out)


@pytest.mark.parametrize("code", ["reboot -f", "echo b > /proc/sysrq-trigger", "echo o > /proc/sysrq-trigger", "poweroff -f"])
def test_a_guest_that_turns_itself_off(attacker, code):
    clear(attacker.bash(f"{code} 2>&1; sleep 2", timeout=20))


def test_python_that_eats_memory(attacker):
    attacker.python("kept = 1")
    out = clear(attacker.python("x = []\nwhile True: x.append(bytearray(b'x' * (16 << 20)))", timeout=30))
    assert out["exit_code"] != 0
    assert "emory" in out["stderr"], out["stderr"]


def test_bash_that_fills_the_file_system(attacker):
    out = clear(attacker.bash("head -c 4G /dev/zero > /tmp/big; code=$?; rm -f /tmp/big; exit $code", timeout=60))
    assert out["exit_code"] != 0


def test_a_fork_bomb_of_the_shell(attacker):
    clear(attacker.bash("bomb() { bomb | bomb & }; bomb; sleep 60", timeout=5))


def test_a_fork_bomb_of_python(attacker):
    code = "import os, time\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        time.sleep(0.01)"
    clear(attacker.python(code, timeout=5))


def test_endless_output_is_bounded_and_stopped(attacker):
    out = clear(attacker.bash("yes", timeout=3))
    assert out["timed_out"] is True and out["truncated"] is True
    assert len(out["stdout"]) <= (8 << 20) + 100
    out = clear(attacker.python("while True: print('x' * 10000)", timeout=3))
    assert out["timed_out"] is True


def test_a_closed_standard_output_and_a_killed_runner(attacker):
    clear(attacker.python("import os; os.close(1); os.close(2); print('lost')"))
    clear(attacker.bash("exec >&- 2>&-; echo lost"))
    clear(attacker.bash("kill -9 -1", timeout=20))
    clear(attacker.bash("kill -STOP $(pgrep -f main.py); echo stopped", timeout=10))
    clear(attacker.python("print('after the stop')", timeout=5))


def test_descriptors_run_out_in_the_guest_only(attacker):
    out = clear(attacker.python("import os\nf = []\nwhile True: f.append(os.open('/', 0))", timeout=30))
    assert out["exit_code"] == 1 and "Too many open files" in out["stderr"]


def test_the_wire_s_device_and_memory_are_out_of_reach(attacker):
    # Reading all of physical memory finds nothing of the host, and harms nobody.
    clear(attacker.bash("dd if=/dev/mem of=/dev/null bs=1M 2>&1 | tail -n 1; ls /dev/xen 2>&1", timeout=30))
    clear(attacker.bash("cat /proc/kcore 2>/dev/null | head -c 10000000 | wc -c", timeout=30))
