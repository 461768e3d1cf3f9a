"""VMs by themselves: made, listed, changed, frozen, copied, suspended and resumed, by the unmodified client."""

import time
import uuid

import pytest
import requests
from instavm import InstaVM, RateLimitError

import harness
from harness import wait_for

CONFIG = {"session.pool.low": 1, "session.pool.high": 2}


@pytest.fixture
def api(server):
    """The official client, for calls that need no session."""
    return InstaVM(server.key, base_url=server.url, auto_start_session=False)


@pytest.fixture
def vm(api):
    """A VM of its own; it goes with the test."""
    made = api.vms.create(metadata={"test": "yes"})
    yield made
    api.vms.delete(made["vm_id"])


def run(api, vm, code, language="python", **more):
    """Runs something in a VM's session, as a user of the client would."""
    api.session_id = vm["session_id"]
    return api.execute(code, language=language, **more)


def out(api, vm, code, language="python"):
    done = run(api, vm, code, language)
    assert done["exit_code"] == 0, done
    return done["stdout"]


def refused(call, status):
    with pytest.raises(requests.HTTPError) as caught:
        call()
    assert caught.value.response.status_code == status, caught.value.response.text
    return caught.value.response.json()["detail"]


def test_a_vm_is_made_with_an_empty_body_and_runs_at_once(api, vm):
    assert vm["status"] == "active" and str(uuid.UUID(vm["session_id"])) == vm["session_id"]
    assert out(api, vm, "6 * 7") == "42\n"
    api.session_id = vm["session_id"]
    assert api.get_session_status()["vm_id"] == vm["vm_id"]


def test_what_was_asked_for_is_what_is_told(api):
    made = api.vms.create(
        memory_mb=1024, vcpu_count=2, vm_lifetime_seconds=600, metadata={"a": {"b": 1}}, env={"GREETING": "hi"},
        auto_suspend=True, auto_resume=True,
    )
    try:
        told = api.vms.get(made["vm_id"])
        assert (told["memory_mb"], told["vcpu_count"], told["vm_lifetime_seconds"]) == (1024, 2, 600)
        assert told["metadata"] == {"a": {"b": 1}} and told["auto_suspend"] and told["auto_resume"]
        assert out(api, made, "import os; print(os.environ['GREETING'])") == "hi\n"
        total = int(out(api, made, "awk '/MemTotal/ {print $2}' /proc/meminfo", "bash"))
        assert 900 << 10 < total <= 1024 << 10
    finally:
        api.vms.delete(made["vm_id"])


def test_without_waiting_the_id_comes_first_and_the_vm_after(api):
    made = api.vms.create(wait=False)
    assert made["status"] in ("creating", "active")
    wait_for(lambda: api.vms.get(made["vm_id"])["status"] == "active", "the VM to be there")
    assert out(api, made, "1") == "1\n"
    assert api.vms.delete(made["vm_id"])["status"] == "terminated"


def test_lists_are_of_live_vms_and_of_all_records(api, vm):
    gone = api.vms.create()
    assert api.vms.delete(gone["vm_id"])["status"] == "terminated"
    live = {record["vm_id"]: record for record in api.vms.list()}
    every = {record["vm_id"]: record for record in api.vms.list_all_records()}
    assert vm["vm_id"] in live and gone["vm_id"] not in live
    assert every[gone["vm_id"]]["status"] == "terminated" and every[gone["vm_id"]]["ended_at"]
    assert live[vm["vm_id"]]["expires_at"] > live[vm["vm_id"]]["created_at"]
    # Ending it once more is no error.
    assert api.vms.delete(gone["vm_id"])["status"] == "terminated"


def test_the_vm_of_a_session_that_just_ran_something_is_listed_too(api, session):
    session.python("1")
    vm_id = session.status()["vm_id"]
    assert api.vms.get(vm_id)["session_id"] == session.id
    session.kill()
    wait_for(lambda: api.vms.get(vm_id)["status"] == "terminated", "the record to say so")


