"""The host's end of the line to a guest's agent.

The guest is hostile: what it sends is checked, counted and bounded.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
from anyio.abc import ByteStream

from instavm import limits
from instavm.contract.executions import Bundle, Command, Outcome, OutputSink, Stream
from instavm.errors import ExecutionError, GuestProtocolError, InstaVMError, OutcomeUnknown
from instavm.node import bundles
from instavm.node.ended import ended
from instavm_guest import frames

RECEIVE_BYTES = 256 << 10
ANSWER_GRACE_S = 15.0
"""How long past a command's own timeout the agent may take to answer before its sandbox is given up."""
ANSWER_S = 30.0
"""How long the agent may take for what does not wait for anything of the user's."""
LATE_S = 2.0
"""How long an answer is looked for once more after its deadline: when this process itself stood still (a stopped server, a
laptop that slept), the deadline is over on its return while the answer lies unread in the socket."""
SYNC_AGAIN_S = 0.5
CLOCK_OFF_NS = 200_000_000
"""How old the time of an identity may be when it was taken; half a second is what users are promised."""
PIECE_BYTES = 256 << 10
"""In pieces of about this size output is kept."""


class Capture:
    """What a stream's result keeps: its head and its tail, `limit` bytes at most, and how much was left out."""

    def __init__(self, limit: int = limits.OUTPUT_BYTES) -> None:
        self._half = limit // 2
        self._head: deque[bytearray] = deque()
        self._tail: deque[bytearray] = deque()
        self._head_size = self._tail_size = 0
        self.left_out = 0

    def add(self, data: bytes) -> None:
        if room := self._half - self._head_size:
            self._head_size += len(data[:room])
            _append(self._head, data[:room])
            data = data[room:]
        if data:
            self._tail_size += len(data)
            _append(self._tail, data)
            self._cut()

    def text(self) -> str:
        """All that is kept, which is not kept in here any longer: it may be long, and need not be there twice."""
        self._cut(exactly=True)
        # In ASCII: one character beyond it would double the memory that all of the text takes.
        note = b"\n... %d bytes left out ...\n" % self.left_out if self.left_out else b""
        data = b"".join((*self._head, note, *self._tail))
        self._head.clear()
        self._tail.clear()
        return data.decode(errors="replace")

    def _cut(self, *, exactly: bool = False) -> None:
        while (over := self._tail_size - self._half) > 0:
            oldest = self._tail[0]
            gone = min(over, len(oldest))
            if gone == len(oldest):
                self._tail.popleft()
            elif not exactly and over < PIECE_BYTES:
                return  # not at every byte: cutting off the front of a piece moves its rest
            else:
                del oldest[:gone]
            self._tail_size -= gone
            self.left_out += gone


def _append(pieces: deque[bytearray], data: bytes) -> None:
    """Small pieces are put together: each costs something besides its bytes."""
    if pieces and len(pieces[-1]) < PIECE_BYTES:
        pieces[-1].extend(data)
    else:
        pieces.append(bytearray(data))


class Outputs:
    """The rich outputs of a result: as many as limits allow, however many a guest sends."""

    def __init__(self) -> None:
        self.kept: list[Bundle] = []
        self.left_out = False
        self.latest: bytes | None = None
        """The output that the last piece has completed, if it did and is kept."""
        self._partial = bytearray()
        self._dropping = False
        self._size = 0

    def add(self, piece: bytes) -> None:
        """Raises FrameError: what is complete now is no bundle."""
        self.latest = None
        if not self._dropping:
            self._partial += piece[1:]
        if len(self.kept) >= limits.OUTPUTS_MAX or self._size + len(self._partial) > limits.OUTPUTS_BYTES:
            self._dropping = self.left_out = True
            self._partial.clear()
        if piece[:1] == b"\1":
            if not self._dropping:
                self._keep(bytes(self._partial))
            self._partial.clear()
            self._dropping = False

    def _keep(self, data: bytes) -> None:
        bundle = bundles.read(data)
        if bundle.keys() == {bundles.CLEAR}:
            self.kept.clear()
            self._size = 0
            self.latest = data
            return
        self.kept.append(bundle)
        self._size += len(data)
        self.latest = data


@dataclass(frozen=True, slots=True)
class Hello:
    protocol: int
    python: str
    kernel: str


