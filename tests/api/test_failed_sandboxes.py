"""A sandbox that failed keeps its record: why, what its console said last, and the likely cause in a sentence."""

from datetime import UTC, datetime, timedelta

import pytest
from local_node import BOOT_FAILS_MIB

from instavm.contract.sandboxes import EndReason
from instavm.control.causes import cause
from instavm.control.lifecycle import STATES_OF_WORD, State, word
from instavm.control.store.sessions import VmRow
from instavm.errors import BootFailed


def test_a_boot_that_failed_can_be_read_afterwards(http):
    session = http.post("/v1/sessions/session", json={"memory_mb": BOOT_FAILS_MIB}).json()
    answer = http.post("/execute", json={"command": "1", "session_id": session["session_id"]})
    assert (answer.status_code, answer.json()["code"]) == (503, "boot_failed")
    told = http.get(f"/v1/vms/{session['vm_id']}").json()
    assert (told["status"], told["reason"]) == ("failed", "boot_failed")
    assert told["console"] == ["Kernel panic - not syncing: VFS"]
    assert told["error"].startswith("The sandbox did not come up: the guest's kernel panicked: ")
    assert http.get(f"/v1/sessions/session/{session['session_id']}").json()["error"]
    http.post("/kill", json={"session_id": session["session_id"]})
    assert http.get(f"/v1/vms/{session['vm_id']}").json() == told, "also when its session is gone"


def test_a_vm_whose_creation_failed_is_in_the_list_of_failed_ones(http):
    before = {vm["vm_id"] for vm in http.get("/v1/vms/", params={"status": "failed"}).json()}
    assert http.post("/v1/vms", json={"memory_mb": BOOT_FAILS_MIB}).status_code == 503
    failed = [vm for vm in http.get("/v1/vms/", params={"status": "failed"}).json() if vm["vm_id"] not in before]
    assert {(vm["reason"], bool(vm["error"])) for vm in failed} == {("boot_failed", True)}


def test_a_sandbox_that_crashed_tells_what_its_console_said_last(server, vm, http):
    vm_id = vm.execute("1").vm_id
    server.portal.call(server.node.crash, vm_id)
    while (told := http.get(f"/v1/vms/{vm_id}").json())["terminated_at"] is None:
        pass
    assert (told["status"], told["reason"], told["console"]) == ("failed", "crashed", ["[ 1.2] one", "[ 1.3] two"])
    assert told["error"] == "The sandbox ended by itself: the VMM exited with status 1"
    vm.execute("1")
    assert http.get(f"/v1/vms/{vm_id}").json() == told, "also when the session has another one"


def test_a_sandbox_that_ended_on_purpose_has_no_error(server, http):
    with server.client() as vm:
        vm_id = vm.execute("1").vm_id
    told = http.get(f"/v1/vms/{vm_id}").json()
    assert (told["status"], told["error"], told["console"]) == ("killed", None, [])


def test_the_list_of_one_status_has_no_other(http):
    for status in STATES_OF_WORD:
        assert {vm["status"] for vm in http.get("/v1/vms/", params={"status": status}).json()} <= {status}
    refused = http.get("/v1/vms/", params={"status": "broken"})
    assert (refused.status_code, refused.json()["field"]) == (422, "status")
    assert "failed" in refused.json()["allowed"]


def test_every_state_has_its_status():
    for state in State:
        for why in (None, *EndReason):
            if (why is None) == (state not in (State.ENDING, State.ENDED)):
                assert (state, why) in STATES_OF_WORD[word(state, why)]


@pytest.mark.parametrize("why", EndReason)
def test_every_end_that_nobody_asked_for_has_a_sentence(why):
    row = VmRow("vm-1", "s", State.ENDED, why, datetime.now(UTC), detail="words of the node")
    failed = word(State.ENDED, why) == "failed"
    assert (cause(row) is not None) == failed
    assert not failed or "words of the node" in cause(row)


def test_consoles_are_forgotten_with_time_and_records_are_not(server, http):
    with pytest.raises(BootFailed), server.client(memory_mb=BOOT_FAILS_MIB) as vm:
        vm.execute("1")
    vm_id = vm.get_session_info().vm_id if vm.session_id else None
    (told, *_) = http.get("/v1/vms/", params={"status": "failed"}).json()
    assert told["console"] and vm_id in (None, told["vm_id"])
    server.portal.call(server.store.sessions.forget_consoles, datetime.now(UTC) + timedelta(days=1))
    kept = http.get(f"/v1/vms/{told['vm_id']}").json()
    assert (kept["console"], kept["error"]) == ([], "The sandbox did not come up: " + kept["error"].split(": ", 1)[1])
