"""Control's side of the border: calls that a process at the other end of a socket carries out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio

from instavm.border.calls import ENDED, METHODS, Bytes, Callback, Method, Value, dumped, load_error, loaded
from instavm.border.flow import Receiving, Sending
from instavm.border.link import Kind, Link
from instavm.contract.sandboxes import Ended
from instavm.errors import InstaVMError, NodeUnresponsive, OutcomeUnknown

log = logging.getLogger(__name__)

UNWIND_S: Final = 30.0
"""How long a call that was cancelled may take to undo what it has begun."""
PING_S: Final = 1.0
"""While calls are open, the node is asked this often whether it is still there."""
SILENT_PINGS: Final = 10
"""After so many intervals without any message the node counts as unresponsive, until its next message."""
ALWAYS_SENT: Final = frozenset({"stop"})
"""Methods that are sent to an unresponsive node too and wait for it: what control has ended must end."""


class Asked:
    """A call, until it is answered."""

    def __init__(self, method: Method, given: dict[str, Any], used: Callable[[int], None]) -> None:
        self.method = method
        self.given = given
        self.done = anyio.Event()
        self.result: Any = None
        self.error: InstaVMError | None = None
        self.outgoing = Sending()
        self.incoming = Receiving(used)

    def answer(self, result: Any) -> None:
        self.result = result
        self.incoming.end()
        self.done.set()

    def fail(self, error: InstaVMError) -> None:
        self.error = error
        self.incoming.end(error)
        self.done.set()


class Calls:
    """Calls by the name of a method of `Node`. They raise what the node raised, or OutcomeUnknown when it is gone."""

    link: Link

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._asked: dict[int, Asked] = {}
        self._on_end: Callable[[Ended], None] = lambda ended: None
        self._messages = 0
        """How many the node has sent."""
        self._pings: dict[int, anyio.Event] = {}
        self._called = anyio.Event()
        """Set while calls are open, or were a moment ago."""
        self._unresponsive = False
        self.on_signal: Callable[[int], None] = lambda number: None

    def on_end(self, callback: Callable[[Ended], None]) -> None:
        self._on_end = callback

    async def responds(self, within_s: float) -> bool:
        if self._unresponsive:
            return False
        number, event, seen = next(self._numbers), anyio.Event(), self._messages
        self._pings[number] = event
        self.link.send(Kind.PING, number)
        try:
            with anyio.move_on_after(within_s):
                await event.wait()
            return self._messages != seen  # any message will do: a busy node answers others first
        finally:
            del self._pings[number]

    async def watch(self) -> None:
        """Notice a node that stops answering while calls are open (a stopped process, a host that swaps), and that it is back.

        Intervals without a message are counted, not seconds: if this process itself stood still, that is one interval.
        """
        quiet = 0
        while True:
            await self._called.wait()
            seen = self._messages
            if quiet == 0:  # one unanswered ping at a time: nothing piles up at a node that does not read
                self.link.send(Kind.PING, 0)
            await anyio.sleep(PING_S)
            quiet = 0 if self._messages != seen else quiet + 1
            if quiet >= SILENT_PINGS and not self._unresponsive:
                self._give_up()
            if not (quiet or self._asked):
                self._called = anyio.Event()

    def _give_up(self) -> None:
        """Fail the calls that are open; the node is told to abandon them when it goes on."""
        self._unresponsive = True
        log.error("the node does not answer any more: calls to it are refused until it does")
        for number, asked in self._asked.items():
            if asked.method.name not in ALWAYS_SENT:
                self.link.send(Kind.CANCEL, number)
                asked.fail(_unresponsive())

    def take(self, kind: Kind, number: int, body: Any) -> None:
        """Raises ValueError, TypeError: it is no message that a node sends."""
        self._messages += 1
        if self._unresponsive:
            self._unresponsive = False
            log.warning("the node answers again")
        if kind is Kind.PONG:
            if (ping := self._pings.get(number)) is not None:
                ping.set()
            return
        if kind is Kind.ENDED:
            self._on_end(loaded(ENDED, body))
            return
        if kind is Kind.SIGNAL:
            self.on_signal(int(body))
            return
        asked = self._asked.get(number)
        if asked is None:
            return
        if kind is Kind.RESULT:
            asked.answer(body)
        elif kind is Kind.ERROR:
            asked.fail(OutcomeUnknown("the node broke the call off") if body is None else load_error(body))
        elif kind is Kind.TOLD:
            name, told = body
            parameter = asked.method.parameters[name]
            assert isinstance(parameter, Callback)
            asked.given[name](*loaded(parameter, told))
        elif kind is Kind.ITEM:
            asked.incoming.put(body)
        elif kind is Kind.MORE:
            asked.outgoing.more(int(body))
        else:
            raise ValueError(f"kind {kind} from the node")

    def lost(self) -> None:
        """The node is gone: whoever waits is told."""
        for asked in list(self._asked.values()):
            asked.fail(OutcomeUnknown("the node is gone; what it was asked may or may not have happened"))

    @asynccontextmanager
    async def _call(self, method: Method, given: dict[str, Any]) -> AsyncIterator[Asked]:
        """A call that has been sent; what has not been answered when the block ends is cancelled and waited for."""
        if self.link.closed.is_set():
            raise OutcomeUnknown("the node is gone")
        if self._unresponsive and method.name not in ALWAYS_SENT:
            raise _unresponsive()
        self._called.set()
        number = next(self._numbers)
        asked = self._asked[number] = Asked(method, given, lambda size: self.link.send(Kind.MORE, number, size))
        sources = [given[name] for name, kind in method.parameters.items() if isinstance(kind, Bytes)]
        self.link.send(Kind.CALL, number, (method.name, self._plain(method, given)))
        try:
            if sources:
                async with anyio.create_task_group() as tasks:
                    for source in sources:
                        tasks.start_soon(self._send, number, asked, source)
                    yield asked
                    tasks.cancel_scope.cancel()
            else:  # without a task group around it, so that a stream may be read by one task and then another
                yield asked
        finally:
            if not asked.done.is_set():
                self.link.send(Kind.CANCEL, number)
                with anyio.move_on_after(UNWIND_S, shield=True):
                    await asked.done.wait()
            del self._asked[number]

    async def _ask(self, name: str, /, **given: Any) -> Any:
        """The answer, checked by the type that the protocol gives it. Raises what the node raised; as `_call`."""
        method = METHODS[name]
        assert isinstance(method.returns, Value)
        try:
            async with self._call(method, given) as asked:
                await asked.done.wait()
        except ExceptionGroup as group:  # what the caller's own stream raised
            raise group.exceptions[0] from None
        if asked.error is not None:
            raise asked.error
        return loaded(method.returns, asked.result)

    async def _stream(self, name: str, /, **given: Any) -> AsyncGenerator[bytes, None]:
        async with self._call(METHODS[name], given) as asked:
            pieces = aiter(asked.incoming)
            while (piece := await anext(pieces, None)) is not None:
                yield piece

    async def _send(self, number: int, asked: Asked, source: AsyncIterator[bytes]) -> None:
        whole = False
        try:
            async for piece in asked.outgoing.pieces(source):
                self.link.send(Kind.PIECE, number, piece)
            whole = True
        finally:
            self.link.send(Kind.PIECE, number, whole)

    def _plain(self, method: Method, given: dict[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for name, kind in method.parameters.items():
            if isinstance(kind, Value):
                plain[name] = dumped(kind, given[name])
            else:
                plain[name] = given[name] is not None
        return plain


def _unresponsive() -> NodeUnresponsive:
    return NodeUnresponsive(
        "the process that runs the sandboxes does not answer; they are kept. What was asked for may or may not have happened:"
        " try again later"
    )