def test_a_session_gets_its_vm_by_its_id_and_only_one(api, client):
    made = client.session(metadata={"of": "session"})
    vm = api.vms.create(session_id=made.id, vm_lifetime_seconds=900)
    assert vm["session_id"] == made.id and vm["metadata"] == {"of": "session"}
    assert made.status()["vm_id"] == vm["vm_id"] and made.status()["expires_in_seconds"] > 800
    assert vm["vm_id"] in refused(lambda: api.vms.create(session_id=made.id), 409)
    refused(lambda: api.vms.create(session_id=str(uuid.uuid4())), 404)
    made.kill()


def test_settings_are_changed_and_memory_is_not(api, vm):
    told = api.vms.update(vm["vm_id"], auto_suspend=True, auto_resume=True, metadata={"new": 1}, snapshot_name="n")
    assert (told["auto_suspend"], told["auto_resume"], told["metadata"]) == (True, True, {"new": 1})
    assert api.vms.update(vm["vm_id"], auto_suspend=False)["auto_resume"] is True
    assert api.vms.update(vm["vm_id"], memory_mb=vm["memory_mb"])["memory_mb"] == vm["memory_mb"]
    assert "cannot change" in refused(lambda: api.vms.update(vm["vm_id"], memory_mb=4096), 409)
    refused(lambda: api.vms.update(vm["vm_id"], vault_ids=["vlt_x"]), 404)
    assert {"new": 1} in [box["metadata"] for box in api.list_sandboxes(metadata={"new": 1})]


@pytest.mark.parametrize("fields,status", [
    ({"vault_ids": ["vlt_1"]}, 404),
    ({"volumes": [{"volume_id": "vol_1", "mount_path": "/x"}]}, 404),
    ({"snapshot_id": "nope"}, 404),
    ({"share": {"port": 80, "is_public": True}}, 422),
    ({"custom_domain": {"domain": "x.org"}}, 422),
    ({"image_variant": "computer-use"}, 422),
    ({"memory_mb": 64}, 422),
    ({"vcpu_count": 3}, 422),
    ({"metadata": "x"}, 422),
])
def test_what_cannot_be_had_is_refused_and_nothing_runs(api, server, fields, status):
    before = {record["vm_id"] for record in api.vms.list_all_records()}
    assert refused(lambda: api.vms.create(**fields), status)
    assert {record["vm_id"] for record in api.vms.list_all_records()} == before


def test_a_snapshot_has_the_variables_and_the_files(api, vm):
    run(api, vm, "x = 41; open('/tmp/kept', 'w').write('file')")
    frozen = api.vms.snapshot(vm["vm_id"], name="before")
    assert (frozen["status"], frozen["name"], frozen["vm_id"]) == ("ready", "before", vm["vm_id"])
    # The original goes on, and what it does later is not in the snapshot.
    assert out(api, vm, "x += 1; x") == "42\n"
    copies = [api.vms.create(snapshot_id=frozen["snapshot_id"]) for _ in range(2)]
    try:
        assert len({copy["session_id"] for copy in copies} | {vm["session_id"]}) == 3
        for copy in copies:
            assert copy["snapshot_id"] == frozen["id"]
            assert out(api, copy, "print(x, open('/tmp/kept').read())") == "41 file\n"
        seen = [out(api, each, "import random, uuid, os; print(random.random(), uuid.uuid4(), os.urandom(8).hex())")
                for each in [vm, *copies]]
        assert len(set(seen)) == 3, seen
        names = {out(api, each, "cat /etc/machine-id; hostname", "bash") for each in [vm, *copies]}
        assert len(names) == 3
        clock = float(out(api, copies[0], "import time; print(time.time())"))
        assert abs(clock - time.time()) < 5
    finally:
        for copy in copies:
            api.vms.delete(copy["vm_id"])
    listed = {snapshot["id"]: snapshot for snapshot in api.snapshots.list()}
    assert listed[frozen["id"]]["size_bytes"] > 1 << 20
    assert api.snapshots.get(frozen["id"])["memory_mb"] == vm["memory_mb"]
    assert api.snapshots.delete(frozen["id"])["success"] is True
    refused(lambda: api.snapshots.get(frozen["id"]), 404)
    refused(lambda: api.vms.create(snapshot_id=frozen["id"]), 404)


