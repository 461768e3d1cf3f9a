"""The documents say what the program does: keys, endpoints, metrics, exit codes."""

import re
import subprocess

import harness

DOCS = harness.ROOT / "docs"


def thaw_help(*words):
    return subprocess.run([harness.THAW, *words, "--help"], capture_output=True, text=True, timeout=60).stdout


def test_every_key_and_its_default_is_in_the_operations_guide():
    real = dict(re.findall(r"^  ([a-z_]+(?:\.[a-z_]+)+) = (.*)$", thaw_help("serve"), re.M))
    assert len(real) > 40
    told = dict(re.findall(r"^\| `([a-z_.]+)` \| `(.*?)` \|", (DOCS / "operations.md").read_text(), re.M))
    # Its default depends on who runs it.
    assert real.pop("server.data_dir") and told.pop("server.data_dir")
    assert told == real


def test_every_endpoint_is_in_the_api_s_table(client):
    text = (DOCS / "api.md").read_text()
    for path, item in client.get("/openapi.json").json()["paths"].items():
        for method in item:
            short = path.replace("{session_id}", "{id}")
            assert f"`{method.upper()} {short}`" in text, (method, path)


def test_every_metric_is_in_the_operations_guide(client):
    text = (DOCS / "operations.md").read_text()
    for name in re.findall(r"^# TYPE (\S+)", client.get("/metrics").text, re.M):
        assert name in text, name


def test_the_exit_codes_are_those_of_the_help():
    told = re.findall(r"^\| (\d+) \| (.+?)(?::.*)? \|$", (DOCS / "operations.md").read_text(), re.M)
    shown = " ".join(thaw_help().split())
    assert len(told) >= 8
    for code, _ in told:
        assert re.search(rf"\b{code}\b", shown), code
