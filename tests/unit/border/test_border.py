"""A node is the same node from the other side of the border."""

import asyncio
import inspect
import socket

import anyio
import msgpack
import pytest
from across import across
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_node import BOOT_FAILS_MIB, BOOT_HANGS_MIB, NODE_FULL_MIB, open_local_node

from instavm import errors
from instavm.border import calls
from instavm.border.link import LENGTH, WINDOW_BYTES, Kind, linked
from instavm.border.remote import connected
from instavm.border.service import serve
from instavm.client.errors import tree
from instavm.contract.executions import Command, Outcome
from instavm.contract.node import Node
from instavm.contract.sandboxes import SandboxSpec
from instavm.errors import (
    BootFailed,
    FileMissing,
    InstaVMError,
    InvalidInput,
    NoCapacity,
    NodeUnresponsive,
    OutcomeUnknown,
    SessionEnded,
)

pytestmark = pytest.mark.anyio
SPEC = SandboxSpec("vm-a", 2, 512, env={"WHO": "me"})


@pytest.fixture
async def node(anyio_backend):
    async with open_local_node() as node:
        yield node
        for vm_id in list(node.places):
            await node.stop(vm_id)


def test_every_method_can_be_asked():
    asked = {name for name, made in inspect.getmembers(Node, inspect.isfunction) if not name.startswith("_")}
    assert asked == set(calls.METHODS) | calls.HERE


async def test_values_come_across_as_they_are(node):
    async with across(node) as remote:
        started = await remote.start(SPEC)
        assert started == node.places["vm-a"].started
        assert await remote.adopted() == {"vm-a": started}
        assert await remote.info() == await node.info()
        await remote.stage_env("vm-a", {"STAGED": "é\ud800"[:1]})
        outcome = await remote.execute("vm-a", Command("import os; print(os.environ['WHO'])", "python", 20))
        assert outcome.stdout == "me\n"


async def test_output_arrives_while_a_command_runs(node):
    async with across(node) as remote:
        await remote.start(SPEC)
        heard, began = [], anyio.Event()

        def hear(stream, data):
            heard.append((stream, data))
            began.set()

        async with anyio.create_task_group() as tasks:
            command = Command("echo one; read line; echo $line", "bash", 20)
            tasks.start_soon(remote.execute, "vm-a", command, hear)
            await began.wait()
            assert heard == [("stdout", b"one\n")]
            (shell,) = node.places["vm-a"].shells
            shell.stdin.write(b"two\n")
        assert heard[1:] == [("stdout", b"two\n"), ("stderr", b"")]


async def test_what_a_node_raises_is_raised(node):
    async with across(node) as remote:
        with pytest.raises(BootFailed, match="the guest said nothing"):
            await remote.start(SandboxSpec("vm-b", 2, BOOT_FAILS_MIB))
        with pytest.raises(NoCapacity) as full:
            await remote.start(SandboxSpec("vm-b", 2, NODE_FULL_MIB))
        assert full.value.retry_after_s is None
        with pytest.raises(SessionEnded):
            await remote.execute("vm-b", Command("1", "python", 20))
        with pytest.raises(FileMissing):
            await remote.start(SPEC)
            await anext(remote.get_file("vm-a", "nothing"))


@pytest.mark.parametrize("kind", list(tree()), ids=lambda one: one.__name__)
def test_errors_keep_their_class_words_and_values(kind):
    made = kind("field", "value", "allowed") if issubclass(kind, InvalidInput) else kind("words")
    if hasattr(made, "retry_after_s"):
        made.retry_after_s = 1.5
    again = calls.load_error(msgpack.unpackb(msgpack.packb(calls.dump_error(made))))
    assert (type(again), str(again), vars(again)) == (kind, str(made), vars(made))


async def test_a_cancelled_start_is_undone_before_it_returns(node):
    async with across(node) as remote:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(remote.start, SandboxSpec("vm-hangs", 2, BOOT_HANGS_MIB))
            while not node.booting:
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
        assert not node.booting