def test_a_snapshot_may_be_made_while_a_command_runs(api, vm, server):
    run(api, vm, "done = []")
    busy = server.client().copy()
    work = "import time\nfor n in range(30):\n    time.sleep(0.1); done.append(n)"
    running = harness.background(lambda: busy.run(work, session_id=vm["session_id"]))
    time.sleep(1)
    frozen = api.vms.snapshot(vm["vm_id"])
    assert running.result()["exit_code"] == 0
    assert out(api, vm, "len(done)") == "30\n"
    copy = api.vms.create(snapshot_id=frozen["id"])
    try:
        count = int(out(api, copy, "print(len(done))"))
        assert 0 < count <= 30, count
        assert out(api, copy, "1 + 1") == "2\n"
    finally:
        api.vms.delete(copy["vm_id"])
        api.snapshots.delete(frozen["id"])


def test_a_snapshot_without_waiting_is_building_then_ready(api, vm):
    frozen = api.vms.snapshot(vm["vm_id"], wait=False)
    assert frozen["status"] in ("building", "ready")
    wait_for(lambda: api.snapshots.get(frozen["id"])["status"] == "ready", "the snapshot")
    assert api.snapshots.delete(frozen["id"])["success"] is True


def test_a_clone_is_another_vm_with_the_same_memory(api, vm):
    run(api, vm, "state = {'n': 1}")
    copy = api.vms.clone(vm["vm_id"])
    try:
        assert copy["status"] == "active" and copy["snapshot_deleted"] is True
        assert copy["vm_id"] != vm["vm_id"] and copy["session_id"] != vm["session_id"]
        out(api, copy, "state['n'] += 1; state")
        assert out(api, copy, "state") == "{'n': 2}\n"
        assert out(api, vm, "state") == "{'n': 1}\n"
        assert api.snapshots.list() == []
    finally:
        api.vms.delete(copy["vm_id"])


def test_suspend_and_resume_keep_the_state_under_a_new_id(api, server):
    vm = api.vms.create()
    run(api, vm, "value = list(range(1000)); import threading; t = threading.Event()")
    workers = len(server.workers())
    parked = api.vms.suspend(vm["vm_id"])
    assert parked["status"] == "suspended"
    wait_for(lambda: len(server.workers()) <= workers, "its process to be gone")
    api.session_id = vm["session_id"]
    assert api.get_session_status()["vm_status"] == "suspended"
    assert [record["status"] for record in api.vms.list() if record["vm_id"] == vm["vm_id"]] == ["suspended"]
    # Nobody asked for commands to wake it.
    sleeping = server.client().post("/execute", {"command": "1", "session_id": vm["session_id"]})
    assert sleeping.status_code == 409 and "suspended" in sleeping.json()["detail"]
    refused(lambda: api.vms.suspend(vm["vm_id"]), 409)
    back = api.vms.resume(vm["vm_id"])
    assert back["status"] == "active" and back["vm_id"] != vm["vm_id"]
    assert back["session_id"] == vm["session_id"] and back["previous_vm_ids"] == [vm["vm_id"]]
    done = run(api, back, "print(len(value), sum(value), t.is_set())")
    assert done["stdout"] == "1000 499500 False\n" and "vm_restarted" not in done
    # The old id leads to it, too.
    assert api.vms.get(vm["vm_id"])["vm_id"] == back["vm_id"]
    refused(lambda: api.vms.resume(back["vm_id"]), 409)
    api.vms.suspend(vm["vm_id"])
    third = api.vms.resume(vm["vm_id"], wait=False)
    wait_for(lambda: api.vms.get(third["vm_id"])["status"] == "active", "it to run again", bound=30) \
        if third["status"] != "active" else None
    assert out(api, third, "len(value)") == "1000\n"
    assert api.vms.delete(vm["vm_id"])["status"] == "terminated"
    left = [path for path in (server.data / "snapshots").rglob("*") if path.is_file() and path.name != ".lock"]
    wait_for(lambda: not any(path.exists() for path in left), "the snapshot to be gone")


def test_a_command_wakes_a_vm_that_may_be_woken(api):
    vm = api.vms.create(auto_resume=True)
    run(api, vm, "kept = 'yes'")
    api.vms.suspend(vm["vm_id"])
    done = run(api, vm, "kept")
    assert done["stdout"] == "'yes'\n" and "vm_restarted" not in done
    assert api.vms.get(vm["vm_id"])["status"] == "active"
    api.vms.delete(vm["vm_id"])


