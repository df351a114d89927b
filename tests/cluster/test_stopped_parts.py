"""One part of a server that stands still (SIGSTOP) holds up nobody but who needs it; afterwards all is well."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import psutil
import pytest

from instavm.errors import HostNotReady, InstaVMError, OutcomeUnknown
from instavm.node import inventory

FILTER = "instavm.node.network.filter"
HELD_UP_S = 60
"""Far longer than any of these calls takes; shorter than what a part that stands still would be waited for."""


@pytest.fixture
def two(module_servers):
    """Two sandboxes that hold state."""
    clients = module_servers.client(), module_servers.client()
    for number, client in enumerate(clients):
        client.execute(f"x = {number}")
    yield clients
    for client in clients:
        client.kill()


@pytest.fixture
def aside():
    """A thread for a call that has to wait."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


@contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def vmm(servers, client):
    """The process of a client's sandbox."""
    vm_id = client.get_session_status()["vm_id"]
    machines = servers.state / "machines"
    notes = {machines / name / "sandbox.json": pid for name, pid in inventory.running(machines).items()}
    (pid,) = [pid for note, pid in notes.items() if note.exists() and vm_id in note.read_text()]
    return pid


def egress_filter(servers):
    (found,) = [
        child for child in psutil.Process(servers.process.pid).children(recursive=True) if FILTER in child.cmdline()
    ]
    return found.pid


def once_it_answers(client):
    """Calls are refused until the node's first sign of life."""
    for _ in range(1200):
        try:
            return client.execute("1")
        except HostNotReady:
            time.sleep(0.05)
    raise AssertionError("the node does not go on")


def work(servers, client, vm_id):
    """What others do meanwhile: ask, run code, start a sandbox and end it."""
    assert vm_id in [one["vm_id"] for one in client.vms.list()]
    assert client.vms.get(vm_id)["status"] == "active"
    assert client.execute("print(x)").stdout == "1\n"
    with servers.client() as third:
        assert third.execute("print(3)").stdout == "3\n"


def test_a_stopped_vmm_holds_up_only_its_own_callers(module_servers, two, aside):
    still, other = two
    vm_id = still.get_session_status()["vm_id"]
    with stopped(vmm(module_servers, still)):
        waiting = aside.submit(still.execute, "print(x)")
        work(module_servers, other, vm_id)
        assert not waiting.done()
    assert waiting.result(HELD_UP_S).stdout == "0\n", "it goes on as if nothing had been"


def test_a_stopped_vmm_can_be_killed_whatever_waits_for_it(module_servers, two, aside):
    """The kill does not wait for the suspend and the process that wait for the VMM."""
    still, other = two
    vm_id = still.get_session_status()["vm_id"]
    with stopped(vmm(module_servers, still)):
        asked = (still.suspend, lambda: still.processes.start(["true"]))
        waiting = [aside.submit(one) for one in asked]
        other.execute("1")
        still.kill()
        for one in waiting:
            assert isinstance(one.exception(HELD_UP_S), InstaVMError)
    assert vm_id not in [one["vm_id"] for one in other.vms.list()]
    work(module_servers, other, other.get_session_status()["vm_id"])


def test_a_call_to_a_stopped_vmm_ends_in_an_error_that_says_so(module_servers, two):
    """At the end of its timeout and some grace; the sandbox is given up, others know nothing of it."""
    still, other = two
    with stopped(vmm(module_servers, still)), pytest.raises(OutcomeUnknown, match="does not answer"):
        still.execute("print(x)", timeout=1)
    assert "NameError" in still.execute("print(x)").stderr, "a new sandbox"
    assert other.execute("print(x)").stdout == "1\n"


def test_polling_beside_a_stopped_vmm_takes_nothing_of_the_server(module_servers, two, aside):
    """No descriptor and no thread for each question that is asked meanwhile."""
    still, other = two
    server = psutil.Process(module_servers.process.pid)
    with stopped(vmm(module_servers, still)):
        waiting = aside.submit(still.execute, "print(x)")
        other.vms.list()
        before = server.num_fds()
        for _ in range(40):
            other.vms.list()
            other.get_session_status()
        assert server.num_fds() < before + 40, "80 questions; a spare machine that is made meanwhile takes some twenty"
        assert server.num_threads() < 60
    assert waiting.result(HELD_UP_S).stdout == "0\n"


def test_a_stopped_filter_holds_up_nobody(module_servers, two):
    """Sandboxes start and end without it; a policy that needs it is applied by its successor."""
    still, other = two
    with stopped(egress_filter(module_servers)):
        work(module_servers, other, still.get_session_status()["vm_id"])
        still.kill()
        policy = other.set_session_egress(allow_http=True, allowed_domains=["a.example"])
        assert policy["allowed_domains"] == ["a.example"]
        assert other.get_isolation()["report"], "it names the rules in force, which the filter tells"
    work(module_servers, other, other.get_session_status()["vm_id"])


def test_a_stopped_node_is_told_as_one_and_goes_on_with_what_it_has(servers, aside):
    """List and get are answered, a kill is taken, all else ends in a typed error; no sandbox is lost by it."""
    servers.start()
    still, other, ended = (servers.client() for _ in range(3))
    for number, client in enumerate((still, other, ended)):
        client.execute(f"x = {number}")
    vm_id, gone = still.get_session_status()["vm_id"], ended.get_session_status()["vm_id"]
    with stopped(servers.process.pid):
        waiting = aside.submit(other.execute, "import time; time.sleep(0.5); print(x)")
        assert {vm_id, gone} <= {one["vm_id"] for one in still.vms.list()}
        assert still.vms.get(vm_id)["status"] == "active"
        ended.kill()
        assert not waiting.done()
        with pytest.raises(HostNotReady, match="does not answer"):
            waiting.result(HELD_UP_S)
        with pytest.raises(HostNotReady, match="does not answer"):
            other.execute("1")
    once_it_answers(other)
    assert [client.execute("print(x)").stdout for client in (still, other)] == ["0\n", "1\n"]
    with servers.client() as another:
        another.execute("1")
        machines = inventory.running(servers.state / "machines")
        notes = [servers.state / "machines" / name / "sandbox.json" for name in machines]
        assert not [note for note in notes if note.exists() and gone in note.read_text()], "what was killed has ended"
    for client in (still, other):
        client.kill()


def test_an_answer_that_comes_while_the_node_is_stopped_is_not_lost(servers, aside):
    """The deadline of a call passes while nobody can look at it: what lies in the socket by then counts."""
    servers.start()
    with servers.client() as client:
        client.execute("import time")
        waiting = aside.submit(client.execute, "time.sleep(1); print('there')", timeout=2)
        client.execute("until [ -e /proc/1 ]; do sleep 0.1; done", language="bash")
        with stopped(servers.process.pid):
            assert not waiting.done()
            with suppress(TimeoutError):
                waiting.result(3)
        assert waiting.result(HELD_UP_S).stdout == "there\n"
