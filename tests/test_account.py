"""Keys, SSH keys, egress policies, the audit log and usage, by the unmodified client."""

import subprocess
import time
import uuid

import pytest
import requests
from instavm import AuthenticationError, InstaVM, InstaVMError

from harness import wait_for


@pytest.fixture
def api(server):
    return InstaVM(server.key, base_url=server.url, auto_start_session=False)


def refused(call, status):
    with pytest.raises(requests.HTTPError) as caught:
        call()
    assert caught.value.response.status_code == status, caught.value.response.text
    return caught.value.response.json()["detail"]


def test_a_key_is_shown_once_works_is_renamed_and_revoked_at_once(api, server):
    made = api.api_keys.create(name="laptop")
    key = made["key"]
    assert key.startswith("instavm_sk_") and key.startswith(made["prefix"]) and made["last_used_at"] is None
    theirs = server.client(key)
    assert theirs.get("/v1/users/me").status_code == 200
    listed = {each["id"]: each for each in api.api_keys.list()}
    assert listed[made["id"]]["name"] == "laptop" and listed[made["id"]]["last_used_at"]
    assert key not in str(listed) and not any("key" in each for each in listed.values())
    assert api.api_keys.update(made["id"], name="desk")["name"] == "desk"
    assert api.api_keys.get(made["id"])["name"] == "desk"
    assert api.api_keys.delete(made["id"])["success"] is True
    assert theirs.get("/v1/users/me").status_code == 401
    refused(lambda: api.api_keys.get(made["id"]), 404)
    refused(lambda: api.api_keys.delete(made["id"]), 404)
    with pytest.raises(AuthenticationError):
        InstaVM(key, base_url=server.url).execute("1")


def test_keys_are_their_owner_s(api, server):
    made = api.api_keys.create()
    other = server.new_user("other-" + uuid.uuid4().hex[:8])
    them = InstaVM(other.key, base_url=server.url, auto_start_session=False)
    assert len(them.api_keys.list()) == 1
    refused(lambda: them.api_keys.get(made["id"]), 404)
    refused(lambda: them.api_keys.delete(made["id"]), 404)
    assert api.api_keys.update(made["id"], is_active=False)["is_active"] is False
    assert made["id"] not in {each["id"] for each in api.api_keys.list()}


def test_a_key_of_a_small_plan_makes_only_keys_of_that_plan(server):
    server.cli("plan", "set", "small", "--requests-per-minute", "6000", "--burst", "500", "--max-vms", "0")
    server.cli("user", "create", "planned")
    key = server.cli("key", "create", "--user", "planned", "--plan", "small").stdout.strip()
    client = server.client(key)
    wait_for(lambda: client.get("/v1/users/me").status_code == 200, "the new key")
    made = client.post("/v1/api-keys/", {}).json()
    assert made["plan"] == "small"
    assert server.client(made["key"]).post("/v1/vms", {}).status_code == 429


def test_last_use_is_told_by_the_command_line_after_a_restart(start_server):
    server = start_server()
    server.client().get("/v1/users/me")
    server.terminate()
    server.wait()
    rows = server.cli("key", "list").stdout
    assert time.strftime("%Y-%m-%d", time.gmtime()) in rows, rows
    server.restart()


def ssh_key(tmp_path, kind, *more):
    path = tmp_path / kind
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", f"me@{kind}", "-f", path, *more], check=True)
    shown = subprocess.run(["ssh-keygen", "-l", "-f", f"{path}.pub"], check=True, capture_output=True, text=True)
    return (tmp_path / f"{kind}.pub").read_text(), shown.stdout.split()[1], path.read_text()


@pytest.mark.skipif(subprocess.run(["sh", "-c", "command -v ssh-keygen"], capture_output=True).returncode != 0,
                    reason="ssh-keygen is not installed")
def test_ssh_keys_are_those_of_ssh_keygen(api, tmp_path):
    for kind, more in (("ed25519", []), ("rsa", ["-b", "3072"]), ("ecdsa", ["-b", "384"])):
        public, fingerprint, private = ssh_key(tmp_path, kind, *more)
        added = api.add_ssh_key(public)
        assert added["fingerprint"] == fingerprint and added["comment"] == f"me@{kind}"
        with pytest.raises(InstaVMError) as caught:
            api.add_ssh_key(private)
        assert "422" in str(caught.value)


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti user@example.com"


