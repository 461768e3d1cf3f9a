"""Sessions are copies of one VM, and must not look like it."""

import json
import time

import pytest

COUNT = 6

PROBE = """
import json, os, random, tempfile, uuid, secrets, hashlib, socket, time
found = {
    'urandom': os.urandom(16).hex(),
    'getrandom': os.getrandom(16).hex(),
    'uuid4': str(uuid.uuid4()),
    'random': random.random(),
    'secrets': secrets.token_hex(8),
    'tempfile': tempfile.mktemp(),
    'mkdtemp': tempfile.mkdtemp(),
    'hostname': socket.gethostname(),
    'machine_id': open('/etc/machine-id').read().strip(),
    'boot_id': open('/proc/sys/kernel/random/boot_id').read().strip(),
    'hash': hash('text'),
}
try:
    import numpy
    found['numpy'] = float(numpy.random.rand())
    found['numpy_rng'] = float(numpy.random.default_rng().random())
except ImportError:
    pass
print(json.dumps(found))
"""

# What the kernel made before the VM was frozen; nobody draws secrets from it.
MAY_BE_EQUAL = {"boot_id", "hash"}


@pytest.fixture(scope="module")
def sessions(server):
    client = server.client()
    made = [client.session() for _ in range(COUNT)]
    yield made
    for session in made:
        session.kill()


def test_nothing_random_is_the_same_twice(sessions):
    found = [json.loads(session.python(PROBE)["stdout"]) for session in sessions]
    names = set(found[0])
    assert names >= {"urandom", "uuid4", "random", "tempfile", "hostname", "machine_id"}
    for name in sorted(names - MAY_BE_EQUAL):
        values = [each[name] for each in found]
        assert len(set(values)) == COUNT, f"{name}: {values}"
    assert all(len(each["machine_id"]) == 32 for each in found)


def test_the_shell_is_random_too(sessions):
    code = 'echo $RANDOM$RANDOM$RANDOM; mktemp -u; hostname; cat /etc/machine-id; cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1'
    found = [session.bash(code)["stdout"].splitlines() for session in sessions]
    for line in range(len(found[0])):
        values = [each[line] for each in found]
        assert len(set(values)) == COUNT, values


def test_fresh_processes_are_random_too(sessions):
    code = "python3 -c 'import random, uuid, os; print(random.random(), uuid.uuid4(), os.urandom(8).hex())'"
    values = [session.bash(code)["stdout"] for session in sessions]
    assert len(set(values)) == COUNT


def test_a_generator_made_again_from_the_same_seed_is_the_same(sessions):
    code = "import random; random.seed(1); random.random()"
    assert len({session.python(code)["stdout"] for session in sessions}) == 1


def test_the_clock_is_right(sessions):
    for session in sessions:
        before = time.time()
        seen = session.value("__import__('time').time()")
        after = time.time()
        assert before - 2 <= seen <= after + 2
        seen = float(session.bash("date +%s.%N")["stdout"])
        assert before - 2 <= seen <= time.time() + 2


def test_clocks_run(sessions):
    code = (
        "import time\n"
        "a = time.monotonic(), time.time(), time.perf_counter()\n"
        "time.sleep(1)\n"
        "b = time.monotonic(), time.time(), time.perf_counter()\n"
        "import json; print(json.dumps([y - x for x, y in zip(a, b)]))"
    )
    for spent in json.loads(sessions[0].python(code)["stdout"]):
        assert 0.99 <= spent < 30


def test_a_parked_vm_s_clock_is_right_when_it_is_claimed(server):
    # It was restored some seconds ago, and stood still since.
    time.sleep(3)
    session = server.client().session()
    before = time.time()
    seen = session.value("__import__('time').time()")
    assert before - 2 <= seen <= time.time() + 2
    session.kill()


def test_environments_of_sessions_are_their_own(server):
    client = server.client()
    one, two = client.session(env={"TOKEN": "one"}), client.session(env={"TOKEN": "two"})
    for session, value in ((one, "one"), (two, "two")):
        assert session.python("import os; os.environ['TOKEN']")["stdout"] == f"'{value}'\n"
        assert session.bash("echo $TOKEN")["stdout"] == f"{value}\n"
        assert session.bash("python3 -c 'import os; print(os.environ[\"TOKEN\"])'")["stdout"] == f"{value}\n"
    one.kill()
    two.kill()


def test_a_session_starts_clean(server):
    session = server.client().session()
    found = session.value("[n for n in globals() if not n.startswith('_') and n not in ('In', 'Out', 'json', 'exit', 'quit', 'get_ipython', 'display')]")
    assert found == [], "names of the warm-up are left"
    out = session.bash("ls -A /tmp; ls -A ~; jobs; history 2>/dev/null | wc -l")
    assert out["exit_code"] == 0
    assert session.bash("find /tmp -mindepth 1 | wc -l")["stdout"].strip() == "0"
    session.kill()
