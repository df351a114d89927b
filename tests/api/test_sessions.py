"""Sessions and what can be asked about them."""

import uuid
from datetime import datetime

import httpx
import pytest
from local_node import (
    BOOT_FAILS_MIB,
    BOOT_FAILS_ONCE_MIB,
    BOOT_HANGS_MIB,
    BOOT_WAITS_MIB,
    NODE_FULL_MIB,
)

from instavm import BootFailed, InstaVM, NoCapacity, SessionEnded, SessionNotFound
from instavm.contract.sandboxes import EndReason

STATUS_FIELDS = {
    "session_id",
    "exists",
    "vm_assigned",
    "vm_alive",
    "vm_status",
    "vm_id",
    "uptime_seconds",
    "expires_in_seconds",
    "created_at",
}


def expire(server, vm):
    """What happens when the lifetime runs out, now."""

    def end():
        live = server.control.sessions._known[vm.session_id].vm
        live.ask_end(EndReason.LIFETIME)
        return live

    live = server.portal.call(end)
    server.portal.call(live.gone.wait)
    return live.id


def test_a_session_id_is_a_uuid_and_a_vm_id_is_none(vm):
    vm_id = vm.execute("1").vm_id
    assert str(uuid.UUID(vm.session_id)) == vm.session_id
    assert vm_id.startswith("vm-")
    with pytest.raises(ValueError, match="badly formed"):
        uuid.UUID(vm_id)


def test_status_of_a_live_sandbox(vm, http):
    vm_id = vm.execute("1").vm_id
    status = http.get(f"/v1/sessions/status/{vm.session_id}").json()
    assert status.keys() == STATUS_FIELDS
    assert status["session_id"] == vm.session_id
    assert (status["exists"], status["vm_assigned"], status["vm_alive"]) == (True, True, True)
    assert (status["vm_status"], status["vm_id"]) == ("active", vm_id)
    assert status["uptime_seconds"] >= 0
    assert 0 < status["expires_in_seconds"] <= 300
    datetime.strptime(status["created_at"][:19], "%Y-%m-%dT%H:%M:%S")


def test_status_while_the_sandbox_comes_up(server, http):
    with server.client(memory_mb=BOOT_HANGS_MIB) as vm:
        status = http.get(f"/v1/sessions/status/{vm.session_id}").json()
        assert status.keys() == STATUS_FIELDS
        assert (status["exists"], status["vm_assigned"], status["vm_alive"]) == (True, False, False)
        assert (status["vm_status"], status["vm_id"]) == (None, None)
        assert (status["uptime_seconds"], status["expires_in_seconds"]) == (None, None)
        assert vm.get_session_info().status == "creating"


def test_status_after_a_kill(server, http):
    vm = server.client()
    session_id, vm_id = vm.session_id, vm.execute("1").vm_id
    vm.kill()
    status = http.get(f"/v1/sessions/status/{session_id}").json()
    assert (status["exists"], status["vm_assigned"], status["vm_alive"]) == (True, True, False)
    assert (status["vm_status"], status["vm_id"]) == ("killed", vm_id)
    assert (status["uptime_seconds"], status["expires_in_seconds"]) == (None, 0)
    assert vm.session_id is None
    assert not vm.is_session_active(session_id)
    vm.close()


def test_killing_twice_is_fine_and_nothing_runs_afterwards(server, http):
    vm = server.client()
    session_id = vm.session_id
    vm.execute("1")
    for _ in range(2):
        answer = http.post("/kill", json={"session_id": session_id})
        assert (answer.status_code, answer.json()["status"]) == (200, "killed")
    answer = http.post("/execute", json={"session_id": session_id, "command": "1"})
    assert (answer.status_code, answer.json()["code"]) == (410, "session_ended")
    with pytest.raises(SessionEnded):
        vm.execute("1")
    vm.kill()
    with pytest.raises(SessionEnded):
        vm.execute("1")
    vm.close()


def test_a_session_killed_while_it_boots_leaves_nothing(server):
    """`nothing_left_behind` looks."""
    vm = server.client(memory_mb=BOOT_HANGS_MIB)
    session_id = vm.session_id
    vm.kill()
    vm.close()
    assert server.events(session_id)[-1][0] == "vm.ended"


def test_after_expiry_the_next_execute_gets_a_fresh_sandbox(server, vm):
    vm.execute("x = 1")
    old = expire(server, vm)
    assert (vm.get_session_info().status, vm.get_session_info().reason) == ("killed", "lifetime")
    status = vm.get_session_status()
    assert (status.vm_alive, status.vm_id, status.expires_in_seconds) == (False, old, 0)
    result = vm.execute("print('x' in globals())")
    assert (result.stdout, result.vm_id != old) == ("False\n", True)
    assert vm.get_usage().execution_count == 2