def test_an_ssh_key_is_added_listed_and_removed(api, server):
    added = api.add_ssh_key(KEY)
    assert added["fingerprint"] == "SHA256:UCUiLr7Pjs9wFFJMDByLgc3NrtdU344OgUM45wZPcIQ"
    assert isinstance(added["id"], int) and added["comment"] == "user@example.com"
    assert api.add_ssh_key(KEY)["id"] == added["id"]
    assert added["id"] in [each["id"] for each in api.list_ssh_keys()]
    other = server.new_user("ssh-" + uuid.uuid4().hex[:8])
    assert other.get("/v1/ssh-keys").json() == {"keys": []}
    assert other.http.delete(f"{server.url}/v1/ssh-keys/{added['id']}").status_code == 404
    assert api.delete_ssh_key(added["id"])["success"] is True
    assert added["id"] not in [each["id"] for each in api.list_ssh_keys()]
    with pytest.raises(InstaVMError) as caught:
        api.delete_ssh_key(added["id"])
    assert "404" in str(caught.value)


def test_an_egress_policy_is_stored_and_told(api, server, session):
    default = api.get_session_egress(session.id)
    assert default["allow_http"] and default["allow_https"] and default["allow_package_managers"]
    assert default["allowed_domains"] == [] and default["enforced"] is False
    set_to = {"allow_http": False, "allow_https": False, "allow_package_managers": False,
              "allowed_domains": ["example.org", "*.pypi.org"], "allowed_cidrs": ["10.0.0.0/8"]}
    assert api.set_session_egress(session.id, **set_to)["status"] == "ok"
    told = api.get_session_egress(session.id)
    assert {name: told[name] for name in set_to} == set_to
    # A VM has its session's until it has its own, and keeps that through a resume.
    vm = api.vms.create(session_id=session.id)
    assert api.get_vm_egress(vm["vm_id"])["allowed_cidrs"] == ["10.0.0.0/8"]
    assert api.set_vm_egress(vm["vm_id"], allowed_domains=["x.org"])["status"] == "ok"
    api.vms.suspend(vm["vm_id"])
    back = api.vms.resume(vm["vm_id"])
    assert api.get_vm_egress(back["vm_id"])["allowed_domains"] == ["x.org"]
    for wrong in ({"allowed_domains": ["http://x"]}, {"allowed_cidrs": ["10.0.0.0/33"]}):
        with pytest.raises(InstaVMError) as caught:
            api.set_session_egress(session.id, **wrong)
        assert "422" in str(caught.value)
    with pytest.raises(InstaVMError) as caught:
        api.get_vm_egress("nope")
    assert "404" in str(caught.value)
    made = api.vms.create(egress_policy={"allow_http": False})
    assert api.get_vm_egress(made["vm_id"])["allow_http"] is False
    refused(lambda: api.vms.create(egress_policy={"allowed_cidrs": ["x"]}), 422)
    api.vms.delete(made["vm_id"])


def test_the_audit_log_tells_who_did_what(api, server):
    kinds = {event["event_type"] for event in api.audit.catalog()["events"]}
    vm = api.vms.create()
    frozen = api.vms.snapshot(vm["vm_id"])
    api.snapshots.delete(frozen["id"])
    api.vms.suspend(vm["vm_id"])
    back = api.vms.resume(vm["vm_id"])
    api.vms.delete(back["vm_id"])
    events = api.audit.events(session_id=vm["session_id"], limit=50)["items"]
    told = [event["event_type"] for event in events]
    assert told == ["vm.terminated", "vm.resumed", "vm.suspended", "snapshot.created", "snapshot.deleted",
                    "snapshot.created", "vm.started", "vm.created"], told
    assert set(told) <= kinds
    me = api.get_current_user()["id"]
    assert all(event["actor_id"] == me and event["status"] == "success" for event in events)
    assert api.audit.get_event(events[0]["id"]) == events[0]
    only = api.audit.events(vm_id=vm["vm_id"], event_group="vm", event_type="vm.created")["items"]
    assert [event["event_type"] for event in only] == ["vm.created"]


