"""A task that was acknowledged is not lost, whatever happens to the server."""

import os
import shutil
import time

import pytest

import harness


def crash_and_restart(server):
    workers = server.workers()
    server.kill()
    # Workers hang on their server: none is left to run a guest nobody can reach.
    assert all(harness.wait_gone(pid) for pid in workers)
    server.restart()
    return server.client()


def test_queued_tasks_run_after_a_crash(start_server):
    server = start_server()
    session = server.client().session()
    session.python("1")
    blocker = session.submit("import time; time.sleep(120)", timeout=300)
    # They wait behind the first one, so none of them can have run.
    tasks = [session.submit(f"print('task {i}')") for i in range(5)]
    client = crash_and_restart(server)
    for i, task in enumerate(tasks):
        done = client.task(task)
        assert done["serialized_stdout"] == f"task {i}\n" and done["exit_code"] == 0
        assert done["status"] == "done" and done["session_id"] == session.id
    gone = client.task(blocker)
    assert gone["status"] == "interrupted" and gone["exit_code"] != 0


def test_a_task_whose_vm_is_still_being_made_runs_after_a_crash(start_server):
    server = start_server()
    # Another size has no template here, so its first VM takes a while.
    shared = server.data / "templates"
    own = [path for path in shared.resolve().iterdir() if "-512m-" in path.name and path.is_dir()]
    server.kill()
    shared.unlink()
    shared.mkdir()
    for template in own:
        shutil.copytree(template, shared / template.name, copy_function=os.link)
    server.restart()
    session = server.client().session(memory_mb=1024)
    task = session.submit("print(6 * 7)")
    time.sleep(0.4)
    server.kill()
    server.restart()
    done = server.client().task(task, bound=harness.START_BOUND)
    assert (done["status"], done["serialized_stdout"]) == ("done", "42\n")


def test_a_task_is_durable_the_moment_it_is_acknowledged(start_server):
    server = start_server()
    client = server.client()
    for number in range(3):
        session = client.session()
        task = session.submit(f"import pathlib; {number} + 100")
        server.kill()
        server.restart()
        client = server.client()
        done = client.task(task)
        # Either it had not begun and has run now, or it is said that it may have.
        assert done["status"] in ("done", "interrupted")
        if done["status"] == "done":
            assert done["serialized_stdout"] == f"{number + 100}\n"


def test_a_running_task_is_marked_interrupted_with_its_partial_output(start_server):
    server = start_server()
    client = server.client()
    session = client.session()
    code = "import sys, time\nprint('half of it', flush=True)\nprint('and err', file=sys.stderr, flush=True)\ntime.sleep(300)"
    task = session.submit(code, timeout=600)

    def partial():
        shown = client.get(f"/v1/executions/{task}").json()
        return shown["status"] == "running" and "half of it" in shown["serialized_stdout"] and shown

    shown = harness.wait_for(partial, "the task's partial output")
    assert shown["is_complete"] is False and shown["exit_code"] is None
    # Its output so far is written every so often (task.flush_ms).
    time.sleep(1)
    client = crash_and_restart(server)
    done = client.task(task)
    assert done["status"] == "interrupted" and done["is_complete"] is True
    assert done["serialized_stdout"].startswith("half of it\n")
    assert "and err\n" in done["serialized_stderr"] and "thaw:" in done["serialized_stderr"]
    assert done["exit_code"] not in (0, None)
    # It is not run again, and its session serves the next command in a fresh VM.
    out = harness.Session(client, session.id).python("'after'")
    assert out["stdout"] == "'after'\n"
    assert client.task(task) == done


def test_the_official_client_sees_the_interruption(start_server):
    from instavm import InstaVM

    server = start_server()
    made = InstaVM(server.key, base_url=server.url)
    task = made.execute_async("import time; time.sleep(300)", timeout=600)["task_id"]
    client = server.client()
    harness.wait_for(lambda: client.get(f"/v1/executions/{task}").json()["status"] == "running", "the task to run")
    server.kill()
    server.restart()
    again = InstaVM(server.key, base_url=server.url, auto_start_session=False)
    assert "thaw:" in again.get_task_result(task)["stderr"]


def test_finished_results_and_sessions_survive_a_restart(start_server):
    server = start_server()
    session = server.client().session(metadata={"kept": "yes"}, env={"NAME": "value"})
    task = session.submit("print('result')")
    done = session.client.task(task)
    server.terminate()
    assert server.wait() == 0
    server.restart()
    client = server.client()
    assert client.task(task) == done
    shown = client.get(f"/v1/sessions/session/{session.id}").json()
    assert shown["metadata"] == {"kept": "yes"}
    assert shown["vm_status"] != "active"
    out = harness.Session(client, session.id).python("import os; os.environ['NAME']")
    assert out["stdout"] == "'value'\n" and out["vm_restarted"] is True


def test_a_second_server_on_the_data_directory_is_refused(server):
    second = harness.Server(data=server.data)
    second.log_path = server.data / "second.log"
    with pytest.raises(AssertionError, match="ended with 4.*") as caught:
        second.start()
    assert "another thaw" in str(caught.value)
    assert server.client().get("/health").status_code == 200
