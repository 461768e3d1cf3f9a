"""The command line, as people and scripts use it."""

import json
import os
import re
import subprocess

import pytest

import harness


def thaw(*words, env=None, stdin=None, bound=280):
    base = {name: value for name, value in os.environ.items() if not name.startswith("THAW_")}
    return subprocess.run(
        [harness.THAW, *words], env=base | (env or {}), input=stdin, capture_output=True, text=True, timeout=bound
    )


def test_the_ready_line_is_one_line_with_the_address(server):
    assert server.ready_line.startswith(f"thaw is ready at {server.url}: ")
    assert server.lines.empty()


def test_exec_prints_what_the_command_prints_and_ends_as_it_does(server):
    done = server.cli("exec", "print(6 * 7)")
    assert (done.stdout, done.stderr) == ("42\n", "")
    done = server.cli("exec", "-l", "bash", "echo out; echo err >&2; (exit 3)", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    done = server.cli("exec", "1 / 0", check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    done = server.cli("exec", "--timeout", "1", "import time; time.sleep(60)", check=False)
    assert done.returncode == 124


def test_exec_reads_standard_input_and_keeps_a_session(server):
    first = json.loads(server.cli("exec", "--json", "-", stdin="value = 'é'\nvalue").stdout)
    assert first["stdout"] == "'é'\n" and first["exit_code"] == 0
    again = server.cli("exec", "-s", first["session_id"], "value")
    assert again.stdout == "'é'\n"


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["exec", "--api-key", "instavm_sk_wrong", "1"], 125, "refuses this API key"),
        (["exec", "--url", "http://127.0.0.1:9", "1"], 125, "is `thaw serve` running?"),
        (["exec", "-s", "00000000-0000-4000-8000-000000000000", "1"], 125, "no session"),
        (["exec", "-s", "nonsense", "1"], 125, "session_id"),
        (["exec", "-l", "ruby", "1"], 125, "'python', 'bash' or 'javascript'"),
        (["exec", "--timeout", "601", "1"], 2, "601"),
        (["nonsense"], 2, "nonsense"),
        (["key", "revoke", "nothing"], 1, "thaw key list"),
        (["user", "create", "bad name"], 1, "1 to 64"),
        (["key", "create", "--user", "nobody"], 1, "thaw user create"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_failures_have_their_code_and_say_what_to_do(server, words, code, said):
    done = server.cli(*words, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "panicked" not in done.stderr


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--set", "no.key=1"], 3, "no.key"),
        (["--set", "server.max_connections=many"], 3, "server.max_connections"),
        (["--set", "vm.memory_mib=64"], 3, "vm.memory_mib"),
        (["--listen", "nowhere"], 3, "listen"),
        (["--image", "no-such-image"], 5, "no-such-image"),
        (["--listen", "192.0.2.1:80"], 6, "192.0.2.1:80"),
        (["--tls-cert", "/nonexistent", "--tls-key", "/nonexistent"], 6, "/nonexistent"),
        (["--data-dir", "/proc/nowhere"], 4, "/proc/nowhere"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_serve_that_cannot_start_says_why_and_ends_with_a_code(words, code, said, tmp_path):
    if "--data-dir" not in words:
        words = ["--data-dir", str(tmp_path), *words]
        if "--image" not in words:
            words = ["--image", "minimal", *words]
    if "--listen" not in words:
        words = ["--listen", "127.0.0.1:0", *words]
    done = thaw("serve", *words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "panicked" not in done.stderr
    # It would be shown this once, to nobody who could use it yet.
    assert "first API key" not in done.stdout


def test_a_weak_first_key_is_refused(tmp_path):
    done = thaw("serve", "--data-dir", str(tmp_path), env={"THAW_BOOTSTRAP_KEY": "changeme-changeme"})
    assert done.returncode == 3 and "THAW_BOOTSTRAP_KEY" in done.stderr
    assert "changeme" not in done.stderr


def test_users_keys_and_plans_are_listed(server):
    server.cli("user", "create", "lister", "--email", "lister@example.org")
    users = [json.loads(line) for line in server.cli("user", "list", "--json").stdout.splitlines()]
    assert any(user["name"] == "lister" and user["email"] == "lister@example.org" for user in users)
    assert "lister" in server.cli("user", "list").stdout
    server.cli("plan", "set", "listed", "--requests-per-minute", "10", "--burst", "5", "--max-vms", "2")
    assert "listed" in server.cli("plan", "list").stdout
    key = server.cli("key", "create", "--user", "lister", "--name", "laptop")
    assert re.fullmatch(r"instavm_sk_[A-Za-z0-9]{51}\n", key.stdout)
    assert key.stdout.strip() not in server.cli("key", "list").stdout


def test_images_are_listed_and_inspected():
    data = ["--data-dir", str(harness.PREPARED)]
    done = thaw("image", "list", *data)
    assert done.returncode == 0 and "minimal" in done.stdout
    done = thaw("image", "list", "--json", *data)
    listed = [json.loads(line) for line in done.stdout.splitlines()]
    assert any(image["name"] == "minimal" for image in listed)
    done = thaw("image", "inspect", "minimal", *data)
    assert done.returncode == 0 and "packages" in done.stdout and "kernel" in done.stdout
    done = thaw("image", "inspect", "minimal", "--json", *data)
    assert any("python3" in str(package) for package in json.loads(done.stdout)["packages"])
    done = thaw("image", "inspect", "no-such-image", *data)
    assert done.returncode == 5 and "no-such-image" in done.stderr


def test_building_an_image_again_is_instant_and_says_so():
    done = thaw("image", "build", "minimal", "--data-dir", str(harness.PREPARED))
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout


def test_the_doctor_looks_at_the_host():
    done = thaw("doctor")
    assert done.returncode in (0, 1)
    assert "/dev/kvm" in done.stdout and any(machine in done.stdout for machine in ("pv", "hvm"))
    done = thaw("doctor", "--json")
    shown = [json.loads(line) for line in done.stdout.splitlines()]
    assert shown


@pytest.mark.parametrize("case, runs", [("warm", 50), ("cold", 5), ("restore", 5)])
def test_the_benchmark_gives_its_figures_as_json(case, runs):
    done = thaw("bench", case, "--runs", str(runs), "--json", "--data-dir", str(harness.PREPARED))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    figures = [line for line in lines if "p50_us" in line]
    assert figures
    for line in figures:
        assert set(line) >= {"name", "n", "p50_us", "p99_us", "max_us"}
        assert line["n"] == runs and 0 < line["p50_us"] <= line["p99_us"] <= line["max_us"]


def test_help_and_version():
    for words in (["--help"], ["serve", "--help"], ["exec", "--help"], ["image", "--help"], ["bench", "--help"]):
        done = thaw(*words)
        assert done.returncode == 0 and "thaw" in done.stdout
    assert re.fullmatch(r"thaw \d+\.\d+\.\d+.*\n", thaw("--version").stdout)
    # Every key of the configuration, with its default.
    shown = thaw("serve", "--help").stdout
    assert 'server.listen = "127.0.0.1:8080"' in shown and "session.pool.low = " in shown


def test_a_configuration_file_is_read(tmp_path, start_server):
    path = tmp_path / "thaw.toml"
    path.write_text("[server]\nmax_body_bytes = 1000\n[default_plan]\nmax_vms = 3\n")
    server = start_server(args=["--config", str(path)])
    assert server.client().post("/execute", {"command": "x" * 2000}).status_code == 413
    path.write_text("[server]\nlitsen = 1\n")
    done = thaw("serve", "--config", str(path), "--data-dir", str(tmp_path))
    assert done.returncode == 3 and "litsen" in done.stderr and str(path) in done.stderr
