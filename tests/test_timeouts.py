"""A command that takes too long: answered in time, stopped, and its session goes on."""

import time

import pytest
import requests

import harness


def overrun(session, code, language, seconds=2, **fields):
    """Runs code that overruns, as the official client would: its read time-out is the command's."""
    body = {"command": code, "language": language, "session_id": session.id, "timeout": seconds, **fields}
    reply = session.client.post("/execute", body, timeout=seconds)
    assert reply.status_code == 200, reply.text
    out = reply.json()
    assert out["timed_out"] is True and out["exit_code"] == 124, out
    assert "timed out" in out["stderr"]
    return out


@pytest.mark.parametrize(
    "language, code",
    [
        ("python", "import time; time.sleep(60)"),
        ("python", "while True: pass"),
        ("python", "import subprocess; subprocess.run(['sleep', '60'])"),
        ("python", "await __import__('asyncio').sleep(60)"),
        ("bash", "sleep 60"),
        ("bash", "while :; do :; done"),
        ("bash", "sleep 60 | cat"),
    ],
)
def test_the_answer_comes_before_the_client_gives_up(session, language, code):
    session.run("1" if language == "python" else "true", language)
    overrun(session, code, language)
    # Stopped, not just abandoned: the next command has its turn.
    assert session.run("print(7)" if language == "python" else "echo 7", language)["stdout"] == "7\n"


def test_state_survives_a_timeout(session):
    session.python("kept = [1, 2]")
    session.bash("cd /tmp; export KEPT=yes; variable=also")
    overrun(session, "import time\nkept.append(3)\ntime.sleep(60)", "python")
    assert session.python("kept")["stdout"] == "[1, 2, 3]\n"
    overrun(session, "sleep 60", "bash")
    assert session.bash("echo $PWD $KEPT $variable")["stdout"] == "/tmp yes also\n"


def test_partial_output_is_in_the_answer(session):
    out = overrun(session, "import sys, time\nprint('so far'); print('e', file=sys.stderr)\ntime.sleep(60)", "python")
    assert out["stdout"] == "so far\n" and out["stderr"].startswith("e\n")
    out = overrun(session, "echo begun; sleep 60; echo never", "bash")
    assert out["stdout"] == "begun\n"


def test_a_handler_can_clean_up(session):
    code = (
        "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    cleaned = True\n    raise\n"
    )
    overrun(session, code, "python")
    assert session.python("cleaned")["stdout"] == "True\n"


@pytest.mark.parametrize(
    "language, code",
    [
        ("python", "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)"),
        ("python", "import time\nwhile True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass"),
        ("bash", "trap '' INT TERM; sleep 60; sleep 60"),
        ("bash", "sh -c \"trap '' INT TERM HUP; while :; do sleep 1; done\""),
    ],
)
def test_what_ignores_its_interrupt_is_killed_and_the_session_is_usable(session, language, code):
    overrun(session, code, language)
    # The kill comes some seconds after the answer; the next command waits for it.
    assert session.run("print(8)" if language == "python" else "echo 8", language)["stdout"] == "8\n"
    assert session.bash("pgrep -c sleep; true")["stdout"].strip() == "0"


def test_waiting_in_line_counts(session):
    session.python("1")
    first = harness.background(lambda: session.copy().python("import time; time.sleep(6); 'first'"))
    harness.wait_for(lambda: session.client.copy() and busy(session), "the first command to run")
    out = overrun(session, "ran = True", "python", seconds=2)
    assert "before it started" in out["stderr"] and out["stdout"] == ""
    assert first.result()["stdout"] == "'first'\n"
    assert session.python("'ran' in globals()")["stdout"] == "False\n"


def busy(session):
    text = harness.requests_session().get(f"{session.client.url}/metrics", timeout=30).text
    return any(line.startswith("thaw_session_running ") and not line.endswith(" 0") for line in text.splitlines())


def test_a_client_that_went_away_does_not_block_its_session(session):
    session.python("1")
    with pytest.raises(requests.exceptions.ReadTimeout):
        body = {"command": "import time; time.sleep(3)", "session_id": session.id, "timeout": 60}
        session.copy().client.post("/execute", body, timeout=0.5)
    assert session.python("'next'", timeout=60)["stdout"] == "'next'\n"


def test_an_asynchronous_command_times_out_in_the_guest_only(session):
    task = session.submit("print('a', flush=True); import time; time.sleep(60)", timeout=2)
    done = session.client.task(task)
    assert done["exit_code"] == 124 and done["serialized_stdout"] == "a\n"
    assert "timed out" in done["serialized_stderr"]


def test_the_longest_timeout_is_accepted_and_a_short_command_is_not_delayed(session):
    began = time.monotonic()
    assert session.python("1", timeout=600)["stdout"] == "1\n"
    assert time.monotonic() - began < 60
