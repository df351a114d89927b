"""Sending calls over HTTP: one persistent connection, one place where httpx's errors become ours.

By httpx's transports, without its clients: we have no cookies, no redirects and no sessions, and those took a third of the
time that this side spends on a call.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx

from instavm.client import forks
from instavm.client.calls.base import Call
from instavm.client.calls.files import Around
from instavm.client.config import Config
from instavm.client.connecting import transport
from instavm.client.errors import from_answer
from instavm.client.failures import TROUBLE, repeatable, translated
from instavm.client.places import Source
from instavm.errors import HostNotReady, InstaVMError, ServerStopping
from instavm.version import __version__
from instavm.wire.files import RAW

if TYPE_CHECKING:
    from instavm.client.embedded import Embedded

T = TypeVar("T")

CONNECT_S: Final = 10.0
FIRST_PAUSE_S: Final = 1.0
"""Before the first retry; doubled each time."""
EMBEDDED_URL: Final = "http://embedded"
JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"


class Requests:
    """What goes over the wire for a call."""

    def __init__(self, config: Config) -> None:
        self._base = config.base_url or EMBEDDED_URL
        self._headers = {"X-API-Key": config.api_key, "User-Agent": f"instavm-selfhosted/{__version__}"}

    def of(
        self,
        call: Call[T],
        *,
        accept: str = JSON,
        content: Iterable[bytes] | AsyncIterable[bytes] | None = None,
        kind: str = JSON,
        size: int | None = None,
    ) -> httpx.Request:
        """content: the body, when it is not the call's own: `size` bytes of the MIME type `kind`."""
        headers = {**self._headers, "Accept": accept}
        if call.body is not None or content is not None:
            headers["Content-Type"] = kind
        if size is not None:
            headers["Content-Length"] = str(size)
        return httpx.Request(
            call.method,
            self._base + call.path,
            content=call.body if content is None else content,
            params=call.params or None,
            headers=headers,
            extensions={"timeout": {"connect": CONNECT_S, "read": call.answer_s, "write": call.answer_s}},
        )

    def upload(
        self, call: Call[T], around: Around, source: Source, pieces: Iterable[bytes] | AsyncIterable[bytes]
    ) -> httpx.Request:
        """A form around a file, whose `pieces` are sent as they come; in chunks, when nobody knows its size."""
        whole = None if source.size is None else source.size + len(around.head) + len(around.tail)
        return self.of(call, content=pieces, kind=around.content_type, size=whole)


