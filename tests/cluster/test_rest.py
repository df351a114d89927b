"""Suspend, resume, copies and snapshots through the whole of it: SDK, server, records, and servers that die (R14, R15, S2)."""

import signal
import time

import pytest

from instavm.errors import CorruptSnapshot, NotFound, SessionSuspended
from instavm.node import inventory

PROBE = (
    "import hashlib, os; ram = os.urandom(1 << 20); f = open('/app/probe', 'wb'); _ = f.write(ram[::-1]); f.flush(); "
)
SUMS = "print(hashlib.sha256(ram).hexdigest(), hashlib.sha256(open('/app/probe', 'rb').read()).hexdigest())"


def events(vm):
    return [one["status"] for one in vm.vms.list_all_records()]


def test_suspend_and_resume_keep_everything_and_free_the_memory(servers):
    servers.start()
    with servers.client(env={"SECRET": "s3cr3t"}) as vm:
        vm.execute("x = 42")
        old = vm.get_session_info()["vm_id"]
        said = vm.suspend()
        assert (said.status, said.vm_id) == ("suspended", old)
        assert vm.suspend().status == "suspended", "twice is fine"
        assert not any(
            (servers.state / "machines" / name / "sandbox.json").exists()
            for name in inventory.take(servers.state).homes
        )
        assert vm.get_session_status()["vm_status"] == "suspended" and not vm.is_session_active()
        with pytest.raises(SessionSuspended, match="resume"):
            vm.execute("print(x)")
        back = vm.resume()
        assert back.vm_id != old and back.previous_vm_id == old and back.session_id == vm.session_id
        assert vm.execute("import os; print(x, os.environ['SECRET'])").stdout == "42 s3cr3t\n"
        assert vm.vms.get(old)["vm_id"] == back.vm_id, "the old id goes on meaning it"
        assert vm.resume().vm_id == back.vm_id, "one that is up is fine"
        assert sorted(events(vm)) == ["active", "terminated"]
    assert not list((servers.state / "snapshots").iterdir())


def test_a_call_wakes_it_when_it_may_and_many_calls_wake_it_once(servers):
    servers.start()
    with servers.client() as vm:
        vm.execute("x = 1")
        vm.vms.update(vm.get_session_info()["vm_id"], auto_resume=True)
        vm.suspend()
        tasks = [vm.execute_async(f"print(x + {number})") for number in range(4)]
        assert [vm.get_task_result(task["task_id"])["stdout"] for task in tasks] == [
            f"{number + 1}\n" for number in range(4)
        ]
        assert sorted(events(vm)) == ["active", "terminated"]


def test_the_end_of_the_lifetime_puts_it_to_rest_and_it_is_the_same_as_by_hand(servers):
    """R15: what a timeout saves, and what a call saves, bring back the same bytes."""
    servers.start()
    with servers.client(auto_start_session=False) as vm:
        made = vm.vms.create(vm_lifetime_seconds=20, auto_suspend=True)
        vm.session_id = made["session_id"]
        sums = vm.execute(PROBE + SUMS).stdout
        deadline = time.monotonic() + 60
        while vm.get_session_status()["vm_status"] != "suspended":
            assert time.monotonic() < deadline
            time.sleep(0.2)
        vm.resume()
        assert vm.execute(SUMS).stdout == sums
        vm.suspend()
        vm.resume()
        assert vm.execute(SUMS).stdout == sums


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_what_rests_outlives_the_server(servers, signum):
    servers.start()
    vm = servers.client(env={"A": "b"})
    sums = vm.execute(PROBE + SUMS).stdout
    vm.suspend()
    servers.end(signum)
    assert inventory.take(servers.state).processes == frozenset() or signum == signal.SIGKILL
    servers.start()
    assert vm.get_session_status()["vm_status"] == "suspended"
    vm.resume()
    assert vm.execute("import os; " + SUMS + "; print(os.environ['A'])").stdout == sums + "b\n"
    vm.suspend()
    vm.kill()
    assert not list((servers.state / "snapshots").iterdir())


