"""Two users: neither can tell that the other's sessions and tasks exist."""

import uuid

import pytest


@pytest.fixture(scope="module")
def other(server):
    return server.new_user("other")


def same_as_unknown(client, send, owned):
    """The answer about something of somebody else's is the one about nothing at all."""
    unknown = str(uuid.uuid4())
    real, nothing = send(client, owned), send(client, unknown)
    assert real.status_code == nothing.status_code == 404
    assert real.text.replace(owned, "ID") == nothing.text.replace(unknown, "ID")


SENDS = {
    "execute": lambda c, i: c.post("/execute", {"command": "1", "session_id": i}),
    "execute_async": lambda c, i: c.post("/execute_async", {"command": "1", "session_id": i}),
    "kill": lambda c, i: c.post("/kill", {"session_id": i}),
    "session": lambda c, i: c.get(f"/v1/sessions/session/{i}"),
    "status": lambda c, i: c.get(f"/v1/sessions/status/{i}"),
    "upper case": lambda c, i: c.get(f"/v1/sessions/status/{i.upper()}"),
}


@pytest.mark.parametrize("how", SENDS)
def test_another_tenant_s_session_is_not_found(server, other, how):
    mine = server.client().session()
    mine.python("kept = 1")
    if how == "upper case":
        assert SENDS[how](other, mine.id).status_code == 404
    else:
        same_as_unknown(other, SENDS[how], mine.id)
    # It is as it was.
    assert mine.python("kept")["stdout"] == "1\n"
    mine.kill()


def test_another_tenant_s_task_is_not_found(server, other):
    mine = server.client().session()
    task = mine.submit("'secret'")
    same_as_unknown(other, lambda c, i: c.get(f"/v1/executions/{i}"), task)
    assert mine.client.task(task)["serialized_stdout"] == "'secret'\n"
    same_as_unknown(other, lambda c, i: c.get(f"/v1/executions/{i}"), task)
    mine.kill()


def test_sessions_of_tenants_do_not_share_anything(server, other):
    mine, theirs = server.client().session(), other.session()
    mine.python("open('/tmp/mine', 'w').write('x'); import builtins; builtins.leak = 1")
    found = theirs.value("[__import__('os').path.exists('/tmp/mine'), hasattr(__import__('builtins'), 'leak')]")
    assert found == [False, False]
    mine.kill()
    theirs.kill()


def test_the_same_idempotency_key_of_two_tenants_is_two_requests(server, other):
    headers = {"Idempotency-Key": "the-same"}
    answers = [c.post("/execute", {"command": "1"}, headers=headers).json() for c in (server.client(), other)]
    assert answers[0]["session_id"] != answers[1]["session_id"]


def test_users_me_tells_who_one_is(server, other):
    mine, theirs = (c.get("/v1/users/me").json() for c in (server.client(), other))
    assert theirs["name"] == "other" and theirs["plan"] == "default" and theirs["is_verified"] is True
    assert mine["id"] != theirs["id"]
    assert set(mine) >= {"id", "name", "email", "is_verified"}