def test_at_the_end_of_its_lifetime_it_is_suspended_or_leaves_a_snapshot(api):
    parked = api.vms.create(vm_lifetime_seconds=20, auto_suspend=True)
    leaving = api.vms.create(vm_lifetime_seconds=20, snapshot_on_terminate=True, snapshot_name="last words")
    run(api, parked, "a = 1")
    run(api, leaving, "b = 2")
    wait_for(lambda: api.vms.get(parked["vm_id"])["status"] == "suspended", "it to be suspended", bound=60)
    wait_for(lambda: api.vms.get(leaving["vm_id"])["status"] == "terminated", "it to end", bound=60)
    back = api.vms.resume(parked["vm_id"])
    assert out(api, back, "a") == "1\n"
    api.vms.delete(back["vm_id"])
    last = [snapshot for snapshot in api.snapshots.list() if snapshot["name"] == "last words"]
    copy = api.vms.create(snapshot_id=last[0]["id"])
    assert out(api, copy, "b") == "2\n"
    api.vms.delete(copy["vm_id"])
    api.snapshots.delete(last[0]["id"])


def test_a_deleted_vm_leaves_the_snapshot_that_was_asked_for(api):
    vm = api.vms.create(snapshot_on_terminate=True)
    run(api, vm, "c = 3")
    assert api.vms.delete(vm["vm_id"])["status"] == "terminated"
    left = [snapshot for snapshot in api.snapshots.list() if snapshot["vm_id"] == vm["vm_id"]]
    assert len(left) == 1
    api.snapshots.delete(left[0]["id"])


def test_a_busy_vm_is_not_suspended_under_its_command(start_server):
    server = start_server(config={"snapshot.suspend_wait_s": 1})
    api = InstaVM(server.key, base_url=server.url, auto_start_session=False)
    vm = api.vms.create()
    running = harness.background(lambda: server.client().run("import time; time.sleep(4); 'end'",
                                                             session_id=vm["session_id"]))
    time.sleep(1)
    assert "still runs" in refused(lambda: api.vms.suspend(vm["vm_id"]), 409)
    assert running.result()["stdout"] == "'end'\n"
    assert api.vms.suspend(vm["vm_id"])["status"] == "suspended"


def test_staged_variables_are_in_everything_run_afterwards_and_nowhere_else(api, vm, server):
    secret = "s3cr3t-" + uuid.uuid4().hex
    said = api.vms.stage_env(vm["vm_id"], {"TOKEN": secret, "OTHER": "x"})
    assert sorted(said["staged"]) == ["OTHER", "TOKEN"]
    assert out(api, vm, "import os; print(os.environ['TOKEN'])") == secret + "\n"
    assert out(api, vm, "echo $TOKEN", "bash") == secret + "\n"
    assert secret not in str(api.vms.get(vm["vm_id"])) + str(api.get_session_info())
    assert secret not in server.log()
    for path in server.data.glob("thaw.db*"):
        assert secret.encode() not in path.read_bytes()
    wrong = server.client().post(f"/v1/vms/{vm['vm_id']}/stage-env", {"entries": [{"env_name": "A", "value": 7}]})
    assert wrong.status_code == 422
    wrong = server.client().post(f"/v1/vms/{vm['vm_id']}/stage-env", {"entries": [{"env_name": "A=", "value": secret}]})
    assert wrong.status_code == 422 and secret not in wrong.text


def test_another_tenant_s_vms_and_snapshots_do_not_exist(api, vm, server):
    frozen = api.vms.snapshot(vm["vm_id"])
    other = server.new_user("stranger-" + uuid.uuid4().hex[:8])
    them = InstaVM(other.key, base_url=server.url, auto_start_session=False)
    assert them.vms.list() == [] and them.vms.list_all_records() == [] and them.snapshots.list() == []
    for call in (
        lambda: them.vms.get(vm["vm_id"]),
        lambda: them.vms.update(vm["vm_id"], auto_suspend=True),
        lambda: them.vms.delete(vm["vm_id"]),
        lambda: them.vms.suspend(vm["vm_id"]),
        lambda: them.vms.resume(vm["vm_id"]),
        lambda: them.vms.clone(vm["vm_id"]),
        lambda: them.vms.snapshot(vm["vm_id"]),
        lambda: them.vms.stage_env(vm["vm_id"], {"A": "b"}),
        lambda: them.vms.create(snapshot_id=frozen["id"]),
        lambda: them.vms.create(session_id=vm["session_id"]),
        lambda: them.snapshots.get(frozen["id"]),
        lambda: them.snapshots.delete(frozen["id"]),
    ):
        refused(call, 404)
    assert api.snapshots.delete(frozen["id"])["success"] is True


