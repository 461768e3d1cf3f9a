"""What commands do: state, echo, shells, exit codes, output of every kind."""

import hashlib

import pytest

# Output beyond this is thrown away; small, so that a test can go beyond it.
CONFIG = {"session.output_bytes": 4 << 20}


def test_state_persists_between_python_commands(session):
    session.python("import math\ndef twice(x):\n    return 2 * x\nn = 5")
    assert session.python("twice(n) + math.floor(0.5)")["stdout"] == "10\n"
    session.python("n += 1")
    assert session.python("print(n)")["stdout"] == "6\n"


@pytest.mark.parametrize(
    "code, stdout",
    [
        ("1 + 1", "2\n"),
        ("'text'", "'text'\n"),
        ("None", ""),
        ("x = 3", ""),
        ("x = 3\nx", "3\n"),
        ("1 + 1;", ""),
        ("print('a'); 'b'", "a\n'b'\n"),
        ("[i for i in range(3)]", "[0, 1, 2]\n"),
        ("print('no newline', end='')", "no newline"),
        ("", ""),
        ("# only a comment", ""),
        ("'ü€🦀'", "'ü€🦀'\n"),
    ],
)
def test_the_last_expression_is_echoed(shared, code, stdout):
    out = shared.python(code)
    assert (out["stdout"], out["stderr"], out["exit_code"]) == (stdout, "", 0)


def test_a_traceback_goes_to_stderr_and_names_the_line(shared):
    out = shared.python("def f():\n    raise ValueError('why not')\nprint('before')\nf()")
    assert out["stdout"] == "before\n" and out["exit_code"] == 1
    assert "ValueError: why not" in out["stderr"]
    assert "line 4" in out["stderr"] and "line 2" in out["stderr"]


def test_a_syntax_error_is_a_result(shared):
    out = shared.python("def broken(:\n  pass")
    assert out["exit_code"] == 1 and "SyntaxError" in out["stderr"]


@pytest.mark.parametrize(
    "code, exit_code",
    [("import sys; sys.exit()", 0), ("import sys; sys.exit(7)", 7), ("raise SystemExit('said')", 1), ("exit(3)", 3)],
)
def test_sys_exit_gives_the_exit_code_and_keeps_the_session(session, code, exit_code):
    session.python("kept = 'here'")
    assert session.python(code)["exit_code"] == exit_code
    assert session.python("kept")["stdout"] == "'here'\n"


def test_shell_magics_run_in_python_commands(shared):
    out = shared.python("!echo from the shell; false")
    assert out["stdout"] == "from the shell\n"
    assert shared.python("lines = !printf 'a\\nb\\n'\nlist(lines)")["stdout"] == "['a', 'b']\n"


def test_await_works_at_the_top_level(session):
    code = "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 'awaited'\nawait f()"
    assert session.python(code)["stdout"] == "'awaited'\n"
    assert session.python("print(await f())")["stdout"] == "awaited\n"


def test_bash_keeps_its_directory_and_environment(session):
    session.bash("mkdir -p /tmp/place && cd /tmp/place && export NAME=value && plain=1 && shout() { echo \"$1!\"; }")
    out = session.bash('pwd; echo "$NAME $plain"; shout hey')
    assert out["stdout"] == "/tmp/place\nvalue 1\nhey!\n"


@pytest.mark.parametrize(
    "code, exit_code",
    [
        ("true", 0),
        ("false", 1),
        ("(exit 42)", 42),
        ("no-such-program", 127),
        ("/etc/passwd", 126),
        ("sh -c 'kill -9 $$'", 137),
        ("sh -c 'kill -TERM $$'", 143),
        ("echo a | false | true", 0),
        ("set -o pipefail; echo a | false; code=$?; set +o pipefail; (exit $code)", 1),
    ],
)
def test_bash_exit_codes(shared, code, exit_code):
    assert shared.bash(code)["exit_code"] == exit_code


def test_bash_streams_are_kept_apart(shared):
    out = shared.bash("echo out; echo err >&2")
    assert (out["stdout"], out["stderr"]) == ("out\n", "err\n")


def test_bash_survives_exit_and_syntax_errors(session):
    assert session.bash("exit 5")["exit_code"] == 5
    out = session.bash("if then fi fi")
    assert out["exit_code"] != 0 and "syntax error" in out["stderr"]
    assert session.bash("echo 'still \"here\"'")["stdout"] == 'still "here"\n'


def test_bash_takes_scripts_with_here_documents_and_quotes(shared):
    out = shared.bash("cat <<'END'\nline 'one'\n$NOT \\expanded\nEND\nfor i in 1 2; do\n  echo $i\ndone\n")
    assert out["stdout"] == "line 'one'\n$NOT \\expanded\n1\n2\n" and out["exit_code"] == 0


def test_standard_input_is_empty(shared):
    assert shared.bash("cat; echo done")["stdout"] == "done\n"
    out = shared.python("import sys; sys.stdin.read()")
    assert out["exit_code"] == 0 and out["stdout"] in ("''\n", "'\\n'\n")


def test_javascript_says_clearly_when_the_image_lacks_it(session):
    # The minimal image has no node: the answer says so, and the session goes on.
    out = session.run("console.log(1)", "javascript")
    assert out["exit_code"] == 127 and out["stdout"] == ""
    assert "javascript" in out["stderr"].lower()
    assert session.python("1")["stdout"] == "1\n"


