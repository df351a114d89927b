"""Rest, copies and snapshots over HTTP: what comes back, what is refused, and that nobody else sees it."""

import time

import anyio
import pytest

from instavm import InstaVM
from instavm.errors import (
    BootFailed,
    CorruptSnapshot,
    DiskFull,
    NotFound,
    QuotaExceededError,
    SessionEnded,
    SessionSuspended,
    SnapshotError,
)


@pytest.fixture
def other(server):
    with InstaVM(server.other_key, server.url, auto_start_session=False) as client:
        yield client


def vm_id(vm):
    return vm.get_session_info()["vm_id"]


def test_rest_and_back(server, vm, http):
    vm.execute("x = 1")
    old = vm_id(vm)
    assert (vm.suspend().status, vm.suspend().status) == ("suspended", "suspended")
    assert http.get(f"/v1/vms/{old}").json()["status"] == "suspended"
    assert [http.get("/v1/vms").json(), vm.list_sandboxes()] == [[], []]
    assert old in [one["vm_id"] for one in http.get("/v1/vms/").json()]
    refused = http.post("/execute", json={"command": "print(x)", "session_id": vm.session_id})
    assert (refused.status_code, refused.json()["code"]) == (409, "session_suspended")
    back = http.post(f"/v1/vms/{old}/resume").json()
    assert back["vm_id"] != old and (back["session_id"], back["status"]) == (vm.session_id, "active")
    assert vm.execute("print(x)").stdout == "1\n"
    for one in (old, back["vm_id"]):
        assert http.get(f"/v1/vms/{one}").json()["vm_id"] == back["vm_id"]
    words = [event for event, *_ in server.events(vm.session_id)]
    assert [word for word in words if word.startswith("vm.")][:6] == [
        *("vm.creating", "vm.active", "vm.suspending", "vm.suspended", "vm.creating", "vm.active")
    ]


def test_without_waiting(vm, http):
    vm.execute("x = 1")
    vm.suspend()
    said = http.post(f"/v1/vms/{vm_id(vm)}/resume?wait=false").json()
    assert said["status"] in ("resuming", "active")
    assert vm.execute("print(x)").stdout == "1\n"


def test_what_can_not_be_suspended_or_resumed(vm, http):
    vm.execute("1")
    assert vm.resume().vm_id == vm_id(vm), "it is up"
    ended = http.post("/v1/vms", json={}).json()
    http.delete(f"/v1/vms/{ended['vm_id']}")
    for what in ("suspend", "resume", "fork", "snapshot", "clone"):
        assert http.post(f"/v1/vms/{ended['vm_id']}/{what}", json={}).status_code == 404


def test_killed_while_it_rests(server, http):
    vm = server.client()
    vm.execute("1")
    vm.suspend()
    session = vm.session_id
    vm.kill()
    assert server.node.resting == {}
    assert http.get(f"/v1/sessions/session/{session}").json()["status"] == "killed"
    vm.session_id = session
    with pytest.raises(SessionEnded):
        vm.execute("1")


def test_one_that_does_not_come_back_stays_at_rest(server, vm):
    vm.execute("x = 1")
    old = vm.suspend().vm_id
    place = server.node.resting.pop(old)
    with pytest.raises(CorruptSnapshot):
        vm.resume()
    assert vm.get_session_status()["vm_status"] == "suspended"
    with pytest.raises(SessionSuspended):
        vm.execute("print(x)")
    server.node.resting[old] = place
    vm.resume()
    assert vm.execute("print(x)").stdout == "1\n"


def test_what_a_node_can_not_do_leaves_nothing(server, vm, http):
    vm.execute("x = 1")
    with pytest.raises(Exception, match="can't be copied"):
        vm.fork(2)
    assert len(vm.list_sandboxes()) == 1 and vm.execute("print(x)").stdout == "1\n"
    for wrong in (0, 65, "two", 1.5):
        answer = http.post(f"/v1/vms/{vm_id(vm)}/fork", json={"count": wrong})
        assert answer.status_code == 422 and "1 to 64" in answer.json()["allowed"]


