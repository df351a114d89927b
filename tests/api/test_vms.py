"""VMs by their own id, tasks, keys: what comes back, and that nobody else sees it."""

import uuid
from datetime import datetime

import anyio
import httpx
import pytest

from instavm import AsyncInstaVM, NotFound, UnsupportedOperationError


@pytest.fixture
def other(server):
    """Plain HTTP with the second account's key."""
    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.other_key}) as client:
        yield client


@pytest.fixture
def made(http):
    vm = http.post("/v1/vms", json={"metadata": {"a": "b"}, "unknown": 1}).json()
    yield vm
    http.delete(f"/v1/vms/{vm['vm_id']}")


def test_a_vm_is_a_session_too(http, made):
    assert (made["status"], made["metadata"], made["id"]) == ("active", {"a": "b"}, made["vm_id"])
    ran = http.post("/execute", json={"command": "print(1)", "session_id": made["session_id"]}).json()
    assert (ran["stdout"], ran["vm_id"]) == ("1\n", made["vm_id"])
    assert http.get(f"/v1/vms/{made['vm_id']}").json() == made
    assert [vm["vm_id"] for vm in http.get("/v1/vms").json()] == [made["vm_id"]]


def test_no_address_is_told_that_nobody_serves(http, made):
    """Neither of a web server in the sandbox nor of a way in by SSH."""
    answer = http.get(f"/v1/sessions/app-url/{made['session_id']}?port=8000")
    assert (answer.status_code, answer.json()["code"]) == (501, "unsupported")
    assert "port 8000" in answer.json()["detail"]
    assert made["ssh_host"] is None


def test_live_vms_and_all_records_are_two_lists(http):
    vm_id = http.post("/v1/vms", json={}).json()["vm_id"]
    assert http.delete(f"/v1/vms/{vm_id}").json() == {"status": "terminated", "vm_id": vm_id}
    assert http.delete(f"/v1/vms/{vm_id}").status_code == 404
    assert vm_id not in [vm["vm_id"] for vm in http.get("/v1/vms").json()]
    (record,) = [vm for vm in http.get("/v1/vms/").json() if vm["vm_id"] == vm_id]
    assert (record["status"], record["reason"]) == ("killed", "killed")
    assert record["terminated_at"] >= record["started_at"] >= record["created_at"]


def test_a_change_is_read_back_and_what_cannot_change_stays(http, made):
    asked = {"metadata": {"c": "d"}, "auto_suspend": True, "memory_mb": 512, "vcpu_count": 1}
    answer = http.patch(f"/v1/vms/{made['vm_id']}", json=asked).json()
    assert (answer["metadata"], answer["auto_suspend"]) == ({"c": "d"}, True)
    assert (answer["memory_mb"], answer["vcpu_count"], answer["vm_lifetime_seconds"]) == (512, 2, 300)
    assert http.patch(f"/v1/vms/{made['vm_id']}", json={}).json() == answer
    assert http.get(f"/v1/sessions/session/{made['session_id']}").json()["metadata"] == {"c": "d"}


def test_other_memory_than_it_has_is_refused_and_nothing_changes(http, made):
    place = f"/v1/vms/{made['vm_id']}"
    refused = http.patch(place, json={"memory_mb": 1024, "metadata": {"c": "d"}})
    assert (
        refused.status_code == 501 and "512 MB" in refused.json()["detail"] and "snapshot" in refused.json()["detail"]
    )
    for wrong in (255, 8193, "512", 512.5):
        assert http.patch(place, json={"memory_mb": wrong}).status_code == 422
    assert http.get(place).json()["metadata"] == made["metadata"]


def test_a_lifetime_can_be_changed_while_it_runs(http, made):
    """It counts from when the sandbox was ready."""
    place = f"/v1/vms/{made['vm_id']}"
    longer = http.patch(place, json={"vm_lifetime_seconds": 900}).json()
    lasts = datetime.fromisoformat(longer["expires_at"]) - datetime.fromisoformat(longer["started_at"])
    assert (longer["vm_lifetime_seconds"], lasts.total_seconds()) == (900, 900)
    assert http.get(place).json() == longer
    for wrong in (0, 19, "900", 1.5, True):
        refused = http.patch(place, json={"vm_lifetime_seconds": wrong})
        assert refused.status_code == 422 and "vm_lifetime_seconds" in refused.text
    assert http.get(place).json() == longer