def test_a_plan_s_vms_are_the_most_there_are(api, server):
    server.cli("plan", "set", "two", "--requests-per-minute", "6000", "--burst", "600", "--max-vms", "2")
    client = server.new_user("two-" + uuid.uuid4().hex[:8], plan="two")
    them = InstaVM(client.key, base_url=server.url, auto_start_session=False)
    made = [them.vms.create() for _ in range(2)]
    with pytest.raises(RateLimitError) as caught:
        them.vms.create()
    assert "your plan allows 2 VMs" in str(caught.value)
    # A suspended one takes no place.
    them.vms.suspend(made[0]["vm_id"])
    third = them.vms.create()
    for vm in [*made, third]:
        them.vms.delete(vm["vm_id"])


def test_records_and_suspended_vms_outlive_the_server(start_server):
    server = start_server()
    api = InstaVM(server.key, base_url=server.url, auto_start_session=False)
    running, parked, ended = (api.vms.create(metadata={"n": n}) for n in range(3))
    run(api, parked, "through = 'a restart'")
    api.vms.suspend(parked["vm_id"])
    api.vms.delete(ended["vm_id"])
    frozen = api.vms.snapshot(running["vm_id"], name="kept")
    server.kill()
    server.restart()
    api = InstaVM(server.key, base_url=server.url, auto_start_session=False)
    status = {record["vm_id"]: record["status"] for record in api.vms.list_all_records()}
    assert status == {running["vm_id"]: "failed", parked["vm_id"]: "suspended", ended["vm_id"]: "terminated"}
    assert "without warning" in api.vms.get(running["vm_id"])["reason"]
    assert [snapshot["id"] for snapshot in api.snapshots.list()] == [frozen["id"]]
    back = api.vms.resume(parked["vm_id"])
    assert out(api, back, "through") == "'a restart'\n"
    # And after an end in order.
    server.terminate()
    server.wait()
    server.restart()
    api = InstaVM(server.key, base_url=server.url, auto_start_session=False)
    assert api.vms.get(back["vm_id"])["status"] == "terminated"
    copy = api.vms.create(snapshot_id=frozen["id"])
    assert out(api, copy, "1") == "1\n"


def test_a_damaged_or_foreign_snapshot_is_refused_with_the_reason(start_server):
    import json

    server = start_server()
    api = InstaVM(server.key, base_url=server.url, auto_start_session=False)
    vm = api.vms.create()
    frozen = [api.vms.snapshot(vm["vm_id"]) for _ in range(3)]
    server.terminate()
    server.wait()
    where = [server.data / "snapshots" / each["id"] for each in frozen]
    # The pages that the first one alone has; the others have theirs of it, too, and are refused for other reasons.
    named = [json.loads((place / "manifest.json").read_text())["memory"]["chunks"] for place in where]
    with open(server.data / "snapshots/chunks" / named[0][0]["sha256"], "r+b") as file:
        file.seek(4096 + 17)
        file.write(b"damage")
    for place, change in ((where[1], {"image": "sha256-other"}), (where[2], {"cpu": {
        "vendor": "Nobody", "model": "", "flags": []}})):
        manifest = json.loads((place / "manifest.json").read_text())
        (place / "manifest.json").write_text(json.dumps(manifest | change))
    server.restart()
    api = InstaVM(server.key, base_url=server.url, auto_start_session=False)
    reasons = [refused(lambda each=each: api.vms.create(snapshot_id=each["id"]), 409) for each in frozen]
    assert "damaged" in reasons[0] and "image" in reasons[1] and "processor by Nobody" in reasons[2]
    assert api.vms.list() == []


