"""Commands that are followed, reattached to and cancelled; contexts; rich results."""

import json
import threading
import time

import pytest


def events(reply):
    """A reply's server-sent events: (name, data)."""
    name = None
    for line in reply.iter_lines(decode_unicode=True):
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def follow(client, method, path, **how):
    reply = client.http.request(method, client.url + path, stream=True, timeout=60, **how)
    assert reply.status_code == 200, reply.text
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    return events(reply)


def text(all_events, name):
    return "".join(data["text"] for what, data in all_events if what == name)


def stream(session, code, **fields):
    body = {"command": code, "session_id": session.id, **fields}
    return follow(session.client, "POST", "/v1/executions/stream", json=body)


def test_output_comes_as_it_is_printed_and_the_end_says_everything(session):
    code = "import sys, time\nprint('é one', flush=False)\ntime.sleep(1)\nprint('two', file=sys.stderr)\n6 * 7"
    seen = []
    for name, data in stream(session, code):
        seen.append((time.monotonic(), name, data))
    names = [name for _, name, _ in seen]
    assert names[0] == "start" and names[-1] == "exit"
    told = [(name, data) for _, name, data in seen]
    assert text(told, "stdout") == "é one\n42\n" and text(told, "stderr") == "two\n"
    at = {name: when for when, name, _ in reversed(seen)}
    assert at["exit"] - at["stdout"] > 0.8, "the first line came with the end"
    end = seen[-1][2]
    assert end["exit_code"] == 0 and end["status"] == "done" and end["task_id"] == seen[0][2]["task_id"]
    assert [data for name, data in told if name == "result"] == [{"text/plain": "42"}]


def test_a_running_command_is_reattached_to_with_everything_it_printed(session):
    code = "import time\nfor i in range(4):\n    print(i)\n    time.sleep(0.4)"
    first = stream(session, code)
    name, start = next(first)
    assert name == "start"
    assert next(first)[0] == "stdout"
    first.close()
    path = f"/v1/executions/{start['task_id']}/stream"
    again = list(follow(session.client.copy(), "GET", path))
    assert text(again, "stdout") == "0\n1\n2\n3\n" and again[-1][0] == "exit"
    # And when it is over, too.
    late = list(follow(session.client, "GET", path))
    assert text(late, "stdout") == "0\n1\n2\n3\n" and late[-1][1]["exit_code"] == 0


def test_a_running_command_is_cancelled_and_its_session_lives(session):
    session.python("kept = 1")
    task = session.submit("print('begun', flush=True)\nwhile True: pass")
    path = f"/v1/executions/{task}"
    while "begun" not in session.client.get(path).json()["serialized_stdout"]:
        pass
    waiting = session.submit("print('never')")
    gone = session.client.http.delete(session.client.url + f"/v1/executions/{waiting}", timeout=30)
    assert gone.status_code == 200 and gone.json()["status"] == "cancelled", gone.text
    stopped = session.client.http.delete(session.client.url + path, timeout=30).json()
    end = session.client.task(task)
    assert stopped["task_id"] == task
    assert end["status"] == "cancelled" and end["exit_code"] == 130 and "cancelled" in end["serialized_stderr"]
    assert session.python("kept")["stdout"] == "1\n"
    again = session.client.http.delete(session.client.url + path, timeout=30)
    assert again.status_code == 409
    assert session.client.task(waiting)["serialized_stdout"] == ""


def test_somebody_else_s_task_is_not_there(server, session):
    task = session.submit("1")
    other = server.new_user("streams-other")
    for method, path in [("GET", f"/v1/executions/{task}/stream"), ("DELETE", f"/v1/executions/{task}")]:
        assert other.http.request(method, other.url + path, timeout=30).status_code == 404


def test_a_follower_that_goes_away_costs_nothing(session):
    followers = [stream(session, f"import time; print({n}); time.sleep(0.2)") for n in range(5)]
    for follower in followers:
        next(follower)
        follower.close()
    assert session.python("'alive'")["stdout"] == "'alive'\n"


def test_contexts_are_apart(session):
    for name, value in [(None, 1), ("a", 2), ("b.c", 3)]:
        session.python(f"x = {value}", context=name)
    assert session.python("x", context="a")["stdout"] == "2\n"
    assert session.python("x", context="b.c")["stdout"] == "3\n"
    assert session.python("x")["stdout"] == "1\n"
    session.bash("cd /tmp", context="a")
    assert session.bash("pwd", context="a")["stdout"] == "/tmp\n"
    assert session.bash("pwd")["stdout"] != "/tmp\n"


@pytest.mark.parametrize("name", ["", "a/b", "a b", "é", "x" * 65, 7])
def test_a_bad_name_of_a_context_is_422(session, name):
    reply = session.client.post("/execute", {"command": "1", "session_id": session.id, "context": name})
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"] == ["body", "context"]


def test_contexts_are_bounded(session):
    codes = [session.bash("true", context=f"c{n}")["exit_code"] for n in range(18)]
    assert codes == [0] * 16 + [126] * 2


def test_values_are_shown_in_all_their_representations(session):
    assert session.python("{'a': [1, None]}")["results"] == [
        {"text/plain": "{'a': [1, None]}", "application/json": {"a": [1, None]}}
    ]
    assert "results" not in session.python("print(1)")
    code = (
        "class Table:\n"
        "    def __repr__(self): return 'Table'\n"
        "    def _repr_html_(self): return '<table/>'\n"
        "    def _repr_png_(self): return b'\\x89PNG' * 100000\n"
        "display(Table())\n"
        "'last'"
    )
    out = session.python(code)
    assert out["stdout"] == "Table\n'last'\n"
    table, last = out["results"]
    assert table["text/html"] == "<table/>" and len(table["image/png"]) > 500_000
    assert last == {"text/plain": "'last'"}
    task = session.client.task(session.submit("1 + 1"))
    assert task["results"] == [{"text/plain": "2"}]


def test_two_contexts_of_one_session_keep_the_session_s_order(session):
    done = []

    def run(context, code):
        session.copy().python(code, context=context)
        done.append(context)

    first = threading.Thread(target=run, args=("one", "import time; time.sleep(1)"))
    first.start()
    time.sleep(0.3)
    run("two", "1")
    first.join()
    assert done == ["one", "two"]
