"""Following an execution: events as they come, over connections that may break."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import anyio
import httpx
from httpx_sse import EventSource, ServerSentEvent

from instavm.client.calls.base import Call, ask, body_of, segment
from instavm.client.calls.executions import CODE
from instavm.client.errors import from_answer
from instavm.client.failures import TROUBLE, translated
from instavm.client.results import Execution, Record
from instavm.client.transport import AsyncLink, Link
from instavm.errors import InstaVMError, NotFound, OutcomeUnknown
from instavm.wire.executions import Execute
from instavm.wire.streams import ID_HEADER

SILENCE_S: Final = 60.0
"""The server sends something every 15 s; a stream that is silent for this long is broken."""
RECONNECTS: Final = 6
"""How often in a row a broken stream is taken up again without anything new coming out of it."""
FIRST_PAUSE_S: Final = 0.2
"""Before it is taken up again; doubled each time."""


class StreamEvent(Record):
    """Something that an execution told: `type` is stdout, stderr, output or result.

    text: of stdout and stderr. output: a bundle {MIME type: data}. result: the `Execution`, whole; the last event.
    """

    type: str
    execution_id: str
    text: str
    output: dict[str, Any]
    result: Execution


class Events:
    """Reads events, and remembers where to take them up again. No I/O."""

    def __init__(self) -> None:
        self.ended = False
        self._failures = 0

    def call(self) -> Call[None]:
        """The request that begins it, or takes it up again."""
        raise NotImplementedError

    def began(self, response: httpx.Response) -> None:
        """Its head is there."""

    def broke(self, exc: Exception) -> float:
        """The connection broke; how long to wait, in seconds, before it is tried again. Raises: NetworkError."""
        self._failures += 1
        if self._failures > RECONNECTS:
            raise translated(exc, self.call()) from exc
        return float(FIRST_PAUSE_S * 2 ** (self._failures - 1))

    def unknown(self, exc: NotFound) -> InstaVMError:
        """What it means that the server knows nothing of it."""
        return exc

    def read(self, told: ServerSentEvent) -> Record | None:
        """What it tells; None for what only keeps the connection alive.

        Raises: what the server told instead of a result; httpx.RemoteProtocolError, when it cannot be read.
        """
        if not told.data:
            return None
        if told.event == "error":
            raise from_answer(200, told.data.encode())
        try:
            event = self._complete(told.event, int(told.id), json.loads(told.data))
        except (ValueError, LookupError, TypeError, RecursionError) as exc:
            raise httpx.RemoteProtocolError(f"an event of the stream cannot be read: {exc!r}") from exc
        self._failures = 0
        return event

    def _complete(self, kind: str, number: int, data: dict[str, Any]) -> Record:
        raise NotImplementedError


class Reader(Events):
    """Of an execution."""

    def __init__(self, session_id: str, code: str, language: str, timeout: float | None) -> None:
        super().__init__()
        given = ask(Execute, CODE, command=code, session_id=session_id, language=language, timeout=timeout)
        self._body = body_of(given)
        self.execution_id: str | None = None
        self._number = 0
        self._told: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._outputs: list[dict[str, Any]] = []
        self._missed = False

    def call(self) -> Call[None]:
        if self.execution_id is None:
            return Call("POST", "/execute/stream", nothing, self._body, answer_s=SILENCE_S, repeatable=False)
        path = f"/v1/executions/{segment(execution_id=self.execution_id)}/stream"
        return Call("GET", path, nothing, params={"after": str(self._number)}, answer_s=SILENCE_S)

    def began(self, response: httpx.Response) -> None:
        self.execution_id = response.headers.get(ID_HEADER)

    def broke(self, exc: Exception) -> float:
        if self.execution_id is None:
            raise translated(exc, self.call()) from exc
        return super().broke(exc)

    def unknown(self, exc: NotFound) -> InstaVMError:
        if self.execution_id is None:
            return exc
        return OutcomeUnknown(
            f"execution {self.execution_id} cannot be followed any more, the server that ran it is gone:"
            " the code may or may not have finished; execute_async and processes outlive their server"
        )

    def _complete(self, kind: str, number: int, data: dict[str, Any]) -> StreamEvent:
        self._missed |= number != self._number + 1
        self._number = number
        if kind in self._told:
            self._told[kind].append(data["text"])
            return self._made(kind, text=data["text"])
        if kind == "output":
            self._outputs.append(data)
            return self._made(kind, output=data)
        self.ended = True
        told = {name: "".join(texts) for name, texts in self._told.items()}
        cut = data["truncated"] or self._missed
        return self._made("result", result=Execution({**data, **told, "outputs": self._outputs, "truncated": cut}))

    def _made(self, kind: str, **what: object) -> StreamEvent:
        return StreamEvent(type=kind, execution_id=self.execution_id, **what)


def follow(link: Link, reader: Events) -> Iterator[Any]:
    """Events until the last. Raises: what ended it instead; NetworkError.

    A process that is forked meanwhile may go on here, too: it follows by a connection of its own.
    """
    while not reader.ended:
        here = os.getpid()
        try:
            with link.opened(reader.call()) as response:
                reader.began(response)
                for told in EventSource(response).iter_sse():
                    if (event := reader.read(told)) is not None:
                        yield event
                    if os.getpid() != here:
                        break
            if not reader.ended and os.getpid() == here:
                raise httpx.RemoteProtocolError("the stream ended before its end")
        except TROUBLE as exc:
            time.sleep(reader.broke(exc))
        except NotFound as exc:
            raise reader.unknown(exc) from exc


async def follow_async(link: AsyncLink, reader: Events) -> AsyncIterator[Any]:
    """As `follow`; an event loop cannot be gone on with in a forked process."""
    while not reader.ended:
        try:
            async with link.opened(reader.call()) as response:
                reader.began(response)
                async for told in EventSource(response).aiter_sse():
                    if (event := reader.read(told)) is not None:
                        yield event
            if not reader.ended:
                raise httpx.RemoteProtocolError("the stream ended before its end")
        except TROUBLE as exc:
            await anyio.sleep(reader.broke(exc))
        except NotFound as exc:
            raise reader.unknown(exc) from exc


def nothing(_body: bytes) -> None:
    """A stream is not read as a whole."""
