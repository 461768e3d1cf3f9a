"""Fixtures. A server is shared by a module's tests unless a test is about the server's life."""

import contextlib
import os
import pathlib

import pytest

import harness


def pytest_collection_modifyitems(config, items):
    if harness.SLOW == 1:
        return
    for item in items:
        marker = item.get_closest_marker("timeout")
        bound = marker.args[0] if marker else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(bound * harness.SLOW), append=False)


def pytest_runtest_logreport(report):
    """Failures go to the file that THAW_FAILURES names as they happen: a run may take hours, or be cut short."""
    if report.failed and (path := os.environ.get("THAW_FAILURES")):
        with open(path, "a") as file:
            file.write(f"== {report.nodeid} ({report.when})\n{report.longreprtext}\n")


def pytest_sessionstart(session):
    thaw = harness.THAW
    if not thaw or not os.access(thaw, os.X_OK):
        pytest.exit("THAW_BIN must name the thaw program; scripts/blackbox sets it", returncode=2)
    if not (harness.PREPARED / "images").is_dir():
        pytest.exit("THAW_TEST_DATA must be a data directory with an image; `make image` makes one", returncode=2)
    # Paths may be relative to where pytest was started.
    harness.THAW = str(pathlib.Path(thaw).resolve())


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        for server in harness.LIVE:
            report.sections.append((f"log of {server.url}", server.log_tail()))


@pytest.fixture(scope="module")
def server(request):
    """The module's server. A module's `CONFIG` has its keys of the configuration."""
    running = harness.Server(config=getattr(request.module, "CONFIG", None))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def start_server():
    """Starts servers of a test's own, and ends them with the test."""
    with contextlib.ExitStack() as started:

        def start(**how):
            running = harness.Server(**how)
            started.callback(running.stop)
            return running.start()

        yield start


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture
def session(client):
    """A fresh session; its VM goes with the test."""
    made = client.session()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def shared(server):
    """A session for tests that leave nothing behind that another could notice."""
    made = server.client().session(vm_lifetime_seconds=3600)
    yield made
    made.kill()


@pytest.fixture
def make(server):
    """Makes VMs through the API, which end with the test."""
    client, made = server.client(), []

    def make(**body):
        reply = client.post("/v1/vms", body)
        assert reply.status_code == 200, reply.text
        made.append(harness.Vm(client, reply.json()))
        return made[-1]

    yield make
    for vm in made:
        vm.end()