def snapshot_refused(vm):
    """Why no snapshot may be taken of it, or None; one that could be taken is gone again."""
    try:
        vm.snapshots.delete(vm.vms.snapshot(vm_id(vm))["id"])
    except QuotaExceededError as exc:
        return str(exc)
    return None


def until(condition):
    """Wait for a change of quota to be known: a server asks its store anew within a second."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_quota_of_disk(server, vm):
    from instavm.control.store.accounts import Quota

    made = vm.vms.snapshot(vm_id(vm) if vm.execute("1") else "")
    server.portal.call(server.store.accounts.set_quota, "local", Quota(disk_mib=0))
    try:
        until(lambda: "may keep 0 MB" in (snapshot_refused(vm) or ""))
        for call in (vm.suspend, lambda: vm.snapshots.create("a:b")):
            with pytest.raises(QuotaExceededError):
                call()
        assert vm.execute("print(1)").stdout == "1\n"
    finally:
        server.portal.call(server.store.accounts.set_quota, "local", Quota())
    vm.snapshots.delete(made["id"])
    until(lambda: snapshot_refused(vm) is None)


def test_snapshots_and_what_starts_from_them(vm, http):
    vm.execute("open('kept', 'w').write('kept')")
    made = http.post(f"/v1/vms/{vm_id(vm)}/snapshot?wait=true", json={"name": "base"}).json()
    assert (made["id"], made["status"], made["name"]) == (made["snapshot_id"], "ready", "base")
    assert http.get(f"/v1/snapshots/{made['id']}").json() == http.get("/v1/snapshots").json()[0]
    assert http.get("/v1/snapshots?type=system").json() == []
    assert http.get("/v1/snapshots?type=odd").status_code == 422
    child = http.post("/v1/vms", json={"snapshot_id": made["id"]}).json()
    assert child["snapshot_id"] == made["id"]
    ask = {"command": "print(open('kept').read())", "session_id": child["session_id"]}
    assert http.post("/execute", json=ask).json()["stdout"] == "kept\n"
    http.delete(f"/v1/vms/{child['vm_id']}")
    both = {"snapshot_id": made["id"], "session_id": vm.session_id}
    assert http.post("/v1/vms", json=both).status_code == 422
    clone = http.post(f"/v1/vms/{vm_id(vm)}/clone", json={"snapshot_name": "of the clone"}).json()
    assert clone["status"] == "active" and clone["snapshot_deleted"] is False
    http.delete(f"/v1/vms/{clone['vm_id']}")
    assert {one["name"] for one in http.get("/v1/snapshots").json()} == {"base", "of the clone"}
    for one in http.get("/v1/snapshots").json():
        assert http.delete(f"/v1/snapshots/{one['id']}").json() == {"status": "deleted", "snapshot_id": one["id"]}
        assert http.delete(f"/v1/snapshots/{one['id']}").status_code == 404


def test_a_build_is_followed_cancelled_and_told(vm, http):
    made = http.post("/v1/snapshots", json={"oci_image": "fine:1", "name": "n", "unknown": 1}).json()
    assert (made["status"], made["type"], made["snapshot_type"]) == ("pending", "user", "user")
    deadline = time.monotonic() + 30
    while not (told := vm.snapshots.logs(made["id"]))["is_complete"]:
        assert time.monotonic() < deadline
    assert told["log"].startswith("=> fetch\nlooking\n=> boot\n") and (told["stage"], told["progress"]) == ("", 1.0)
    assert vm.snapshots.logs(made["id"], told["next_offset"])["log"] == ""
    got = vm.snapshots.get(made["id"])
    assert (got["status"], got["labels"]) == ("ready", {"made": "here"})
    hangs = vm.snapshots.create("hangs:1")
    with pytest.raises(SnapshotError, match=r"is (pending|building)"):
        vm.vms.create(snapshot_id=hangs["id"])
    assert vm.snapshots.cancel(hangs["id"])["last_error"] == "it was cancelled"
    vm.snapshots.delete(vm.snapshots.create("hangs:2")["id"])
    for one in vm.snapshots.list():
        vm.snapshots.delete(one["id"])


def test_a_snapshot_is_ready_when_it_has_been_booted(server, vm, http, monkeypatch):
    vm.execute("1")
    booted, go_on = [], anyio.Event()

    async def prepare(name, vcpus, memory_mib):
        await go_on.wait()
        booted.append((vcpus, memory_mib))

    monkeypatch.setattr(server.node, "prepare", prepare)
    made = vm.vms.snapshot(vm_id(vm), wait=False)
    assert (made.status, vm.snapshots.logs(made["id"])["stage"]) == ("creating", "first start")
    with pytest.raises(SnapshotError, match="is creating"):
        vm.vms.create(snapshot_id=made["id"])
    assert vm.snapshots.cancel(made["id"])["status"] == "ready", "its disk is whole: it only starts slowly once"
    vm.snapshots.delete(vm.vms.snapshot(vm_id(vm), wait=False)["id"])
    server.portal.call(go_on.set)
    assert vm.vms.snapshot(vm_id(vm)).status == "ready" and booted == [(2, 512)]

    async def fails(*_):
        raise BootFailed("it does not come up")

    monkeypatch.setattr(server.node, "prepare", fails)
    kept = vm.vms.snapshot(vm_id(vm))
    assert kept.status == "ready" and "it does not come up" in vm.snapshots.logs(kept["id"])["log"]
    for one in vm.snapshots.list():
        vm.snapshots.delete(one["id"])


@pytest.mark.parametrize("ends", ["kill", "delete"])
def test_a_snapshot_before_the_end(server, vm, ends):
    wanted = {"snapshot_on_terminate": True, "snapshot_name": "last"}
    made = vm.vms.create(vm_lifetime_seconds=20, **wanted)
    assert vm.vms.get(made["vm_id"])["snapshot_on_terminate"] is True
    with server.client(auto_start_session=False) as one:
        one.session_id = made["session_id"]
        one.execute("open('kept', 'w').write('kept')")
        if ends == "kill":
            one.kill()
        else:
            one.vms.delete(made["vm_id"])
    (kept,) = vm.snapshots.list()
    assert (kept["name"], kept["vm_id"]) == ("last", made["vm_id"])
    until(lambda: vm.snapshots.get(kept["id"])["status"] == "ready")
    child = vm.vms.create(snapshot_id=kept["id"])
    vm.session_id, mine = child["session_id"], vm.session_id
    assert vm.execute("print(open('kept').read())").stdout == "kept\n"
    vm.kill()
    vm.session_id = mine
    vm.snapshots.delete(kept["id"])


def test_a_last_snapshot_that_can_not_be_taken_says_why(server, vm, monkeypatch):
    async def full(*_):
        raise DiskFull("no space left")

    made = vm.vms.create()
    vm.vms.update(made["vm_id"], snapshot_on_terminate=True)
    monkeypatch.setattr(server.node, "snapshot", full)
    vm.vms.delete(made["vm_id"])
    (kept,) = vm.snapshots.list()
    assert (kept["status"], kept["last_error"], kept["vm_id"]) == ("failed", "no space left", made["vm_id"])
    vm.snapshots.delete(kept["id"])


def test_somebody_elses_look_like_none(vm, other):
    vm.execute("1")
    mine = vm_id(vm)
    made = vm.vms.snapshot(mine)
    for call in (other.vms.suspend, other.vms.resume, other.vms.fork, other.vms.snapshot, other.vms.clone):
        with pytest.raises(NotFound, match=mine):
            call(mine)
    for call in (other.snapshots.get, other.snapshots.delete, other.snapshots.logs, other.snapshots.cancel):
        with pytest.raises(NotFound, match=made["id"]):
            call(made["id"])
    with pytest.raises(NotFound, match=made["id"]):
        other.vms.create(snapshot_id=made["id"])
    assert other.snapshots.list() == []
    vm.snapshots.delete(made["id"])


def test_managers_say_what_they_have(vm):
    assert "suspend" in dir(vm.vms) and vm.vms.suspend.__doc__
    with pytest.raises(AttributeError, match="suspend"):
        vm.vms.pause  # noqa: B018
