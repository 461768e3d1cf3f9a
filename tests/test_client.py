"""The official client, unmodified, as it comes from PyPI."""

import uuid

import pytest
import requests
from instavm import (
    AuthenticationError,
    ExecutionError,
    InstaVM,
    NetworkError,
    RateLimitError,
    SessionError,
)


@pytest.fixture
def vm(server):
    made = InstaVM(server.key, base_url=server.url)
    session_id = made.session_id
    yield made
    server.client().post("/kill", {"session_id": session_id})


def test_the_constructor_makes_a_session(vm):
    assert str(uuid.UUID(vm.session_id)) == vm.session_id
    status = vm.get_session_status()
    assert status["exists"] is True
    assert status["vm_assigned"] is False and status["vm_status"] is None
    assert vm.is_session_active() is False


def test_execute_gives_everything_the_client_reads(vm):
    result = vm.execute("print(6 * 7)")
    assert result["stdout"] == "42\n" and result["stderr"] == ""
    assert result["exit_code"] == 0
    assert result["session_id"] == vm.session_id
    assert result["execution_time"] >= 0 and result["cpu_time"] >= 0
    assert result["language"] == "python" and result["created_at"]


def test_execute_keeps_state_and_takes_language_and_timeout(vm):
    vm.execute("answer = 41")
    assert vm.execute("answer += 1; answer")["stdout"] == "42\n"
    assert vm.execute("true", "bash", 10)["exit_code"] == 0
    assert vm.execute("echo $((6 * 7)); exit 3", language="bash", timeout=10)["exit_code"] == 3
    assert vm.is_session_active() is True


def test_code_that_raises_is_a_result(vm):
    result = vm.execute("1 / 0")
    assert result["exit_code"] == 1
    assert "ZeroDivisionError" in result["stderr"] and result["stdout"] == ""


def test_execute_async_and_get_task_result(vm):
    task = vm.execute_async("import time; time.sleep(1); print('late')")
    uuid.UUID(task["task_id"])
    assert task["session_id"] == vm.session_id
    result = vm.get_task_result(task["task_id"], timeout=60)
    assert result["stdout"] == "late\n" and result["stderr"] == ""
    assert result["execution_time"] >= 1 and result["cpu_time"] is not None and result["created_at"]


def test_async_bash_shares_the_session(vm):
    vm.execute("open('/tmp/shared', 'w').write('from python')")
    task = vm.execute_async("cat /tmp/shared", language="bash")
    assert vm.get_task_result(task["task_id"])["stdout"] == "from python"


def test_get_task_result_times_out_on_the_client_s_terms(vm):
    task = vm.execute_async("import time; time.sleep(30)")
    with pytest.raises(TimeoutError):
        vm.get_task_result(task["task_id"], timeout=2)


def test_kill_ends_the_vm_and_the_session_starts_again(vm):
    vm.execute("kept = 1")
    assert vm.is_session_active() is True
    session_id = vm.session_id
    answer = vm.kill()
    assert answer["vm_id"] and answer["session_id"] == session_id
    # The client forgets the session with its VM; the session itself is still there.
    vm.session_id = session_id
    assert vm.is_session_active() is False
    assert vm.get_session_status()["vm_status"] == "killed"
    again = vm.execute("print('kept' in globals())")
    assert again["stdout"] == "False\n" and again["vm_restarted"] is True
    assert vm.is_session_active() is True


def test_kill_without_a_vm_is_an_error(vm):
    with pytest.raises(Exception) as caught:
        vm.kill()
    assert "404" in str(caught.value)


def test_session_info_tells_what_was_asked_for(server):
    made = InstaVM(
        server.key,
        base_url=server.url,
        timeout=600,
        memory_mb=256,
        cpu_count=2,
        metadata={"team": "blue"},
        env={"GREETING": "hello there"},
    )
    info = made.get_session_info()
    assert info["session_id"] == made.session_id
    assert (info["vm_lifetime_seconds"], info["memory_mb"], info["vcpu_count"]) == (600, 256, 2)
    assert info["metadata"] == {"team": "blue"}
    # With an environment the VM comes at once.
    assert made.is_session_active() is True
    assert made.execute("import os; print(os.environ['GREETING'])")["stdout"] == "hello there\n"
    assert made.execute("echo $GREETING", "bash")["stdout"] == "hello there\n"
    made.kill()


def test_a_context_manager_works(server):
    with InstaVM(server.key, base_url=server.url) as made:
        assert made.execute("'in'")["stdout"] == "'in'\n"
        made.kill()
        assert made.session_id is None


def test_a_base_url_with_a_slash_at_its_end_works(server):
    made = InstaVM(server.key, base_url=server.url + "/")
    assert made.execute("1 + 1")["stdout"] == "2\n"
    made.kill()


def test_a_wrong_key_is_an_authentication_error(server):
    with pytest.raises(AuthenticationError):
        InstaVM("instavm_sk_wrong", base_url=server.url)
    lazy = InstaVM("instavm_sk_wrong", base_url=server.url, auto_start_session=False)
    lazy.session_id = str(uuid.uuid4())
    with pytest.raises(AuthenticationError):
        lazy.execute("1")


def test_an_unknown_session_is_an_execution_error(server):
    made = InstaVM(server.key, base_url=server.url, auto_start_session=False)
    made.session_id = str(uuid.uuid4())
    with pytest.raises(ExecutionError) as caught:
        made.execute("1")
    assert "404" in str(caught.value)
    with pytest.raises(SessionError):
        made.get_session_status()


def test_values_out_of_range_are_errors(vm, server):
    with pytest.raises(ExecutionError) as caught:
        vm.execute("1", timeout=601)
    assert "422" in str(caught.value)
    with pytest.raises((SessionError, requests.HTTPError)) as caught:
        InstaVM(server.key, base_url=server.url, memory_mb=64)
    assert "422" in str(caught.value)


def test_too_many_requests_are_a_rate_limit_error(server):
    server.cli("plan", "set", "tiny", "--requests-per-minute", "1", "--burst", "2", "--max-vms", "1")
    client = server.new_user("limited", plan="tiny")
    lazy = InstaVM(client.key, base_url=server.url, auto_start_session=False)
    lazy.session_id = str(uuid.uuid4())
    with pytest.raises(RateLimitError) as caught:
        for _ in range(4):
            with pytest.raises(ExecutionError):
                lazy.execute("1")
    assert "Rate limit exceeded" in str(caught.value)


def test_nothing_listening_is_a_network_error():
    with pytest.raises((NetworkError, SessionError)):
        InstaVM("instavm_sk_any", base_url="http://127.0.0.1:9")