class Request:
    """Something asked of the guest, until it is answered."""

    def __init__(self, on_output: OutputSink | None) -> None:
        self.done = anyio.Event()
        self.answer: dict[str, object] | None = None
        self.error: Exception | None = None
        self.captures: dict[Stream, Capture] = {"stdout": Capture(), "stderr": Capture()}
        self.outputs = Outputs()
        self._on_output = on_output

    def output(self, stream: Stream, data: bytes) -> None:
        self.captures[stream].add(data)
        if self._on_output is not None:
            self._on_output(stream, data)

    def rich(self, payload: bytes) -> None:
        """A piece of a rich output. Raises FrameError: it is no output."""
        self.outputs.add(payload)
        if self._on_output is not None and self.outputs.latest is not None:
            self._on_output("output", self.outputs.latest)

    def file(self, kind: int, payload: bytes) -> None:
        """A frame about a file. Raises FrameError: this request has none."""
        raise frames.FrameError(f"kind {kind} answers a request that is not about a file")

    def ran(self, payload: bytes) -> None:
        """How a command has ended. Raises FrameError: this request is none."""
        raise frames.FrameError("an end answers a request that runs nothing")

    def refusal(self, told: frames.Message) -> InstaVMError:
        """What it means that the guest could not carry it out."""
        return ExecutionError(f"the guest's agent: {str(told.get('message'))[:500]}")

    def fail(self, error: Exception) -> None:
        self.error = error
        self.end()

    def end(self) -> None:
        self.done.set()


class Execution(Request):
    """A command."""

    told: bytes | None = None
    """How it has ended, in the guest's words."""

    def ran(self, payload: bytes) -> None:
        self.told = payload
        self.end()


