"""What is the machine's own to get right, on whichever machine this host has: `make nested` runs it on the other one."""

import json
import subprocess
import time

import pytest

from harness import THAW, Vm

FLAGS = next(line for line in open("/proc/cpuinfo") if line.startswith("flags")).split()
HVM = bool({"vmx", "svm"} & set(FLAGS))
# Two vCPUs, also where the host has one processor: they must work for each other all the same.
CONFIG = {"session.pool.low": 1, "session.pool.high": 1, "session.max_vcpus": 2}


@pytest.fixture(scope="module")
def probe():
    done = subprocess.run([THAW, "doctor", "--json"], capture_output=True, text=True)
    return json.loads(done.stdout)["probe"]


def test_the_probe_picks_the_machine_that_this_processor_is_made_for(probe, server):
    # The modules that could be loaded here are none of its business: it tries what a guest's CPL0 code costs.
    expected = "hvm" if HVM else "pv"
    assert probe["kind"] == expected, probe
    assert (probe["cpl0_ns"] < 50) == (expected == "hvm")
    assert f"machine {expected}" in server.ready_line


def test_vcpus_are_real_where_the_machine_has_them_to_give(make):
    vm = make(vcpu_count=2)
    assert int(vm.out("nproc", "bash")) == 2
    assert vm.client.get(f"/v1/vms/{vm.id}").json()["vcpu_count"] == 2


def test_a_vcpu_can_be_switched_off_and_on_again(make):
    vm = make(vcpu_count=2)
    switch = lambda on: vm.out(f"echo {on} > /sys/devices/system/cpu/cpu1/online; nproc", "bash")
    second = "import os; os.sched_setaffinity(0, {1}); print(sum(range(100000)), sorted(os.sched_getaffinity(0)))"
    for _ in range(3):
        assert int(switch(0)) == 1
        assert int(vm.out("sleep 0.3; nproc", "bash")) == 1
        assert int(switch(1)) == 2
        assert vm.out(f"python3 -c '{second}'", "bash") == "4999950000 [1]"
    # Frozen while it is off, it can be switched on in a copy.
    switch(0)
    [copy] = [Vm(vm.client, one) for one in vm.fork(1)["forks"]]
    assert int(copy.out("echo 1 > /sys/devices/system/cpu/cpu1/online; nproc", "bash")) == 2
    copy.end()


BUSY = """
import subprocess
counters = [
    subprocess.Popen(["python3", "-c", f"n = 0\\nwhile True:\\n n += 1\\n if n % 20000 == 0: open('/tmp/count{i}', 'w').write(str(n))"])
    for i in range(2)
]
"""
READ = "print(*[int(open(f'/tmp/count{i}').read() or 0) for i in range(2)])"


def counts(vm):
    # Each is written anew now and then, and may be empty for that moment.
    for _ in range(50):
        found = [int(n) for n in vm.out(READ).split()]
        if all(found):
            return found
        time.sleep(0.1)
    raise AssertionError("no counts")


def test_a_vm_that_computes_on_all_its_vcpus_goes_on_where_it_was_frozen(make):
    vm = make(vcpu_count=2)
    vm.run(BUSY)
    time.sleep(3)
    before = counts(vm)
    copies = [Vm(vm.client, one) for one in vm.fork(2)["forks"]]
    again = make(snapshot_id=vm.snapshot()["id"])
    for copy in [vm, again, *copies]:
        first = counts(copy)
        assert all(now >= then for now, then in zip(first, before))
        time.sleep(2)
        assert all(later > earlier for later, earlier in zip(counts(copy), first)), "it stands still"
    for copy in copies:
        copy.end()


def test_clocks_go_on_and_timers_fire_after_a_restore(make):
    vm = make()
    vm.run("import threading, time; fired = []; start = time.monotonic()")
    vm.run("threading.Timer(4, lambda: fired.append(time.monotonic() - start)).start()")
    again = make(snapshot_id=vm.snapshot()["id"])
    time.sleep(5)
    for each in [vm, again]:
        assert abs(float(each.out("time.time()")) - time.time()) < 2
        after = float(each.out("fired[0]"))
        assert 4 <= after < 60, after


@pytest.mark.parametrize("how", ["reboot(0x4321fedc)", "reboot(0x01234567)", "panic"])
def test_a_guest_that_switches_itself_off_or_panics_ends_its_vm(make, how):
    """The kernel's own ways out: power off, restart, panic."""
    vm = make()
    code = {
        "panic": "open('/proc/sysrq-trigger', 'w').write('c')",
    }.get(how, f"import ctypes; ctypes.CDLL(None).{how}")
    try:
        vm.client.post("/execute_async", {"command": code, "session_id": vm.session})
    except OSError:
        pass
    end = time.monotonic() + 30
    while vm.client.get(f"/v1/vms/{vm.id}").json()["status"] == "active":
        assert time.monotonic() < end, "the VM is still there"
        time.sleep(0.2)
