"""The line to a Firecracker guest, against a Unix socket that answers as Firecracker does."""

import anyio
import pytest

from instavm.node.vmm.vsock import VsockLine
from instavm_guest import frames

pytestmark = pytest.mark.anyio
HELLO = frames.encode_json(frames.HELLO, 0, {})
ONE, TWO = (frames.encode(frames.STDOUT, number, b"x" * 10) for number in (1, 2))


@pytest.fixture
async def guest(tmp_path):
    """Connections that were made, in order; the first CONNECT of all gets no answer."""
    made, asked = [], []

    async def serve(stream):
        asked.append(await stream.receive())
        if len(asked) > 1:
            await stream.send(b"OK 1073741824\n")
            await stream.send(HELLO)
            made.append(stream)
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        listener = await anyio.create_unix_listener(tmp_path / "agent.sock")
        tasks.start_soon(listener.serve, serve)
        yield made
        tasks.cancel_scope.cancel()


@pytest.fixture
async def line(guest, tmp_path):
    running = anyio.Event()
    running.set()
    line = VsockLine(tmp_path / "agent.sock", running, lambda: True, fresh=False)
    yield line
    await line.aclose()


async def test_a_connect_without_an_answer_is_tried_again(line, guest):
    await line.send(ONE)
    with anyio.fail_after(10):
        assert await guest[0].receive() == ONE


async def test_a_line_that_is_renewed_passes_on_what_was_written_and_drops_what_was_not_to_the_end(line, guest):
    """The guest writes a frame again that it could not end; the half of it that had come must not be read as well."""
    await line.send(ONE)
    await guest[0].send(ONE + TWO[:5])
    with anyio.fail_after(10):
        assert await line.receive() == ONE
        line.renew()
        await line.send(TWO)
        assert await guest[1].receive() == TWO
        await guest[1].send(TWO)
        assert await line.receive() == TWO


async def test_a_reader_that_waits_goes_on_with_the_new_connection(line, guest):
    await line.send(ONE)
    heard = []

    async def listen():
        heard.append(await line.receive())

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            await anyio.wait_all_tasks_blocked()
            line.renew()
            await line.send(ONE)
            await guest[1].send(TWO)
    assert heard == [TWO]


async def test_only_a_guest_that_boots_is_heard_to_say_hello(guest, tmp_path):
    """To the host a guest that says it again is another one; on a new connection it says it every time."""
    running = anyio.Event()
    running.set()
    booting = VsockLine(tmp_path / "agent.sock", running, lambda: True, fresh=True)
    with anyio.fail_after(10):
        await booting.send(ONE)
        assert await booting.receive() == HELLO
        booting.renew()
        await booting.send(ONE)
        await guest[1].send(TWO)
        assert await booting.receive() == TWO
    await booting.aclose()


async def test_a_line_to_a_vmm_that_is_gone_has_ended(tmp_path):
    running = anyio.Event()
    running.set()
    with pytest.raises(anyio.EndOfStream):
        await VsockLine(tmp_path / "none", running, lambda: False, fresh=False).receive()
