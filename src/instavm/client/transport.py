"""Sending calls over HTTP: one persistent connection, one place where httpx's errors become ours.

By httpx's transports, without its clients: we have no cookies, no redirects and no sessions, and those took a third of the
time that this side spends on a call.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import ssl
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from itertools import chain
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import anyio
import anyio.to_thread
import httpx

from instavm.client.calls.base import Call
from instavm.client.calls.files import Around
from instavm.client.config import Config
from instavm.client.embedded import Embedded
from instavm.client.errors import from_answer
from instavm.errors import NetworkError, ServerStopping
from instavm.settings import Places
from instavm.version import __version__
from instavm.wire.files import RAW

T = TypeVar("T")

CONNECT_S: Final = 10.0
FIRST_PAUSE_S: Final = 1.0
"""Before the first retry; doubled each time."""
LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=None)
"""Connections stay open for as long as the client does: that also tells an embedded server that it is in use.
"""
EMBEDDED_URL: Final = "http://embedded"
JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
PIECE_BYTES: Final = 256 << 10
"""How much of a file is in memory at one time."""


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
        self, call: Call[T], around: Around, file: BinaryIO, pieces: Iterable[bytes] | AsyncIterable[bytes]
    ) -> httpx.Request:
        """A form around a file, whose `pieces` are sent as they come."""
        size = os.fstat(file.fileno()).st_size + len(around.head) + len(around.tail)
        return self.of(call, content=pieces, kind=around.content_type, size=size)


class Link:
    """The blocking way to the server. Safe to share between threads."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._embedded = Embedded(Places()) if config.base_url is None else None
        self._requests = Requests(config)
        self._transport: httpx.HTTPTransport | None = None

    def send(self, call: Call[T]) -> T:
        """Raises: what the server answered; NetworkError when it could not be reached or did not answer."""
        for attempt in range(self._config.max_retries + 1):
            try:
                return self._once(call)
            except httpx.TransportError as exc:
                if attempt == self._config.max_retries or not repeatable(exc, call):
                    raise translated(exc, call) from exc
                time.sleep(FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def upload(self, call: Call[T], around: Around, file: BinaryIO) -> T:
        """A call whose body is a form around a file, sent as it is read. Never repeated. Raises: as `send`."""
        pieces = chain([around.head], iter(lambda: file.read(PIECE_BYTES), b""), [around.tail])
        try:
            return self._whole(call, self._requests.upload(call, around, file, pieces))
        except httpx.TransportError as exc:
            raise translated(exc, call) from exc

    def download(self, call: Call[bytes], file: BinaryIO) -> int:
        """A call whose answer is written to `file` as it comes. Returns: its bytes. Raises: as `send`."""
        try:
            with self.opened(call, RAW) as response:
                return sum(file.write(piece) for piece in response.iter_raw())
        except httpx.TransportError as exc:
            raise translated(exc, call) from exc

    @contextmanager
    def opened(self, call: Call[T], accept: str = EVENTS) -> Iterator[httpx.Response]:
        """An answer that is read while it comes. Raises: what the server answered; httpx.TransportError."""
        with self._answer(self._requests.of(call, accept=accept)) as response:
            if response.status_code >= 300:
                raise from_answer(response.status_code, response.read())
            yield response

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None

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
            return _read(response.status_code, response.read(), call)

    def _answer(self, request: httpx.Request) -> closing[httpx.Response]:
        if self._transport is None:
            if self._embedded is not None:
                self._embedded.ensure()
            self._transport = httpx.HTTPTransport(**_how(self._config, self._embedded))
        return closing(self._transport.handle_request(request))


class AsyncLink:
    """The same for an event loop."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._embedded = Embedded(Places()) if config.base_url is None else None
        self._requests = Requests(config)
        self._transport: httpx.AsyncHTTPTransport | None = None

    async def send(self, call: Call[T]) -> T:
        """Raises: as `Link.send`."""
        for attempt in range(self._config.max_retries + 1):
            try:
                return await self._once(call)
            except httpx.TransportError as exc:
                if attempt == self._config.max_retries or not repeatable(exc, call):
                    raise translated(exc, call) from exc
                await anyio.sleep(FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    async def upload(self, call: Call[T], around: Around, file: BinaryIO) -> T:
        """As `Link.upload`; the file is read in a thread."""

        async def pieces() -> AsyncIterator[bytes]:
            yield around.head
            while piece := await anyio.to_thread.run_sync(file.read, PIECE_BYTES):
                yield piece
            yield around.tail

        try:
            return await self._whole(call, self._requests.upload(call, around, file, pieces()))
        except httpx.TransportError as exc:
            raise translated(exc, call) from exc

    async def download(self, call: Call[bytes], file: BinaryIO) -> int:
        """As `Link.download`; the file is written in a thread."""
        size = 0
        try:
            async with self.opened(call, RAW) as response:
                async for piece in response.aiter_raw():
                    size += await anyio.to_thread.run_sync(file.write, piece)
        except httpx.TransportError as exc:
            raise translated(exc, call) from exc
        return size

    @asynccontextmanager
    async def opened(self, call: Call[T], accept: str = EVENTS) -> AsyncIterator[httpx.Response]:
        """As `Link.opened`."""
        async with await self._answer(self._requests.of(call, accept=accept)) as response:
            if response.status_code >= 300:
                raise from_answer(response.status_code, await response.aread())
            yield response

    async def aclose(self) -> None:
        if self._transport is not None:
            await self._transport.aclose()
            self._transport = None

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
            return _read(response.status_code, await response.aread(), call)

    async def _answer(self, request: httpx.Request) -> aclosing[httpx.Response]:
        if self._transport is None and self._embedded is not None:
            await anyio.to_thread.run_sync(self._embedded.ensure)
        if self._transport is None:  # nobody else made it meanwhile
            self._transport = httpx.AsyncHTTPTransport(**_how(self._config, self._embedded))
        return aclosing(await self._transport.handle_async_request(request))


def _how(config: Config, embedded: Embedded | None) -> dict[str, Any]:
    """Of a transport: where to, and whom to believe."""
    if embedded is not None:
        return {"uds": str(embedded.socket), "verify": False, "limits": LIMITS}
    url = str(config.base_url)
    return {"verify": _verify(url), "limits": LIMITS, "proxy": _proxy(url)}


def repeatable(exc: httpx.TransportError | ServerStopping, call: Call[T]) -> bool:
    """Only what never went out or was not begun, or does no harm when it is done twice."""
    not_begun = isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | ServerStopping)
    return not_begun or call.repeatable


def translated(exc: httpx.TransportError, call: Call[T]) -> NetworkError:
    what = f"{call.method} {call.path}"
    if isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout):
        return NetworkError(f"{what}: the server cannot be reached ({exc or type(exc).__name__})")
    if isinstance(exc, httpx.TimeoutException):
        return NetworkError(f"{what}: no answer within {call.answer_s:g} s")
    return NetworkError(f"{what}: the connection broke before the answer was there ({exc or type(exc).__name__})")


def _read(status: int, content: bytes, call: Call[T]) -> T:
    if status >= 300:
        raise from_answer(status, content)
    return call.read(content)


def _verify(url: str) -> bool | ssl.SSLContext:
    """Certificates are checked for https://, always. For plain http nothing is loaded to check them with."""
    return True if url.startswith("https://") else no_authorities()


@functools.cache
def no_authorities() -> ssl.SSLContext:
    """Trusts nobody, so that it can be made in no time (loading the authorities takes 20 ms and more).

    For connections without TLS. Should one of them ever come to TLS all the same, it is refused.
    """
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _proxy(url: str) -> str | None:
    """The environment's proxy for this address, if it names one. Proxies are for addresses elsewhere, never for this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if _is_here(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