class Agent:
    """Several requests may be under way at once; answers find theirs by number."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._decoder = frames.Decoder(frames.FROM_GUEST, frames.GUEST_PAYLOAD_MAX)
        # Not from 1: a guest that outlived another server may still be busy with requests of that one.
        self._numbers = itertools.count(secrets.randbelow(1 << 30) + 1)
        self._pending: dict[int, Request] = {}
        self._hello = anyio.Event()
        self._hello_text: dict[str, object] = {}
        self._known = False
        """Whether it was spoken to: an agent that says hello after that is another one."""
        self._lost: Exception | None = None
        self.gone = anyio.Event()
        """The line has ended, or the agent at its other end is not the one any more that it was."""
        self._sending = anyio.Lock(fast_acquire=True)

    async def run(self) -> None:
        """Read until the line ends; whoever still waits is told. Returns, never raises, when the guest is gone."""
        try:
            while True:
                data = await self._stream.receive(RECEIVE_BYTES)
                for kind, request, payload in self._decoder.feed(data):
                    self._take(kind, request, payload)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            self._lose(OutcomeUnknown("the sandbox was lost while the command ran; it may or may not have run"))
        except frames.FrameError as exc:
            self._lose(GuestProtocolError(f"the guest broke the protocol: {exc}"))
        finally:
            with anyio.CancelScope(shield=True):
                await self._stream.aclose()

    async def aclose(self) -> None:
        """Hang up; `run` returns. Twice is fine."""
        await self._stream.aclose()

    async def sync(self, timeout_s: float) -> None:
        """Take up the line to an agent that another server talked to; before `run`. Raises TimeoutError, OutcomeUnknown.

        What the guest had half-sent is read over: bytes count again from its answer to a token made for this moment.
        """
        self._known = True
        token = secrets.token_hex(16)
        answer = frames.encode(frames.SYNCED, 0, token.encode())
        seen = b""
        try:
            with anyio.fail_after(timeout_s):
                while answer not in seen:
                    await self._stream.send(frames.encode_json(frames.SYNC, 0, {"token": token}))
                    with anyio.move_on_after(SYNC_AGAIN_S):
                        while answer not in seen:
                            seen = seen[-len(answer) :] + await self._stream.receive(RECEIVE_BYTES)
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            raise OutcomeUnknown("the sandbox was lost") from None
        behind = seen.partition(answer)[2]
        for kind, request, payload in self._decoder.feed(behind):
            self._take(kind, request, payload)

    def why_gone(self) -> str:
        return str(self._lost)

    async def hello(self, timeout_s: float) -> Hello:
        """The agent's first word after a cold boot. Raises TimeoutError, GuestProtocolError, OutcomeUnknown."""
        with anyio.fail_after(timeout_s):
            await self._hello.wait()
        if self._lost is not None:
            raise self._lost
        text = self._hello_text
        try:
            hello = Hello(int(str(text["protocol"])), str(text["python"])[:40], str(text["kernel"])[:80])
        except (KeyError, ValueError) as exc:
            raise GuestProtocolError(f"the guest's hello can't be read: {exc}") from exc
        if hello.protocol != frames.PROTOCOL:
            raise GuestProtocolError(f"the guest speaks protocol {hello.protocol}, this host {frames.PROTOCOL}")
        return hello

    async def configure(self, env: dict[str, str], cwd: str) -> None:
        await self._ask(frames.CONFIGURE, {"env": env, "cwd": cwd})

    async def rest(self) -> None:
        """The guest is about to be saved as a template; what it can do ahead for its clones, it starts now."""
        await self._ask(frames.REST, {})

    async def identify(self, identity: dict[str, object]) -> None:
        """Make this clone someone of its own. Nothing may run in it before this has returned."""
        await self._timely(await self._ask(frames.IDENTIFY, identity))

    async def assign(self, identity: dict[str, object], wake: Callable[[], Awaitable[None]]) -> None:
        """Give this clone, which has been someone of its own all along and stands still, to whom it is for.

        wake: lets it go on; the message lies there already when it does. Raises as `identify` and as `wake`.
        """
        await self._timely(await self._ask(frames.ASSIGN, identity, wake))

    async def _timely(self, request: Request) -> None:
        told = (request.answer or {}).get("time_ns")
        if isinstance(told, int) and abs(time.time_ns() - told) > CLOCK_OFF_NS:
            # the identity was long on its way, and its time is as old; all that is needed for this one is there by now
            await self.send(frames.CLOCK, 0, frames.json_payload({"time_ns": time.time_ns()}))

    async def stage_env(self, env: dict[str, str]) -> None:
        """Variables for everything that starts from now on. Raises as `execute`."""
        await self._ask(frames.STAGE_ENV, {"env": env})

    async def freeze(self) -> None:
        """Hold the guest's disk still: all is written, nobody writes. Raises as `execute`."""
        await self._ask(frames.FREEZE, {})

    async def thaw(self) -> bool:
        """Returns: whether it was held still until now; after some seconds the guest lets go by itself."""
        request = await self._ask(frames.THAW, {})
        return request.answer is not None and request.answer.get("held") is True

    @asynccontextmanager
    async def exchange(self, request: Request) -> AsyncIterator[int]:
        """A number for a request of more than one frame; what has not ended with the block is cancelled.

        Raises: as `execute`.
        """
        if self._lost is not None:
            raise self._lost
        self._known = True
        number = next(self._numbers)
        self._pending[number] = request
        try:
            yield number
        finally:
            del self._pending[number]
            if not request.done.is_set() and self._lost is None:
                await self._cancel(number)

    async def send(self, kind: int, number: int, payload: bytes) -> None:
        """One frame of an exchange. Raises OutcomeUnknown when the line is gone, or nothing is read at its other end."""
        try:
            with anyio.fail_after(ANSWER_S):
                async with self._sending:
                    await self._stream.send(frames.encode(kind, number, payload))
        except TimeoutError:
            raise OutcomeUnknown("the guest's agent does not read any more") from None
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            raise self._lost or OutcomeUnknown("the sandbox was lost on the way") from None

    async def execute(self, command: Command, on_output: OutputSink | None = None) -> Outcome:
        """Raises OutcomeUnknown, GuestProtocolError, ExecutionError."""
        timeout_ms = int(command.timeout_s * 1000)
        payload = frames.execute_payload(command.language, timeout_ms, command.code, dict(command.env), command.task)
        request = Execution(on_output)
        timeout_s = command.timeout_s + ANSWER_GRACE_S
        await self._answered(frames.EXECUTE, payload, request, timeout_s=timeout_s, goes_on=command.task is not None)
        return _outcome(request)

    async def _ask(
        self, kind: int, message: dict[str, object], sent: Callable[[], Awaitable[None]] | None = None
    ) -> Request:
        request = Request(None)
        await self._answered(kind, frames.json_payload(message), request, sent)
        return request

    async def _answered(
        self,
        kind: int,
        payload: bytes,
        request: Request,
        sent: Callable[[], Awaitable[None]] | None = None,
        *,
        timeout_s: float = ANSWER_S,
        goes_on: bool = False,
    ) -> None:
        """Until the guest has answered. goes_on: it carries that out also when nobody waits any more.

        Raises OutcomeUnknown (also when it does not answer in time), GuestProtocolError, ExecutionError.
        """
        if self._lost is not None:
            raise self._lost
        self._known = True
        number = next(self._numbers)
        self._pending[number] = request
        try:
            with anyio.fail_after(timeout_s):
                async with self._sending:
                    await self._stream.send(frames.encode(kind, number, payload))
                if sent is not None:
                    await sent()
            await within(request.done, timeout_s)
        except TimeoutError:
            if not goes_on:
                await self._cancel(number)
            raise OutcomeUnknown("the guest's agent does not answer any more; what it was asked may have happened") from None
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            raise self._lost or OutcomeUnknown("the sandbox was lost while the command was sent") from None
        except anyio.get_cancelled_exc_class():
            if not goes_on:
                await self._cancel(number)
            raise
        finally:
            del self._pending[number]
        if request.error is not None:
            raise request.error

    async def _cancel(self, number: int) -> None:
        """Nobody waits for the answer any more, so the guest need not go on."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(1.0):
            try:
                async with self._sending:
                    await self._stream.send(frames.encode_json(frames.CANCEL, number, {}))
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return

    def _take(self, kind: int, number: int, payload: bytes) -> None:
        if kind == frames.HELLO:
            self._greeted(frames.decode_json(payload))
            return
        if kind == frames.SYNCED:
            return  # an answer to a token that was sent twice
        request = self._pending.get(number)
        if request is None:
            return  # an answer that nobody waits for any more
        if kind == frames.STDOUT:
            request.output("stdout", payload)
        elif kind == frames.STDERR:
            request.output("stderr", payload)
        elif kind == frames.OUTPUT:
            request.rich(payload)
        elif kind == frames.RAN:
            request.ran(payload)
        elif kind == frames.DONE:
            request.answer = frames.decode_json(payload)
            request.end()
        elif kind == frames.FAILED:
            request.fail(request.refusal(frames.decode_json(payload)))
        else:
            request.file(kind, payload)

    def _greeted(self, text: dict[str, object]) -> None:
        if self._known or self._hello.is_set():  # a second agent: the first one died, and with it all that ran
            self._lose(OutcomeUnknown("the guest's agent was killed and came back: all that ran is gone"))
            return
        self._hello_text = text
        self._hello.set()

    def _lose(self, error: Exception) -> None:
        self._lost = self._lost or error
        self._hello.set()
        self.gone.set()
        for request in self._pending.values():
            request.fail(error)


async def within(done: anyio.Event, timeout_s: float) -> None:
    """Wait for an answer, LATE_S longer than asked for. Raises TimeoutError."""
    with anyio.move_on_after(timeout_s):
        await done.wait()
        return
    with anyio.fail_after(LATE_S):
        await done.wait()


@asynccontextmanager
async def connected(stream: ByteStream) -> AsyncIterator[Agent]:
    """An agent whose line is read for as long as the block lasts. What the block raises comes out as it is."""
    agent = Agent(stream)
    raised: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(agent.run)
        try:
            yield agent
        except Exception as exc:  # carried past the group, which would wrap it
            raised = exc
        tasks.cancel_scope.cancel()
    if raised is not None:
        raise raised


def _outcome(request: Execution) -> Outcome:
    if request.told is None:
        raise GuestProtocolError("the guest ended a request without an answer")
    end, flags = ended(request.told)
    out, err = request.captures["stdout"], request.captures["stderr"]
    stderr = err.text()
    if end.reason in _EXPLAINED:
        stderr += _EXPLAINED[end.reason]
    if flags & frames.RESTARTED and end.reason != "interpreter_crashed":
        stderr += _EXPLAINED["interpreter_crashed"]
    return Outcome(
        stdout=out.text(),
        stderr=stderr,
        exit_code=end.exit_code,
        execution_time_s=end.wall_s,
        cpu_time_s=end.cpu_s,
        timed_out=end.reason == "timeout",
        truncated=bool(out.left_out or err.left_out or request.outputs.left_out or flags & frames.CUT),
        reason=end.reason,
        signal=end.signal,
        peak_memory_bytes=end.peak_memory_bytes,
        outputs=tuple(request.outputs.kept),
    )


_EXPLAINED = {
    "timeout": "[instavm] timed out: the command was stopped\n",
    "cancelled": "[instavm] cancelled\n",
    "oom": "[instavm] out of memory: the kernel ended what used most of it\n",
    "pids": "[instavm] too many processes: the sandbox's limit was reached\n",
    "disk_full": "[instavm] the sandbox's disk is full\n",
    "interpreter_crashed": "[instavm] the interpreter ended; its variables are gone, files are kept\n",
}