def test_every_step_is_recorded_with_its_reason(server, vm):
    session_id, vm_id = vm.session_id, vm.execute("1").vm_id
    vm.kill()
    assert server.events(session_id) == [
        ("session.created", None, None),
        ("vm.creating", vm_id, None),
        ("vm.active", vm_id, None),
        ("session.closed", None, None),
        ("vm.ending", vm_id, "killed"),
        ("vm.ended", vm_id, "killed"),
    ]


def test_a_command_is_with_the_node_before_its_sandbox_is_up(server):
    """So that nothing lies between them; here the sandbox would not come up without one."""
    with server.client(memory_mb=BOOT_WAITS_MIB) as vm:
        assert vm.execute("print(1)", timeout=30).stdout == "1\n"
        assert vm.get_session_info().status == "active"


def test_a_boot_that_fails_is_an_error_of_the_execute_that_waits(server):
    with server.client(memory_mb=BOOT_FAILS_MIB) as vm:
        with pytest.raises(BootFailed, match="the guest said nothing"):
            vm.execute("1")
        info = vm.get_session_info()
        assert (info.status, info.reason) == ("failed", "boot_failed")


def test_after_a_failed_boot_the_next_execute_tries_again(server):
    with server.client(memory_mb=BOOT_FAILS_ONCE_MIB) as vm:
        try:
            vm.execute("1")
        except BootFailed:
            assert vm.execute("print(1)").stdout == "1\n"


def test_a_full_host_says_so_and_when_to_come_back(server):
    with server.client(memory_mb=NODE_FULL_MIB) as vm:
        with pytest.raises(NoCapacity, match="full"):
            vm.execute("1")
        answer = httpx.post(
            f"{server.url}/execute",
            headers={"X-API-Key": server.key},
            json={"session_id": vm.session_id, "command": "1"},
        )
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["code"] == "no_capacity"


def test_sandboxes_are_found_by_their_metadata(server):
    with (
        server.client(metadata={"team": "blue", "n": {"a": 1, "b": 2}}) as blue,
        server.client(metadata={"team": "red"}),
    ):
        found = blue.list_sandboxes(metadata={"team": "blue", "n": {"a": 1}})
        assert [one.session_id for one in found] == [blue.session_id]
        assert found[0].keys() >= {
            "sandbox_id",
            "template_id",
            "name",
            "metadata",
            "started_at",
            "end_at",
            "status",
        }
        assert len(blue.list_sandboxes(limit=1)) == 1
        assert len(blue.list_sandboxes()) == 2
        assert blue.list_sandboxes(metadata={"team": "green"}) == []
    assert blue.list_sandboxes() == []


def test_the_record_tells_sizes_and_times(server):
    with server.client(cpu_count=3, memory_mb=1024, timeout=600, metadata={"a": [1]}) as vm:
        vm.execute("1")
        info = vm.get_session_info()
    assert (info.vcpu_count, info.memory_mb, info.vm_lifetime_seconds) == (3, 1024, 600)
    assert (info.metadata, info.status) == ({"a": [1]}, "active")
    lived = datetime.fromisoformat(info.expires_at) - datetime.fromisoformat(info.created_at)
    assert lived.total_seconds() >= 600


def test_usage_adds_up(vm):
    for _ in range(3):
        vm.execute("1")
    usage = vm.get_usage()
    assert usage.execution_count == 3
    assert usage.total_execution_time > 0
    assert usage.vm_seconds > 0
    assert (usage.memory_mb, usage.vcpu_count) == (512, 2)


def test_a_client_can_be_bound_to_another_session(server, vm):
    vm.execute("x = 7")
    other = server.client(auto_start_session=False)
    other.session_id = vm.session_id
    assert other.execute("print(x)").stdout == "7\n"
    other.close()


def test_an_unknown_session_is_not_found(vm, http):
    nobody = str(uuid.uuid4())
    for path in ("session", "status", "usage"):
        answer = http.get(f"/v1/sessions/{path}/{nobody}")
        assert (answer.status_code, answer.json()["code"]) == (404, "session_not_found")
    with pytest.raises(SessionNotFound):
        vm.get_session_info(nobody)
    with pytest.raises(SessionNotFound):
        vm.kill(nobody)
    assert not vm.is_session_active("no-id-at-all")


def test_leaving_the_block_ends_the_sandbox_and_keeps_the_error(server):
    """`nothing_left_behind` looks."""
    with pytest.raises(KeyboardInterrupt), server.client() as vm:
        vm.execute("1")
        raise KeyboardInterrupt


def test_a_failing_end_does_not_hide_the_error_of_the_block(server):
    with pytest.raises(RuntimeError, match="mine") as caught, server.client() as vm:
        session_id, vm._config = vm.session_id, vm._config
        server.portal.call(server.control.sessions._known[session_id].vm.gone.is_set)
        vm._link.close()
        vm._link = type(vm._link)(type(vm._config)(server.key, "http://127.0.0.1:9", vm._config.session, 0))
        raise RuntimeError("mine")
    assert "could not be ended" in caught.value.__notes__[0]
    InstaVM(server.key, server.url, auto_start_session=False).kill(session_id)
