"""Following an execution: events as they come, over connections that may break."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import anyio
import httpx

from instavm.client.calls.base import Call, ask, segment
from instavm.client.errors import from_answer
from instavm.client.results import Execution, Record
from instavm.client.transport import AsyncLink, Link, translated
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


class Lines:
    """Puts events together from lines, and remembers where to take them up again. No I/O."""

    def __init__(self) -> None:
        self.ended = False
        self._failures = 0
        self._event: dict[str, str] = {}

    def call(self) -> Call[None]:
        """The request that begins it, or takes it up again."""
        raise NotImplementedError

    def began(self, response: httpx.Response) -> None:
        """Its head is there."""

    def broke(self, exc: httpx.TransportError) -> float:
        """The connection broke; how long to wait, in seconds, before it is tried again. Raises: NetworkError."""
        self._event = {}
        self._failures += 1
        if self._failures > RECONNECTS:
            raise translated(exc, self.call()) from exc
        return float(FIRST_PAUSE_S * 2 ** (self._failures - 1))

    def unknown(self, exc: NotFound) -> InstaVMError:
        """What it means that the server knows nothing of it."""
        return exc

    def line(self, line: str) -> Record | None:
        """One line of the stream; the event that it completes. Raises: what the server told instead of a result."""
        name, _, value = line.partition(": ")
        if line:
            self._event[name] = value
            return None
        event, self._event = self._event, {}
        if "event" not in event:
            return None
        if event["event"] == "error":
            raise from_answer(200, event["data"].encode())
        self._failures = 0
        return self._complete(event["event"], int(event["id"]), json.loads(event["data"]))

    def _complete(self, kind: str, number: int, data: dict[str, Any]) -> Record:
        raise NotImplementedError


class Reader(Lines):
    """Of an execution."""

    def __init__(self, session_id: str, code: str, language: str, timeout: float | None) -> None:
        super().__init__()
        given = ask(Execute, command=code, session_id=session_id, language=language, timeout=timeout)
        self._body = given.model_dump_json(exclude_unset=True).encode()
        self.execution_id: str | None = None
        self._number = 0
        self._told: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._outputs: list[dict[str, Any]] = []
        self._missed = False

    def call(self) -> Call[None]:
        if self.execution_id is None:
            return Call("POST", "/execute/stream", nothing, self._body, answer_s=SILENCE_S, repeatable=False)
        path = f"/v1/executions/{segment(self.execution_id)}/stream"
        return Call("GET", path, nothing, params={"after": str(self._number)}, answer_s=SILENCE_S)

    def began(self, response: httpx.Response) -> None:
        self.execution_id = response.headers.get(ID_HEADER)

    def broke(self, exc: httpx.TransportError) -> float:
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


def follow(link: Link, reader: Lines) -> Iterator[Any]:
    """Events until the last. Raises: what ended it instead; NetworkError."""
    while not reader.ended:
        try:
            with link.opened(reader.call()) as response:
                reader.began(response)
                for line in response.iter_lines():
                    if (event := reader.line(line)) is not None:
                        yield event
            if not reader.ended:
                raise httpx.RemoteProtocolError("the stream ended before its end")
        except httpx.TransportError as exc:
            time.sleep(reader.broke(exc))
        except NotFound as exc:
            raise reader.unknown(exc) from exc


async def follow_async(link: AsyncLink, reader: Lines) -> AsyncIterator[Any]:
    """As `follow`."""
    while not reader.ended:
        try:
            async with link.opened(reader.call()) as response:
                reader.began(response)
                async for line in response.aiter_lines():
                    if (event := reader.line(line)) is not None:
                        yield event
            if not reader.ended:
                raise httpx.RemoteProtocolError("the stream ended before its end")
        except httpx.TransportError as exc:
            await anyio.sleep(reader.broke(exc))
        except NotFound as exc:
            raise reader.unknown(exc) from exc


def nothing(_body: bytes) -> None:
    """A stream is not read as a whole."""