def test_altered_while_at_rest_is_told_and_can_be_killed(servers):
    servers.start()
    with servers.client() as vm:
        vm.execute("x = 1")
        name = vm.suspend().vm_id
        changes = servers.state / "snapshots" / name / "changes"
        changes.chmod(0o600)
        data = bytearray(changes.read_bytes())
        data[len(data) // 2] ^= 1
        changes.write_bytes(data)
        for _ in range(2):
            with pytest.raises(CorruptSnapshot, match="not what was saved"):
                vm.resume()
        assert vm.get_session_status()["vm_status"] == "suspended"


def test_copies_through_the_sdk_and_one_that_is_kept(servers):
    servers.start()
    with servers.client(env={"A": "1"}) as vm:
        vm.execute("x = 10")
        with vm.branch(3) as tries:
            assert tries.run(lambda one: one.execute("x += 1; print(x)").stdout) == ["11\n"] * 3
            tries[1].execute("x = 'kept'")
            tries.keep(tries[1])
        assert vm.execute("import os; print(x, os.environ['A'])").stdout == "kept 1\n"
        assert len(vm.list_sandboxes()) == 1
        with pytest.raises(RuntimeError), vm.branch(2) as tries:
            tries.keep(tries[0])
            raise RuntimeError
        assert vm.execute("print(x)").stdout == "kept\n"
        assert len(vm.list_sandboxes()) == 1


def test_a_snapshot_of_a_disk_starts_new_sandboxes(servers):
    servers.start()
    with servers.client() as vm:
        vm.execute("x = 1; f = open('/app/data', 'w'); _ = f.write('kept' * 1000); f.flush()")
        made = vm.vms.snapshot(vm.get_session_info()["vm_id"], name="mine")
        assert (made.status, made.name) == ("ready", "mine")
        vm.execute("open('/app/data', 'w').write('changed')")
        with servers.client(auto_start_session=False) as other:
            one = other.vms.create(snapshot_id=made.snapshot_id, vcpu_count=2, memory_mb=512)
            other.session_id = one["session_id"]
            assert one["snapshot_id"] == made.snapshot_id
            assert other.execute("print(open('/app/data').read() == 'kept' * 1000)").stdout == "True\n"
            assert "NameError" in other.execute("print(x)").stderr
            vm.snapshots.delete(made.snapshot_id)
            assert other.execute("_ = open('/app/more', 'w').write('x'); print(1)").stdout == "1\n"
            other.suspend()
            other.resume()
            assert other.execute("print(open('/app/more').read())").stdout == "x\n"
        with pytest.raises(NotFound):
            vm.vms.create(snapshot_id=made.snapshot_id)
        assert vm.execute("print(x, open('/app/data').read())").stdout == "1 changed\n"
        assert vm.snapshots.list() == []
    assert not list((servers.state / "snapshots").iterdir())


def test_a_task_goes_on_after_the_rest_of_its_sandbox(servers):
    """Also when the server that it was begun on is no more by then."""
    servers.start()
    with servers.client() as vm:
        vm.execute("1")
        task = vm.execute_async("echo before; for i in 1 2 3 4 5 6; do sleep 1; done; echo after; exit 3", "bash")[
            "task_id"
        ]
        vm.execute("import time; time.sleep(1)")
        vm.suspend()
        assert vm.vms.list() == []
        servers.end(signal.SIGKILL)
        servers.start()
        vm.resume()
        vm.suspend()
        vm.resume()
        told = vm.get_task_result(task, poll_interval=0.2, timeout=60)
        assert (told["stdout"], told["exit_code"], told["status"]) == ("before\nafter\n", 3, "failed")


def test_a_server_killed_while_it_boots_a_snapshot_leaves_no_machine(servers):
    """R3: what was being booted is ended by the next server, and is never taken for a finished template."""
    servers.start(SPARE_MACHINES=0)
    with servers.client(auto_start_session=False) as vm:
        source = vm.vms.create(snapshot_on_terminate=True, snapshot_name="last")
        vm.vms.delete(source["vm_id"])
        (made,) = vm.snapshots.list()
        assert (made.status, made.name, made["vm_id"]) == ("creating", "last", source["vm_id"])
        deadline = time.monotonic() + 60
        while not list(inventory.vmm_processes(servers.state / "templates")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        servers.end(signal.SIGKILL)
        assert list((servers.state / "templates").glob(".*/memory"))
        servers.start(SPARE_MACHINES=0)
        assert list(inventory.vmm_processes(servers.state)) == []
        assert not list((servers.state / "templates").glob(".*/memory"))
        assert vm.snapshots.get(made.snapshot_id).status == "ready", "its disk is whole; its first sandbox boots"
