"""The host's end of the line against a guest that lies: bounded, typed, never a hang."""

import json
from contextlib import suppress

import anyio
import pytest
from guest_line import guest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instavm.contract.executions import Command
from instavm.errors import (
    ExecutionError,
    GuestProtocolError,
    InstaVMError,
    OutcomeUnknown,
    ProcessEnded,
    ProcessError,
    ProcessNotFound,
    RateLimitError,
)
from instavm.node import processes
from instavm_guest import frames

pytestmark = pytest.mark.anyio
COMMAND = Command("print(1)", "python", 5)
GOOD = frames.end_payload(0, 1e-4, 1e-4, 100, None)
NAN, INFINITE = float("nan"), float("inf")


async def answered(answer):
    """What execute() makes of a guest that answers its request with the bytes that `answer` gives for its number."""
    caught = None
    async with guest() as (agent, play), anyio.create_task_group() as tasks:

        async def be_the_guest():
            reading = frames.Decoder(frames.FROM_HOST, frames.HOST_PAYLOAD_MAX)
            got = []
            while not got:
                got = reading.feed(await play.receive())
            await play.send(answer(got[0][1]))

        tasks.start_soon(be_the_guest)
        with anyio.fail_after(30):
            try:
                return await agent.execute(COMMAND)
            except InstaVMError as exc:
                caught = exc  # raised outside of the group, which would wrap it
    raise caught


async def test_an_honest_answer_comes_through():
    outcome = await answered(lambda n: frames.encode(frames.STDOUT, n, b"1\n") + frames.encode(frames.RAN, n, GOOD))
    assert (outcome.stdout, outcome.exit_code) == ("1\n", 0)


LIES = [
    frames.end_payload(256, 0, 0, 0, None),
    frames.end_payload(-65, 0, 0, 0, None),
    frames.end_payload(0, -1, 0, 0, None),
    frames.end_payload(0, NAN, 0, 0, None),
    frames.end_payload(0, 0, INFINITE, 0, None),
    frames.end_payload(0, 0, 1e300, 0, None),
    frames.end_payload(0, 0, 0, 1 << 63, None),
    GOOD[:1] + b"\xff" + GOOD[2:],
    GOOD[:-1],
    GOOD + b"x",
    b"",
]


@pytest.mark.parametrize("lie", LIES)
async def test_an_answer_with_an_impossible_value_is_refused(lie):
    with pytest.raises(GuestProtocolError):
        await answered(lambda n: frames.encode(frames.RAN, n, lie))


@pytest.mark.parametrize(
    "answer",
    [
        lambda n: b"\x00" * 64,
        lambda n: frames.HEADER.pack(frames.MAGIC, frames.STDOUT, 0, n, 1 << 31),
        lambda n: frames.encode(frames.DONE, n, b"not json"),
        lambda n: frames.encode(frames.DONE, n, b"[" * 50_000),
        lambda n: frames.encode(frames.EXECUTE, n, b"{}"),
        lambda n: frames.encode(frames.DONE, n, json.dumps({"wall_us": 1}).encode()),
        lambda n: frames.encode(frames.CONTENT, n, b"x"),
    ],
)
async def test_a_broken_frame_ends_the_line_with_a_typed_error(answer):
    with pytest.raises(GuestProtocolError):
        await answered(answer)


async def test_answers_that_nobody_asked_for_are_dropped():
    outcome = await answered(
        lambda n: (
            frames.encode(frames.STDOUT, n + 7, b"x" * 1000)
            + frames.encode(frames.RAN, n + 9, GOOD)
            + frames.encode(frames.RAN, n, GOOD)
            + frames.encode(frames.RAN, n, GOOD)
        )
    )
    assert outcome.stdout == ""


async def test_a_hello_to_a_host_that_knew_an_agent_means_that_this_one_died():
    hello = frames.encode_json(frames.HELLO, 0, {"protocol": 1, "python": "3", "kernel": "6"})
    for said in (hello, hello + hello):
        with pytest.raises(OutcomeUnknown, match="was killed"):
            await answered(lambda n, said=said: said)