async def test_files_stream_both_ways_and_are_held_nowhere(node):
    whole = bytes(range(256)) * (5 * WINDOW_BYTES // 256)
    sent = 0

    async def chunks():
        nonlocal sent
        for start in range(0, len(whole), 100_000):
            sent = start
            yield whole[start : start + 100_000]

    async with across(node) as remote:
        await remote.start(SPEC)
        stored = await remote.put_file("vm-a", "big", "", chunks())
        assert (stored.path, stored.size_bytes) == ("/app/big", len(whole))
        got = b"".join([piece async for piece in remote.get_file("vm-a", "big")])
        assert got == whole


async def test_a_reader_that_is_slow_holds_the_node_back(node):
    given_out = 0

    async def endless(vm_id, path):
        nonlocal given_out
        while True:
            given_out += 1 << 16
            yield bytes(1 << 16)

    node.get_file = endless
    async with across(node) as remote:
        pieces = remote.get_file("vm-a", "endless")
        for taken in range(1, 100):
            await anext(pieces)
            assert given_out <= (taken << 16) + 2 * WINDOW_BYTES
        await pieces.aclose()


async def test_what_the_senders_stream_raises_is_raised_and_no_file_is_left(node):
    async def breaks():
        yield b"x"
        raise errors.NetworkError("the client went away")

    async with across(node) as remote:
        await remote.start(SPEC)
        with pytest.raises(errors.NetworkError, match="the client went away"):
            await remote.put_file("vm-a", "part", "", breaks())
        assert list(node.places["vm-a"].path("").iterdir()) == []


async def test_ends_are_told(node):
    ended = []
    async with across(node) as remote:
        remote.on_end(ended.append)
        await remote.start(SPEC)
        node.crash("vm-a")
        with anyio.fail_after(10):
            while not ended:
                await anyio.sleep(0.001)
    assert (ended[0].vm_id, ended[0].reason) == ("vm-a", "crashed")


async def test_a_node_that_goes_leaves_nobody_waiting(node):
    lost, served = [], anyio.CancelScope()
    ours, theirs = socket.socketpair()

    async def until_it_goes():
        with served:
            await serve(node, theirs)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(until_it_goes)
        async with connected(ours, lambda: lost.append(True)) as remote:
            asyncio.get_running_loop().call_later(0.05, served.cancel)
            with anyio.fail_after(10):
                for _ in range(2):
                    with pytest.raises(OutcomeUnknown):
                        await remote.start(SandboxSpec("vm-hangs", 2, BOOT_HANGS_MIB))
            while not lost:
                await anyio.sleep(0.001)
    assert remote.tier == node.tier


async def test_a_node_that_stops_answering_is_told_as_one_until_it_goes_on(node, monkeypatch):
    """Open calls end, new ones are refused, `stop` waits; what was asked for is abandoned, and nothing is lost."""
    monkeypatch.setattr("instavm.border.calling.PING_S", 0.02)
    ours, theirs = socket.socketpair()
    between, relayed = socket.socketpair()
    passing = anyio.Event()
    passing.set()

    async def relay(source, target):
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, 65536):
            await passing.wait()
            await loop.sock_sendall(target, data)

    for one in (theirs, between):
        one.setblocking(False)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve, node, relayed)
        tasks.start_soon(relay, theirs, between)
        tasks.start_soon(relay, between, theirs)
        async with connected(ours) as remote:
            await remote.start(SPEC)
            assert await remote.responds(10)
            passing = anyio.Event()
            assert not await remote.responds(0.05)
            with pytest.raises(NodeUnresponsive), anyio.fail_after(10):
                await remote.execute("vm-a", Command("print(1)", "python", 20))
            with pytest.raises(NodeUnresponsive):
                await remote.info()
            async with anyio.create_task_group() as stopping:
                stopping.start_soon(remote.stop, "vm-a")
                await anyio.sleep(0.1)
                assert "vm-a" in node.places
                passing.set()
            assert "vm-a" not in node.places
            assert await remote.info() == await node.info()
        tasks.cancel_scope.cancel()


def test_a_field_of_another_type_is_refused():
    with pytest.raises(ValueError, match="vcpus"):
        calls.loaded(calls.METHODS["start"].parameters["spec"], {"vm_id": "a", "vcpus": "many", "memory_mib": 1})


MESSAGE = st.tuples(
    st.sampled_from(list(Kind)) | st.integers(0, 300),
    st.integers(0, 3),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-5, 5)
        | st.binary(max_size=9)
        | st.sampled_from([*calls.METHODS, "vm-a"]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["vm_id", "spec", "path"]), inner, max_size=3)
        ),
        max_leaves=8,
    ),
)


@given(messages=st.lists(MESSAGE | st.binary(max_size=40), max_size=8))
@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
async def test_whatever_control_sends_the_node_lives(node, messages):
    """Control may have been taken over: the node answers, or hangs up, and is there for the next one."""
    ours, theirs = socket.socketpair()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve, node, theirs)
        link = await linked(ours, lambda kind, number, body: None)
        for message in messages:
            raw = message if isinstance(message, bytes) else msgpack.packb(message)
            link._transport.write(LENGTH.pack(len(raw)) + raw)
        link.close()
    async with across(node) as remote:
        assert (await remote.info()).driver == "local"


def test_an_error_that_is_none_of_ours_is_refused():
    for told in (None, {}, {"error": "OSError", "more": {}}, {"error": "InstaVMError"}, {"error": 1, "more": {}}):
        with pytest.raises(ValueError, match="error"):
            calls.load_error(told)
    assert issubclass(InstaVMError, Exception)


async def test_a_full_node_says_when_to_come_back(node, monkeypatch):
    async def full(spec):
        raise NoCapacity("this host is full", 41.5)

    monkeypatch.setattr(node, "_misbehave", full)
    async with across(node) as remote:
        with pytest.raises(NoCapacity) as caught:
            await remote.start(SPEC)
    assert caught.value.retry_after_s == 41.5


@pytest.mark.parametrize("depth", [100, 300, 900])
async def test_what_a_guest_names_and_nests_ends_no_link(node, monkeypatch, depth):
    """Text arrives as Unicode, and what is nested deeper than a message may be is cut: the code has run by then."""
    deep = {}
    for _ in range(depth):
        deep = {"d": deep}

    async def execute(vm_id, command, on_output):
        return Outcome("caf\udce9", "", 0, 0.1, 0.1, outputs=({"application/json": deep},))

    monkeypatch.setattr(node, "execute", execute)
    async with across(node) as remote:
        outcome = await remote.execute("vm-a", Command("1", "python", 60))
        assert outcome.stdout.encode().startswith(b"caf\xef\xbf\xbd")
        assert outcome.outputs[0]["application/json"]["d"]
        assert (await remote.info()).driver == "local"