def test_snapshots_are_bounded_by_number_size_and_disk(start_server):
    server = start_server(config={"snapshot.max_per_tenant": 1})
    api = InstaVM(server.key, base_url=server.url, auto_start_session=False)
    vm = api.vms.create()
    api.vms.snapshot(vm["vm_id"])
    with pytest.raises(RateLimitError) as caught:
        api.vms.snapshot(vm["vm_id"])
    assert "1 snapshots are the most" in str(caught.value)
    with pytest.raises(RateLimitError):
        api.vms.clone(vm["vm_id"])
    assert api.vms.get(vm["vm_id"])["status"] == "active"
    tight = start_server(config={"snapshot.disk_floor_mib": 1 << 40})
    api = InstaVM(tight.key, base_url=tight.url, auto_start_session=False)
    vm = api.vms.create()
    assert "MiB short" in refused(lambda: api.vms.snapshot(vm["vm_id"]), 409)
    small = start_server(config={"snapshot.max_mib_per_tenant": 1})
    api = InstaVM(small.key, base_url=small.url, auto_start_session=False)
    vm = api.vms.create()
    with pytest.raises(RateLimitError) as caught:
        api.vms.snapshot(vm["vm_id"])
    assert "1 MiB are allowed" in str(caught.value)
    left = [path for path in (small.data / "snapshots").iterdir() if path.name not in ("chunks", "bases", ".lock")]
    assert not left


def test_building_from_an_oci_image_is_refused_clearly(api):
    assert "thaw image build" in refused(lambda: api.snapshots.create("docker.io/library/ubuntu:24.04"), 409)


@pytest.mark.parametrize("asked", [256, 512, 2048])
def test_memory_really_is_what_was_asked_for(api, asked):
    vm = api.vms.create(memory_mb=asked)
    try:
        total = int(out(api, vm, "awk '/MemTotal/ {print $2}' /proc/meminfo", "bash"))
        assert asked * 0.7 * 1024 < total <= asked * 1024, total
        assert vm["memory_mb"] == asked
    finally:
        api.vms.delete(vm["vm_id"])


def test_more_vcpus_are_more_of_a_busy_processor(api, server):
    """Two VMs for each core spin: the heavier ones get the larger part."""
    import os

    before = set(server.workers())
    made = {}
    for vcpus in (1, 8):
        for _ in range(os.cpu_count()):
            made[api.vms.create(vcpu_count=vcpus)["vm_id"]] = vcpus
    by_vm = {vm_id: api.vms.get(vm_id) for vm_id in made}
    client = server.client()
    spins = [client.post("/execute_async", {"command": "while True: pass", "timeout": 60,
                                            "session_id": vm["session_id"]}) for vm in by_vm.values()]
    assert all(spin.status_code == 200 for spin in spins)
    time.sleep(6)
    spent = {1: 0.0, 8: 0.0}
    for vm_id, vcpus in made.items():
        usage = client.get(f"/v1/sessions/usage/{by_vm[vm_id]['session_id']}").json()
        spent[vcpus] += usage["cpu_seconds"]
        assert usage["uptime_seconds"] > 5 and usage["commands_run"] == 1 and usage["memory_bytes"] > 0
    for vm_id in made:
        api.vms.delete(vm_id)
    assert before is not None
    assert spent[8] > 2 * spent[1], spent


def test_a_lifetime_begins_anew_when_its_owner_says_so(api, client):
    short = api.vms.create(vm_lifetime_seconds=20)
    long = api.vms.create(vm_lifetime_seconds=3600)
    left = lambda vm: client.get(f"/v1/sessions/status/{vm['session_id']}").json()
    time.sleep(3)
    told = api.vms.update(short["vm_id"], vm_lifetime_seconds=3600)
    assert told["vm_lifetime_seconds"] == 3600 and told["expires_at"] > short["expires_at"]
    assert api.vms.update(long["vm_id"], vm_lifetime_seconds=20)["expires_at"] < long["expires_at"]
    assert 3590 < left(short)["expires_in_seconds"] <= 3600 and 15 < left(long)["expires_in_seconds"] <= 20
    wait_for(lambda: not left(long)["vm_alive"], "the renewed lifetime to pass", bound=40)
    assert left(short)["vm_alive"] and api.vms.get(long["vm_id"])["status"] == "terminated"
    refused(lambda: api.vms.update(long["vm_id"], vm_lifetime_seconds=60), 409)
    refused(lambda: api.vms.update(short["vm_id"], vm_lifetime_seconds=5), 422)
    api.vms.delete(short["vm_id"])