async def test_an_endless_stream_is_kept_to_its_limit():
    """100 MB of output, and the host holds what a result may hold."""
    chunk = b"x" * frames.CHUNK
    outcome = await answered(
        lambda n: frames.encode(frames.STDOUT, n, chunk) * 1600 + frames.encode(frames.RAN, n, GOOD)
    )
    assert outcome.truncated
    assert 16 << 20 <= len(outcome.stdout) < (16 << 20) + 100


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=300), frame=st.booleans(), kind=st.sampled_from(sorted(frames.FROM_GUEST)))
async def test_whatever_a_guest_says_the_caller_gets_an_outcome_or_a_typed_error(data, frame, kind):
    """Then the guest hangs up, so that even silence ends."""
    async with guest() as (agent, play), anyio.create_task_group() as tasks:

        async def be_the_guest():
            await play.receive()
            await play.send(frames.encode(kind, 1, data) if frame else data)
            await play.aclose()

        tasks.start_soon(be_the_guest)
        with anyio.fail_after(30):
            with suppress(InstaVMError):
                await agent.execute(COMMAND)


def output(data, last=True):
    return lambda n: frames.encode(frames.OUTPUT, n, (b"\1" if last else b"\0") + data)


async def test_rich_outputs_are_put_together_from_their_pieces():
    whole = json.dumps({"text/html": "<b/>"}).encode()
    outcome = await answered(
        lambda n: output(whole[:5], last=False)(n) + output(whole[5:])(n) + frames.encode(frames.RAN, n, GOOD)
    )
    assert outcome.outputs == ({"text/html": "<b/>"},)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b"[" * 50_000, b'{"not a type": 1}', b'{"a/' + b"b" * 200 + b'": 1}']
)
async def test_an_output_that_is_none_ends_the_line(data):
    with pytest.raises(GuestProtocolError):
        await answered(output(data))


async def test_endless_outputs_are_kept_to_their_limits():
    """However many, and however long: the host holds what a result may hold."""
    small = json.dumps({"text/plain": "x"}).encode()
    outcome = await answered(lambda n: output(small)(n) * 500 + frames.encode(frames.RAN, n, GOOD))
    assert (len(outcome.outputs), outcome.truncated) == (64, True)
    piece = b"x" * frames.CHUNK
    outcome = await answered(
        lambda n: output(piece, last=False)(n) * 500 + output(b"")(n) + frames.encode(frames.RAN, n, GOOD)
    )
    assert (outcome.outputs, outcome.truncated) == ((), True)


STATE = {
    "name": "prc_1",
    "command": "x",
    "cwd": "/",
    "pid": 7,
    "started_ns": 1,
    "begin": 0,
    "end": 3,
    "stdin": True,
}


async def read_from(answer):
    """What reading a process's log gives when the guest answers so."""
    caught = None
    async with guest() as (agent, play), anyio.create_task_group() as tasks:

        async def be_the_guest():
            asked = frames.Decoder(frames.FROM_HOST, frames.HOST_PAYLOAD_MAX).feed(await play.receive())
            await play.send(answer(asked[0][1]))

        tasks.start_soon(be_the_guest)
        with anyio.fail_after(30):
            try:
                return await processes.read(agent, "prc_1", 0, 1024, "now", 0.0)
            except InstaVMError as exc:
                caught = exc
    raise caught


async def test_a_window_of_a_log_is_what_was_asked_for():
    log = await read_from(lambda n: frames.encode(frames.STDOUT, n, b"abc") + frames.encode_json(frames.DONE, n, STATE))
    assert (log.pieces, log.next, log.lost, log.state.ended) == ((("stdout", b"abc"),), 3, 0, None)


@pytest.mark.parametrize(
    "lie",
    [
        {"name": None},
        {"command": ["x"]},
        {"pid": -1},
        {"pid": True},
        {"begin": -1},
        {"end": "3"},
        {"end": 1 << 70},
        {"started_ns": 1 << 80},
        {"ended": {}},
        {"ended": None},
        {"ended": "no hex"},
        *({"ended": lie.hex()} for lie in LIES),
    ],
)
async def test_a_state_with_an_impossible_value_is_refused(lie):
    with pytest.raises(GuestProtocolError):
        await read_from(lambda n: frames.encode_json(frames.DONE, n, {**STATE, **lie}))


async def test_more_of_a_log_than_was_asked_for_ends_the_line():
    with pytest.raises(GuestProtocolError, match="more of a log"):
        await read_from(lambda n: frames.encode(frames.STDERR, n, b"x" * 1025))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("no_process", ProcessNotFound),
        ("process_ended", ProcessEnded),
        ("stdin_full", ProcessError),
        ("too_many", RateLimitError),
        ("whatever", ExecutionError),
    ],
)
async def test_a_refusal_is_told_as_what_it_is(code, kind):
    with pytest.raises(kind):
        await read_from(lambda n: frames.encode_json(frames.FAILED, n, {"code": code, "message": "m"}))