def test_code_is_taken_where_command_is_absent(client):
    reply = client.post("/execute", {"code": "print('by code')"})
    assert reply.status_code == 200 and reply.json()["stdout"] == "by code\n"
    reply = client.post("/execute", {"command": "'command'", "code": "'code'"})
    assert reply.json()["stdout"] == "'command'\n"


def test_without_a_session_one_is_made_and_named(client):
    first = client.run("seen = 1")
    again = client.run("seen", session_id=first["session_id"])
    assert again["stdout"] == "1\n"
    assert client.run("'seen' in globals()")["stdout"] == "False\n"


@pytest.mark.parametrize("size", [1 << 20, (3 << 20) + 12345])
@pytest.mark.parametrize("language", ["python", "bash"])
def test_large_output_arrives_whole(shared, language, size):
    if language == "python":
        code = f"import sys; _ = sys.stdout.write('0123456789abcde\\n' * {size // 16} + 'x' * {size % 16})"
    else:
        code = f"yes 0123456789abcde | head -c {size}"
    out = shared.run(code, language)
    expected = ("0123456789abcde\n" * (size // 16 + 1))[: size // 16 * 16] + "x" * (size % 16)
    if language == "bash":
        expected = ("0123456789abcde\n" * (size // 16 + 1))[:size]
    assert len(out["stdout"]) == size
    assert hashlib.sha256(out["stdout"].encode()).digest() == hashlib.sha256(expected.encode()).digest()
    assert out["truncated"] is False and out["exit_code"] == 0


def test_characters_survive_the_borders_of_chunks(shared):
    # 1 + 3n bytes: three-byte characters are cut at every power of two.
    out = shared.bash("printf x; for i in 1 2 3 4 5 6 7 8; do printf '€%.0s' {1..30000}; done")
    assert out["stdout"] == "x" + "€" * 240_000
    out = shared.python("import os, time\nfor b in '🦀é€'.encode() * 50:\n    os.write(1, bytes([b]))")
    assert out["stdout"] == "🦀é€" * 50


def test_binary_output_is_tolerated(shared):
    out = shared.python("import os; _ = os.write(1, b'a\\xff\\xfe\\x00b' + bytes(range(256)))")
    assert out["exit_code"] == 0
    assert out["stdout"] == (b"a\xff\xfe\x00b" + bytes(range(256))).decode(errors="replace")
    out = shared.bash("head -c 200000 /dev/urandom")
    assert out["exit_code"] == 0 and "\ufffd" in out["stdout"]


def test_truncation_is_said_and_counted(shared):
    out = shared.python("import sys; _ = sys.stdout.write('z' * (6 << 20)); _ = sys.stderr.write('e')")
    assert out["exit_code"] == 0 and out["truncated"] is True
    assert out["truncated_bytes"] == 2 << 20
    assert out["stdout"].startswith("z" * 1000)
    assert f"output truncated, {2 << 20} bytes dropped" in out["stdout"][-100:]
    assert out["stderr"] == "e"
    # The next command is not short of anything.
    assert len(shared.python("print('y' * (1 << 20))")["stdout"]) == (1 << 20) + 1


def test_a_large_source_text_runs(shared):
    text = "é" * (1 << 19)  # 3 MiB as escaped JSON
    out = shared.python(f"len('{text}')")
    assert out["stdout"] == f"{1 << 19}\n"
    out = shared.bash(f": '{'q' * (1 << 20)}'; echo ${{#_}}")
    assert out["stdout"] == f"{1 << 20}\n"


def test_background_processes_live_on_without_holding_the_answer(session):
    out = session.bash("(sleep 0.5; echo later > /tmp/later) & echo started")
    assert "started\n" in out["stdout"] and out["exit_code"] == 0
    out = session.bash("for i in $(seq 100); do [ -s /tmp/later ] && break; sleep 0.1; done; cat /tmp/later")
    assert out["stdout"] == "later\n"


def test_threads_and_subprocesses_of_python_are_heard(session):
    code = (
        "import threading, subprocess, sys\n"
        "t = threading.Thread(target=print, args=('thread',))\n"
        "t.start(); t.join()\n"
        "_ = subprocess.run(['echo', 'child'])\n"
        "print('err', file=sys.stderr)"
    )
    out = session.python(code)
    assert sorted(out["stdout"].split()) == ["child", "thread"] and out["stderr"] == "err\n"


def test_a_dead_interpreter_is_replaced_and_said(session):
    session.python("kept = 1")
    out = session.python("import os; os._exit(9)")
    assert out["exit_code"] == 9 and "thaw:" in out["stderr"]
    assert session.python("'kept' in globals()")["stdout"] == "False\n"
    # Only the interpreter died: the VM and its files are the same.
    out = session.python("import ctypes; ctypes.string_at(0)")
    assert out["exit_code"] == 139 and "thaw:" in out["stderr"]
    assert session.python("2")["stdout"] == "2\n"


def test_commands_of_a_session_run_in_order(session):
    tasks = [session.submit(f"open('/tmp/order', 'a').write('{i} ')") for i in range(20)]
    for task in tasks:
        session.client.task(task)
    assert session.bash("cat /tmp/order")["stdout"].split() == [str(i) for i in range(20)]