def test_staged_variables_are_kept_nowhere(server, http, made):
    staged = {"entries": [{"env_name": "TOKEN", "value": "s3cret"}, {"env_name": "N", "value": 5}]}
    answer = http.post(f"/v1/vms/{made['vm_id']}/stage-env", json=staged)
    assert answer.json() == {"status": "staged", "vm_id": made["vm_id"], "env_keys": ["N", "TOKEN"]}
    ask = {"command": "echo $TOKEN $N", "language": "bash", "session_id": made["session_id"]}
    assert http.post("/execute", json=ask).json()["stdout"] == "s3cret 5\n"
    wrong = http.post(f"/v1/vms/{made['vm_id']}/stage-env", json={"entries": [{"env_name": "A", "value": ["s3cret"]}]})
    assert wrong.status_code == 422
    assert "s3cret" not in wrong.text


@pytest.mark.parametrize("more", [{"volumes": [{"volume_id": "v"}]}, {"vault_ids": ["v"]}])
def test_what_this_server_cannot_do_is_not_passed_over(http, more):
    assert http.post("/v1/vms", json=more).status_code == 501


def test_empty_extras_are_fine(http):
    asked = {"snapshot_id": None, "volumes": [], "vault_ids": [], "share": None, "env": None, "metadata": None}
    answer = http.post("/v1/vms", json=asked)
    assert answer.status_code == 200
    http.delete(f"/v1/vms/{answer.json()['vm_id']}")


def test_a_boot_that_fails_leaves_no_session_to_go_on_with(http):
    from local_node import BOOT_FAILS_MIB

    answer = http.post("/v1/vms", json={"memory_mb": BOOT_FAILS_MIB})
    assert (answer.status_code, answer.json()["code"]) == (503, "boot_failed")
    assert http.get("/v1/vms").json() == []


def test_every_endpoint_answers_a_foreign_id_like_one_that_does_not_exist(http, other, made):
    """Status, code and words are the same, but for the id that was asked for."""
    session_id, vm_id = made["session_id"], made["vm_id"]
    task_id = http.post("/execute_async", json={"command": "1", "session_id": session_id}).json()["task_id"]
    key_id = http.post("/v1/api-keys/", json={}).json()["id"]
    key_path = f"/v1/api-keys/{key_id}"
    nobody = {
        session_id: str(uuid.uuid4()),
        vm_id: "vm-aaaaaaaaaa",
        task_id: "tsk_" + "0" * 24,
        key_path: "/v1/api-keys/99999",
        f"API key {key_id}": "API key 99999",
    }
    asked = [
        ("GET", f"/v1/sessions/session/{session_id}", None),
        ("GET", f"/v1/sessions/status/{session_id}", None),
        ("GET", f"/v1/sessions/usage/{session_id}", None),
        ("GET", f"/v1/sessions/app-url/{session_id}", None),
        ("POST", "/execute", {"command": "1", "session_id": session_id}),
        ("POST", "/execute_async", {"command": "1", "session_id": session_id}),
        ("POST", "/download", {"filename": "x", "session_id": session_id}),
        ("POST", "/kill", {"session_id": session_id}),
        ("POST", "/v1/vms", {"session_id": session_id}),
        ("GET", f"/v1/vms/{vm_id}", None),
        ("PATCH", f"/v1/vms/{vm_id}", {}),
        ("DELETE", f"/v1/vms/{vm_id}", None),
        ("POST", f"/v1/vms/{vm_id}/stage-env", {"entries": []}),
        ("GET", f"/v1/executions/{task_id}", None),
        ("GET", key_path, None),
        ("PATCH", key_path, {}),
        ("DELETE", key_path, None),
    ]
    for method, path, body in asked:
        foreign = other.request(method, path, json=body)
        for mine, theirs in nobody.items():
            path = path.replace(mine, theirs)
            body = body and {
                name: value.replace(mine, theirs) if isinstance(value, str) else value for name, value in body.items()
            }
        missing = other.request(method, path, json=body)
        text = foreign.text
        for mine, theirs in nobody.items():
            text = text.replace(mine, theirs)
        assert (foreign.status_code, text) == (missing.status_code, missing.text) == (404, text), (method, path)
    assert other.get("/v1/vms").json() == other.get("/v1/vms/").json() == other.get("/v1/executions/").json() == []
    http.delete(f"/v1/api-keys/{key_id}")