def test_the_audit_log_is_read_page_by_page(api):
    for n in range(5):
        api.api_keys.delete(api.api_keys.create(name=str(n))["id"])
    seen, cursor = [], None
    while True:
        page = api.audit.events(event_group="api_key", limit=3, cursor=cursor)
        assert len(page["items"]) <= 3
        seen += [event["id"] for event in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert len(seen) >= 10 and len(set(seen)) == len(seen)
    refused(lambda: api.audit.events(limit=201), 422)
    refused(lambda: api.audit.events(cursor="x"), 422)
    refused(lambda: api.audit.get_event("nope"), 404)


def test_logins_are_in_the_log_and_other_users_events_are_not(api, server):
    other = server.new_user("logged-" + uuid.uuid4().hex[:8])
    name = other.get("/v1/users/me").json()["name"]
    for password in (other.key, "wrong"):
        requests.post(f"{server.url}/token", data={"username": name, "password": password}, timeout=30)
    them = InstaVM(other.key, base_url=server.url, auto_start_session=False)
    events = them.audit.events(event_type="login.token")["items"]
    assert [event["status"] for event in events] == ["failure", "success"]
    mine = {event["id"] for event in api.audit.events(limit=200)["items"]}
    assert not mine & {event["id"] for event in events}


def test_a_session_s_usage(api, session):
    before = session.client.get(f"/v1/sessions/usage/{session.id}").json()
    assert before["vm_id"] is None and before["cpu_seconds"] is None and before["commands_run"] == 0
    session.python("sum(range(10**6))")
    api.session_id = session.id
    used = api.get_usage()
    assert used["commands_run"] == 1 and used["cpu_seconds"] > 0 and used["memory_bytes"] > 1 << 20
    assert used["uptime_seconds"] > 0 and used["memory_mb"] == 512


def test_sandboxes_are_found_by_their_metadata(api, client):
    tag = uuid.uuid4().hex
    made = [client.session(metadata={"tag": tag, "n": n}) for n in range(3)]
    found = api.list_sandboxes(metadata={"tag": tag})
    assert [box["session_id"] for box in found] == [each.id for each in reversed(made)]
    assert [box["metadata"]["n"] for box in api.list_sandboxes(metadata={"tag": tag, "n": 1})] == [1]
    assert len(api.list_sandboxes(metadata={"tag": tag}, limit=2)) == 2
    assert api.list_sandboxes(metadata={"tag": tag, "n": "1"}) == []
    assert client.get("/v1/sessions/sandboxes?metadata=[1]").status_code == 422
    assert client.get("/v1/sessions/sandboxes?limit=0").status_code == 422


def test_an_app_s_url_is_refused_clearly(api, session):
    with pytest.raises(Exception) as caught:
        api.get_session_app_url(session.id, port=8000)
    assert "409" in str(caught.value)
    assert "no network" in session.client.get(f"/v1/sessions/app-url/{session.id}").json()["detail"]
    assert session.client.get(f"/v1/sessions/app-url/{uuid.uuid4()}").status_code == 404
    assert session.client.get(f"/v1/sessions/app-url/{session.id}?port=0").status_code == 422


def test_usage_by_day(api):
    vm = api.vms.create()
    time.sleep(2)
    api.vms.delete(vm["vm_id"])
    told = api.get_usage_breakdown(days=7)
    assert told["total_days"] == 7 == len(told["daily_breakdown"])
    assert told["daily_breakdown"][-1]["date"] == time.strftime("%Y-%m-%d", time.gmtime())
    assert told["totals"]["vm_hours"] > 1.5 / 3600
    assert told["totals"]["ram_gib_hours"] > 0
    assert api.get_usage_breakdown(start_date="2020-01-01", end_date="2020-01-03")["total_days"] == 3


def test_what_is_absent_is_an_empty_list_or_a_clear_404(api, client):
    assert api.list_vaults() == [] and api.get_vault_catalog() == []
    assert api.volumes.list() == [] and api.tapes.list() == [] and api.recordings.list() == []
    assert api.webhooks.list_endpoints() == [] and api.webhooks.list_deliveries() == {"items": [], "next_cursor": None}
    assert api.credits.usage() == [] and api.custom_domains.list() == [] and api.templates.list() == []
    assert api.list_browser_sessions() == []
    vm = api.vms.create()
    assert api.vms.list_volumes(vm["vm_id"]) == []
    session_id = vm["session_id"]
    calls = {
        "volumes": lambda: api.volumes.create("v", 1 << 20),
        "volumes ": lambda: api.vms.mount_volume(vm["vm_id"], "vol", "/mnt"),
        "volumes  ": lambda: api.vms.unmount_volume(vm["vm_id"], "vol", "/mnt"),
        "shares": lambda: api.shares.create(80, session_id=session_id),
        "domain": lambda: api.custom_domains.create("x.org", "s", "other"),
        "no tape": lambda: api.tapes.get("t"),
        "webhooks": lambda: api.webhooks.create_endpoint("https://example.org"),
        "devbox": lambda: api.templates.get("slug"),
        "devbox ": lambda: api.templates.run("slug"),
        "bills": lambda: api.credits.summary(),
        "bills ": lambda: api.credits.rates(),
        "desktops": lambda: api.computer_use.viewer_url(session_id),
        "record": lambda: api.recordings.get("r"),
    }
    for word, call in calls.items():
        detail = refused(call, 404)
        assert word.strip() in detail or "network" in detail, (word, detail)
    refused(lambda: api.create_vault("v"), 404)
    with pytest.raises(InstaVMError) as caught:
        api.create_browser_session()
    assert "404" in str(caught.value)
    api.vms.delete(vm["vm_id"])
