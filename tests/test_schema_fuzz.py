"""Requests made up from the API's own description, right ones and wrong ones: the server's answers are
among those described, have the shapes described, and are never the server's fault."""

import os
import pathlib
import re
import subprocess
import sys

import harness

# Small, so that VMs which the requests start are refused before the host is full: that is an answer, too.
CONFIG = {
    "session.max_vms": 8,
    "vm.lifetime_s": 60,
    "snapshot.max_per_tenant": 4,
    "auth.logins_per_minute": 100000,
}

# Each request is judged by all of these.
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
]

# A slow host gets fewer examples of each operation.
LEAST_REQUESTS = 2000 // harness.SLOW
EXAMPLES = max(1, 12 // harness.SLOW)
SECONDS = 120 * harness.SLOW


def requests_so_far(server):
    text = harness.requests_session().get(f"{server.url}/metrics", timeout=30).text
    counts = re.findall(r"^thaw_http_requests_total\{.*\} (\d+)$", text, re.M)
    return sum(int(count) for count in counts)


def test_made_up_requests_find_nothing_undescribed(server, tmp_path):
    before = requests_so_far(server)
    command = [
        str(pathlib.Path(sys.executable).with_name("st")), "run", f"{server.url}/openapi.json",
        "--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--mode", "all",
        "--max-examples", str(EXAMPLES), "--seed", "3", "--workers", "1", "--continue-on-failure", "--no-shrink",
        "--header", f"X-API-Key:{server.key}", "--request-timeout", "30", "--warnings", "off",
        "--suppress-health-check", "all",
    ]
    env = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "NO_COLOR": "1", "COLUMNS": "160"}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=SECONDS * 2)
    made = requests_so_far(server) - before
    assert ran.returncode == 0, ran.stdout[-20000:] + ran.stderr[-2000:]
    assert made >= LEAST_REQUESTS, f"{made} requests\n{ran.stdout[-3000:]}"
    failed = [line for line in server.log().splitlines() if "a request failed" in line or "panicked" in line]
    assert not failed, failed
