"""Many sessions at once, each with its own state."""

import pathlib
import random
from concurrent.futures import ThreadPoolExecutor

from harness import SLOW

COUNT = 200 // SLOW

CONFIG = {"session.max_vms": COUNT + 10, "session.pool.low": 4, "session.pool.high": 8}


def unique_memory(pid):
    """A process's private bytes, and its share of what it has in common with others."""
    found = {}
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name.rstrip(":")] = int(value) * 1024
    return found["Private_Clean"] + found["Private_Dirty"], found["Pss"]


def test_two_hundred_sessions_keep_two_hundred_values(server, capsys):
    client = server.client()
    values = random.sample(range(10**9), COUNT)

    def start(value):
        session = client.copy().session(vm_lifetime_seconds=3600)
        out = session.python(f"value = {value}; value")
        assert out["stdout"] == f"{value}\n"
        return session

    with ThreadPoolExecutor(8) as pool:
        sessions = list(pool.map(start, values))
    try:
        assert len({session.id for session in sessions}) == COUNT
        assert server.metric("thaw_session_vms") == COUNT, "all of them are alive at once"
        pairs = list(zip(sessions, values))
        random.shuffle(pairs)

        def check(pair):
            session, value = pair
            out = session.python("value")
            return out["stdout"] == f"{value}\n" and "vm_restarted" not in out

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(check, pairs))
        assert all(results), f"{results.count(False)} of {COUNT} read back wrong"
        memory = sorted(unique_memory(pid) for pid in server.workers())
        middle, most = memory[len(memory) // 2], memory[-1]
        with capsys.disabled():
            print(
                f"\n{COUNT} sessions alive: unique memory of a worker p50 {middle[0] / 2**20:.1f} MiB,"
                f" most {most[0] / 2**20:.1f} MiB; proportional p50 {middle[1] / 2**20:.1f} MiB"
            )
    finally:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda session: session.copy().kill(), sessions))