class Link:
    """The blocking way to the server. Safe to share between threads, and with forked processes: each connects anew."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._embedded = _embedded(config)
        self._requests = Requests(config)
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        self._connecting = threading.Lock()
        self._transport: httpx.HTTPTransport | None = None

    def send(self, call: Call[T]) -> T:
        """Raises: what the server answered; NetworkError when it could not be reached or did not answer."""
        for attempt in range(self._config.max_retries + 1):
            try:
                return self._once(call)
            except TROUBLE as exc:
                if attempt == self._config.max_retries or not repeatable(exc, call):
                    raise translated(exc, call) from exc
                time.sleep(FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def upload(self, call: Call[T], around: Around, source: Source) -> T:
        """A call whose body is a form around a file, sent as it is read. Never repeated. Raises: as `send`, and FileError."""

        def pieces() -> Iterator[bytes]:
            yield around.head
            while piece := source.read():
                yield piece
            yield around.tail

        try:
            return self._whole(call, self._requests.upload(call, around, source, pieces()))
        except TROUBLE as exc:
            raise translated(exc, call) from exc

    def download(self, call: Call[bytes], file: BinaryIO) -> int:
        """A call whose answer is written to `file` as it comes. Returns: its bytes. Raises: as `send`; OSError of `file`."""
        try:
            with self.opened(call, RAW) as response:
                return sum(file.write(piece) for piece in response.iter_bytes())
        except TROUBLE as exc:
            raise translated(exc, call) from exc

    @contextmanager
    def opened(self, call: Call[T], accept: str = EVENTS) -> Iterator[httpx.Response]:
        """An answer that is read while it comes. Raises: what the server answered; one of TROUBLE."""
        with self._answer(self._requests.of(call, accept=accept)) as response:
            if response.status_code >= 300:
                raise _refused(response, response.read(), self._config)
            yield response

    def close(self) -> None:
        with self._connecting:
            transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def _once(self, call: Call[T]) -> T:
        """An embedded server may have ended since it last answered: then the next one is asked."""
        try:
            return self._whole(call, self._requests.of(call))
        except (httpx.NetworkError, httpx.RemoteProtocolError, ServerStopping) as exc:
            if self._embedded is None or not repeatable(exc, call):
                raise
        self._embedded.ensure(again=True)
        return self._whole(call, self._requests.of(call))

    def _whole(self, call: Call[T], request: httpx.Request) -> T:
        with self._answer(request) as response:
            return _read(response, response.read(), call, self._config)

    def _answer(self, request: httpx.Request) -> closing[httpx.Response]:
        response = self._connected().handle_request(request)
        forks.connected(response.extensions.get("network_stream"))
        return closing(response)

    def _connected(self) -> httpx.HTTPTransport:
        with self._connecting:
            if self._transport is None:
                if self._embedded is not None:
                    self._embedded.ensure()
                self._transport = transport(httpx.HTTPTransport, *_where(self._config, self._embedded))
            return self._transport


class AsyncLink:
    """The same for event loops: one connection for each that it is used from, one after the other."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._embedded = _embedded(config)
        self._requests = Requests(config)
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        self._loop: object = None
        self._transport: httpx.AsyncHTTPTransport | None = None

    async def send(self, call: Call[T]) -> T:
        """Raises: as `Link.send`."""
        for attempt in range(self._config.max_retries + 1):
            try:
                return await self._once(call)
            except TROUBLE as exc:
                if attempt == self._config.max_retries or not repeatable(exc, call):
                    raise translated(exc, call) from exc
                await anyio.sleep(FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    async def upload(self, call: Call[T], around: Around, source: Source) -> T:
        """As `Link.upload`; the file is read in a thread."""

        async def pieces() -> AsyncIterator[bytes]:
            yield around.head
            while piece := await anyio.to_thread.run_sync(source.read):
                yield piece
            yield around.tail

        try:
            return await self._whole(call, self._requests.upload(call, around, source, pieces()))
        except TROUBLE as exc:
            raise translated(exc, call) from exc

    async def download(self, call: Call[bytes], file: BinaryIO) -> int:
        """As `Link.download`; the file is written in a thread."""
        size = 0
        try:
            async with self.opened(call, RAW) as response:
                async for piece in response.aiter_bytes():
                    size += await anyio.to_thread.run_sync(file.write, piece)
        except TROUBLE as exc:
            raise translated(exc, call) from exc
        return size

    @asynccontextmanager
    async def opened(self, call: Call[T], accept: str = EVENTS) -> AsyncIterator[httpx.Response]:
        """As `Link.opened`."""
        async with await self._answer(self._requests.of(call, accept=accept)) as response:
            if response.status_code >= 300:
                raise _refused(response, await response.aread(), self._config)
            yield response

    async def aclose(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None and self._loop == anyio.lowlevel.current_token():
            await transport.aclose()

    async def _once(self, call: Call[T]) -> T:
        try:
            return await self._whole(call, self._requests.of(call))
        except (httpx.NetworkError, httpx.RemoteProtocolError, ServerStopping) as exc:
            if self._embedded is None or not repeatable(exc, call):
                raise
        await anyio.to_thread.run_sync(self._embedded.ensure, True)
        return await self._whole(call, self._requests.of(call))

    async def _whole(self, call: Call[T], request: httpx.Request) -> T:
        async with await self._answer(request) as response:
            return _read(response, await response.aread(), call, self._config)

    async def _answer(self, request: httpx.Request) -> aclosing[httpx.Response]:
        response = await (await self._connected()).handle_async_request(request)
        forks.connected(response.extensions.get("network_stream"))
        return aclosing(response)

    async def _connected(self) -> httpx.AsyncHTTPTransport:
        """A connection belongs to the event loop that it was made in: in another one there is none yet."""
        loop = anyio.lowlevel.current_token()
        if self._embedded is not None and (self._transport is None or self._loop != loop):
            await anyio.to_thread.run_sync(self._embedded.ensure)
        if self._transport is None or self._loop != loop:  # nobody else made it meanwhile
            self._transport = transport(httpx.AsyncHTTPTransport, *_where(self._config, self._embedded))
            self._loop = loop
        return self._transport


def _embedded(config: Config) -> Embedded | None:
    """Loaded only when it is asked for: it needs Linux, and a client of another server does not."""
    if config.base_url is not None:
        return None
    if sys.platform != "linux":
        raise HostNotReady(
            "only Linux can run sandboxes of its own: name a server with base_url or INSTAVM_BASE_URL"
        )
    from instavm.client.embedded import Embedded  # noqa: PLC0415
    from instavm.settings import Places  # noqa: PLC0415

    return Embedded(Places())


def _where(config: Config, embedded: Embedded | None) -> tuple[str | None, Path | None]:
    return config.base_url, None if embedded is None else embedded.socket


def _refused(response: httpx.Response, content: bytes, config: Config) -> InstaVMError:
    return from_answer(response.status_code, content, response.headers, config.base_url)


def _read(response: httpx.Response, content: bytes, call: Call[T], config: Config) -> T:
    if response.status_code >= 300:
        raise _refused(response, content, config)
    return call.read(content)
