"""One client shared: by threads, by forked processes, by event loops, and with its copies."""

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest

from instavm import AsyncInstaVM, InstaVM
from instavm.client import forks

FORK = multiprocessing.get_context("fork")
WAIT_S = 60


def in_child(work):
    """What `work` returns in a process that is forked here; its error, if it raises one."""
    told = FORK.SimpleQueue()

    def run():
        try:
            told.put(work())
        except BaseException as exc:
            told.put(exc)

    child = FORK.Process(target=run)
    child.start()
    got = told.get()
    child.join(WAIT_S)
    return got


def answer(vm, number):
    return vm.execute(f"import time; time.sleep(0.1); print({number})").stdout


def test_forked_processes_get_their_own_answers(vm):
    vm.execute("1")
    with FORK.Pool(4, initializer=globals().__setitem__, initargs=("shared", vm)) as pool:
        assert pool.map(ask_shared, range(8), chunksize=1) == [f"{number}\n" for number in range(8)]
    assert vm.execute("print(1)").stdout == "1\n"


def ask_shared(number):
    return answer(globals()["shared"], number)


def test_a_stream_that_is_followed_across_a_fork_is_whole_in_both_processes(vm):
    code = "for n in 1 2 3 4 5 6; do echo $n; sleep 0.2; done"
    events = vm.stream(code, language="bash")
    first = next(events).text
    rest = in_child(lambda: "".join(event.text for event in events if event.type == "stdout"))
    here = "".join(event.text for event in events if event.type == "stdout")
    assert first + rest == first + here == "1\n2\n3\n4\n5\n6\n"


def test_a_fork_while_a_thread_holds_the_locks_of_a_client_hangs_nobody(vm):
    vm.execute("1")
    with vm._starting, vm._link._connecting:
        assert in_child(lambda: vm.execute("print('child')").stdout) == "child\n"


def test_only_the_process_that_made_a_sandbox_ends_it_with_its_block(server):
    with server.client() as vm:
        vm.execute("x = 1")
        assert in_child(lambda: vm.__exit__(None, None, None)) is None
        assert vm.execute("print(x)").stdout == "1\n"
        vm.kill()


def test_an_async_client_is_used_after_a_fork_and_in_one_event_loop_after_another(server):
    vm = AsyncInstaVM(server.key, server.url)

    async def ask(code):
        return (await vm.execute(code)).stdout

    assert anyio.run(ask, "print(1)") == "1\n"
    assert anyio.run(ask, "print(2)") == "2\n"
    assert in_child(lambda: anyio.run(ask, "print(3)")) == "3\n"
    anyio.run(vm.close_session)


def test_a_forked_process_holds_no_connection_of_its_parent(vm):
    vm.execute("1")
    numbers = [fd for one in forks._streams if (fd := one.get_extra_info("socket").fileno()) >= 0]
    ours = {lead for number in numbers if (lead := os.readlink(f"/proc/self/fd/{number}")).startswith("socket:")}
    theirs = in_child(lambda: {os.path.realpath(one.path) for one in os.scandir("/proc/self/fd")})
    assert ours
    assert not any(lead in path for lead in ours for path in theirs)
    assert vm.execute("print('on')").stdout == "on\n"


def test_many_threads_make_one_session_and_one_transport(server, monkeypatch):
    made = []
    first = InstaVM.start_session
    monkeypatch.setattr(InstaVM, "start_session", lambda self: made.append(1) or first(self))
    with server.client(auto_start_session=False) as vm:
        begin = threading.Barrier(16)

        def ask(number):
            begin.wait()
            return vm.execute(f"print({number})").stdout, id(vm._link._transport)

        with ThreadPoolExecutor(16) as threads:
            got = list(threads.map(ask, range(16)))
        assert [text for text, _ in got] == [f"{number}\n" for number in range(16)]
        assert (len(made), len({transport for _, transport in got})) == (1, 1)


class Mine(InstaVM):
    def __init__(self, server):
        super().__init__(server.key, server.url)
        self.label = "mine"


class MineAsync(AsyncInstaVM):
    def __init__(self, server):
        super().__init__(server.key, server.url)
        self.label = "mine"


@pytest.mark.parametrize("kind", [Mine, MineAsync])
def test_a_copy_has_all_that_a_client_has_and_nothing_of_the_first_ones_own(server, kind):
    whole = kind(server)
    copy = whole._copy("0b0f7c7e-0000-4000-8000-000000000000")
    assert vars(copy).keys() == vars(whole).keys()
    assert (copy.label, type(copy)) == ("mine", kind)
    for name in ("_link", "_starting", "processes", "egress", "vms", "snapshots"):
        assert getattr(copy, name) is not getattr(whole, name)
    if kind is Mine:
        whole.kill()
        whole.close()
