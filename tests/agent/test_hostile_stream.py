"""Whole conversations of a lying guest: replayed, reordered, slow, endless. The host's memory stays flat and nothing hangs."""

import tracemalloc
from contextlib import suppress

import anyio
import pytest
from guest_line import guest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instavm.contract.executions import Command, Outcome
from instavm.errors import GuestProtocolError, InstaVMError
from instavm.node import files
from instavm_guest import frames

pytestmark = pytest.mark.anyio
COMMAND = Command("print(1)", "python", 5)
GOOD = frames.end_payload(0, 1e-6, 1e-6, 1, None)
PAYLOADS = st.one_of(
    st.just(GOOD),
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"",
            b"\1{}",
            b'\0{"text/plain":',
            b'\1"x"}',
            b'{"bytes": 1}',
            b'{"bytes": -1}',
            b'{"bytes": 99999999999}',
            b'{"path": "/etc/passwd", "size": 3}',
            b'{"path": 7, "size": "x"}',
            b'{"code": "not_found", "message": ["x"]}',
            b'{"code": {}, "message": "' + b"m" * 5000 + b'"}',
            b'{"protocol": "NaN"}',
            b'{"exit_code": true}',
        ]
    ),
)
SAID = st.lists(
    st.tuples(st.sampled_from(sorted(frames.FROM_GUEST)), st.integers(-1, 2), PAYLOADS, st.integers(1, 3)), max_size=12
)
CUTS = st.lists(st.integers(1, 50), min_size=1, max_size=12)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


async def asked(play):
    """The number of the host's first request."""
    reading, got = frames.Decoder(frames.FROM_HOST, frames.HOST_PAYLOAD_MAX), []
    while not got:
        got = reading.feed(await play.receive())
    return got[0][1]


async def told(ask, said, cuts):
    """What becomes of `ask(agent)` when the guest says all this, cut like that, and hangs up."""
    result = []
    async with guest() as (agent, play), anyio.create_task_group() as tasks:

        async def lie():
            number = await asked(play)
            data = b"".join(frames.encode(kind, number + off, what) * times for kind, off, what, times in said)
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                for cut in cuts * (len(data) // sum(cuts) + 1):
                    if data:
                        await play.send(data[:cut])
                    data = data[cut:]
            await play.aclose()

        tasks.start_soon(lie)
        with anyio.fail_after(30):
            try:
                result.append(await ask(agent))
            except InstaVMError as exc:
                result.append(exc)
        assert agent._pending == {}
    return result[0]


@QUICK
@given(SAID, CUTS)
async def test_any_conversation_ends_a_command_with_an_outcome_or_a_typed_error(said, cuts):
    assert isinstance(await told(lambda agent: agent.execute(COMMAND), said, cuts), (Outcome, InstaVMError))


@QUICK
@given(SAID, CUTS)
async def test_any_conversation_ends_a_download_with_bytes_or_a_typed_error(said, cuts):
    async def fetch(agent):
        return b"".join([piece async for piece in files.get(agent, "/x")])

    assert isinstance(await told(fetch, said, cuts), (bytes, InstaVMError))


@QUICK
@given(SAID, CUTS)
async def test_any_conversation_ends_an_upload_with_its_place_or_a_typed_error(said, cuts):
    async def chunks():
        yield b"x" * 100_000

    ended = await told(lambda agent: files.put(agent, "/x", "x", chunks()), said, cuts)
    assert isinstance(ended, InstaVMError) or (isinstance(ended.path, str) and ended.size_bytes >= 0)


async def test_a_guest_that_sends_a_byte_at_a_time_is_heard_out():
    outcome = await told(
        lambda agent: agent.execute(COMMAND), [(frames.STDOUT, 0, b"1\n", 1), (frames.RAN, 0, GOOD, 1)], [1]
    )
    assert outcome.stdout == "1\n"


@pytest.mark.parametrize(
    "endless",
    [
        lambda number: frames.encode(frames.STDOUT, number + 5, b"x" * frames.CHUNK),
        lambda number: frames.encode(frames.SYNCED, 0, b"y" * 32),
        lambda number: frames.encode_json(frames.DONE, number + 5, {"x": "y" * 1000}),
        lambda number: frames.encode(frames.OUTPUT, number, b"\0" + b"x" * 60_000),
        lambda number: frames.encode_json(frames.FAILED, number + 1, {"code": "file", "message": "z" * 3000}),
        lambda number: frames.encode_json(frames.HELLO, 0, {"protocol": 1, "python": "p" * 2000, "kernel": "k"}),
    ],
)
async def test_a_guest_that_never_stops_talking_takes_no_memory(endless):
    """32 MiB of it; what the host holds of them meanwhile stays under what one result may have."""
    async with guest() as (agent, play), anyio.create_task_group() as tasks:

        async def talk():
            number = await asked(play)
            piece = endless(number)
            batch = piece * max(1, (1 << 20) // len(piece))
            tracemalloc.start()
            try:
                for _ in range(32):
                    await play.send(batch)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < 24 << 20, f"{peak >> 20} MiB"
            await play.send(frames.encode(frames.RAN, number, GOOD))

        tasks.start_soon(talk)
        with anyio.fail_after(60), suppress(InstaVMError):
            await agent.execute(COMMAND)


async def test_a_frame_that_is_announced_and_never_comes_holds_nobody_but_its_own_request():
    """The caller is free when the time is up, and the line is given up; no more than one frame was held for it."""
    async with guest() as (agent, play):
        with anyio.move_on_after(1.0) as waited:
            async with anyio.create_task_group() as tasks:

                async def stall():
                    number = await asked(play)
                    await play.send(frames.HEADER.pack(frames.MAGIC, frames.STDOUT, 0, number, 60_000) + b"x" * 10)

                tasks.start_soon(stall)
                await agent.execute(COMMAND)
        assert waited.cancelled_caught
        assert agent._pending == {}


async def test_more_of_a_file_than_was_asked_for_ends_the_line():
    async def fetch(agent):
        async for _ in files.get(agent, "/x"):
            await anyio.sleep(0.01)

    flood = [(frames.CONTENT, 0, b"x" * frames.CHUNK, 64)]
    assert isinstance(await told(fetch, flood, [1 << 20]), GuestProtocolError)
