"""The guest checks its own processor and kernel; wide and large guests run."""

import re
import subprocess

import pytest

import harness

PROGRAM = harness.ROOT / "target/x86_64-unknown-linux-gnu/guest/thaw-selftest"
PATH = "/tmp/selftest"
# More than most hosts of these tests have: vCPUs that wait for each other without running at once.
CONFIG = {"session.max_vcpus": 4}


@pytest.fixture(scope="module")
def program():
    assert PROGRAM.is_file(), f"{PROGRAM} is missing; `make guest` builds it"
    return PROGRAM.read_bytes()


def run_selftest(session, checks=("",)):
    # Not at once: all of them may take longer than a command.
    names = [name for name in session.bash(f"{PATH} list")["stdout"].split() if name.startswith(checks)]
    assert len(names) > 10
    for some in (names[at : at + 8] for at in range(0, len(names), 8)):
        out = session.bash(f"THAW_SLOW={harness.SLOW} {PATH} {' '.join(some)}", timeout=280)
        assert re.search(r"\n\d+ passed, \d+ failed\n$", out["stdout"]), out
        failed = re.findall(r"^FAIL (\S+):", out["stdout"], re.M)
        # What fails on the bare host is the host's failing: QEMU's software processor knows no exceptions of SSE.
        assert not [name for name in failed if subprocess.run([PROGRAM, name]).returncode == 0], out
        assert out["exit_code"] == (1 if failed else 0)


def test_the_self_test_passes_in_a_session(session, program):
    session.upload(PATH, program)
    run_selftest(session)


def test_it_passes_on_several_vcpus(server, program):
    vcpus = 4 if harness.SLOW == 1 else 2
    session = server.client().session(vcpu_count=vcpus, vm_lifetime_seconds=3600)
    session.upload(PATH, program)
    assert session.bash("nproc")["stdout"] == f"{vcpus}\n"
    # What several processors can get wrong. (The others pass as well, some in many times the time: threads that
    # wake each other do so across the host.)
    run_selftest(session, ("processors", "threads", "futex-timeout", "memory", "fork", "vfork", "fpu", "segment", "int3"))
    session.kill()


def test_it_passes_again_after_it_ran_in_the_same_vm_and_in_another(server, program):
    one, two = server.client().session(), server.client().session()
    for session in (one, two):
        session.upload(PATH, program)
    first = harness.background(lambda: run_selftest(one.copy()))
    run_selftest(two.copy())
    first.result(timeout=280)
    one.kill()
    two.kill()


def test_a_guest_of_four_gibibytes(server):
    session = server.client().session(memory_mb=4096, vm_lifetime_seconds=600)
    total = int(session.bash("awk '/MemTotal/ {print $2}' /proc/meminfo", timeout=300)["stdout"])
    assert 3.5 < total / 2**20 <= 4
    code = (
        "import hashlib\n"
        "block = bytes(range(256)) * 4096\n"
        "pieces = [bytearray(block) for _ in range(2500)]\n"
        "for i, piece in enumerate(pieces): piece[:4] = i.to_bytes(4, 'big')\n"
        "assert all(int.from_bytes(piece[:4], 'big') == i and piece[4:] == block[4:] for i, piece in enumerate(pieces))\n"
        "sum(map(len, pieces)) >> 20"
    )
    out = session.python(code, timeout=min(200 * harness.SLOW, 600))
    assert out["stdout"] == "2500\n", out
    session.kill()


@pytest.mark.parametrize("memory_mb", [512, 1024])
def test_the_guest_has_the_memory_that_was_asked_for(server, memory_mb):
    session = server.client().session(memory_mb=memory_mb)
    total = int(session.bash("awk '/MemTotal/ {print $2}' /proc/meminfo", timeout=300)["stdout"])
    assert 0.75 * memory_mb < total / 1024 <= memory_mb
    session.kill()


def test_programs_of_other_kinds_fail_cleanly(session):
    # The head of a 32-bit program; its kernel has no way to run one here.
    elf32 = bytes.fromhex(
        "7f454c4601010100000000000000000002000300010000005480040834000000000000000000000034002000010000000000000001000000"
        "00000000008004080080040860000000600000000500000000100000b801000000bb2a000000cd80"
    )
    session.upload("/tmp/elf32", elf32)
    out = session.bash("/tmp/elf32")
    assert out["exit_code"] != 0 and out["timed_out"] is False
    assert session.bash("echo fine")["stdout"] == "fine\n"