def test_keys_are_told_once_and_refused_at_once(server, http):
    made = http.post("/v1/api-keys/", json={"description": "mine"}).json()
    assert made["key"] == made["api_key"]
    assert made["key"].startswith(made["prefix"].split("…")[0])
    listed = http.get("/v1/api-keys/")
    assert made["key"] not in listed.text
    assert made["id"] in [key["id"] for key in listed.json()]
    headers = {"X-API-Key": made["key"]}
    assert httpx.get(f"{server.url}/v1/users/me", headers=headers).status_code == 200
    assert http.get(f"/v1/api-keys/{made['id']}").json()["last_used_at"] is not None
    assert http.delete(f"/v1/api-keys/{made['id']}").json() == {"status": "revoked", "id": made["id"]}
    assert httpx.get(f"{server.url}/v1/users/me", headers=headers).status_code == 401
    assert http.delete(f"/v1/api-keys/{made['id']}").status_code == 404


def test_a_task_runs_while_nobody_waits(vm):
    task = vm.execute_async("echo out; echo err >&2; exit 3", language="bash")
    result = vm.get_task_result(task.task_id, poll_interval=0.01)
    assert (result.stdout, result.stderr, result.exit_code, result.status) == ("out\n", "err\n", 3, "failed")
    assert result.serialized_stdout == result.stdout
    assert vm.get_task_result(vm.execute_async("print(1)").task_id, poll_interval=0.01).status == "completed"
    with pytest.raises(NotFound):
        vm.get_task_result("tsk_none")


def test_a_task_that_takes_too_long_is_stopped_and_one_may_be_waited_for_in_vain(vm):
    task = vm.execute_async("sleep 30", language="bash", timeout=1)
    assert vm.get_task_result(task.task_id, poll_interval=0.01).status == "timeout"
    endless = vm.execute_async("sleep 30", language="bash", timeout=604800)
    with pytest.raises(TimeoutError, match="runs on"):
        vm.get_task_result(endless.task_id, timeout=0.01)


def test_a_task_ends_with_its_sandbox(server, http):
    with server.client() as vm:
        task_id = vm.execute_async("echo begun > f; sleep 86400", language="bash").task_id
        vm.execute("until [ -e f ]; do sleep 0.01; done", language="bash")
        assert http.get(f"/v1/executions/{task_id}").json()["status"] == "running"
    task = InstaVMTask(http, task_id)
    assert (task["status"], task["is_complete"], task["reason"]) == ("killed", True, "killed")


def InstaVMTask(http, task_id):
    while not (task := http.get(f"/v1/executions/{task_id}").json())["is_complete"]:
        pass
    return task


@pytest.mark.anyio
async def test_the_async_client_has_the_same(server, tmp_path):
    async with AsyncInstaVM(server.key, server.url) as vm:
        task = await vm.execute_async("print(1)")
        assert (await vm.get_task_result(task.task_id, poll_interval=0.01)).stdout == "1\n"
        given, back = tmp_path / "given", tmp_path / "back"
        given.write_bytes(bytes(range(256)) * 4000)
        assert (await vm.upload_file(given, "sub/")).remote_path == "/app/sub/given"
        assert (await vm.download_file("sub/given", back)).size == 1_024_000
        assert back.read_bytes() == given.read_bytes() == (await vm.download_file("sub/given")).content
        with pytest.raises(UnsupportedOperationError, match="port 3000"):
            await vm.get_session_app_url(port=3000)
        await anyio.lowlevel.checkpoint()
