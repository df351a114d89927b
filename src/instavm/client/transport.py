"""Sending calls over HTTP: one persistent connection, one place where httpx's errors become ours."""

from __future__ import annotations

import functools
import ipaddress
import os
import ssl
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from itertools import chain
from typing import BinaryIO, Final, TypeVar
from urllib.parse import urlsplit

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
EVENT_HEADERS: Final = {"Accept": "text/event-stream"}
PIECE_BYTES: Final = 256 << 10
"""How much of a file is in memory at one time."""
RAW_HEADERS: Final = {"Accept": RAW}


class Link:
    """The blocking way to the server. Safe to share between threads."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._embedded = Embedded(Places()) if config.base_url is None else None
        self._client: httpx.Client | None = None

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
            connected = self._connected()
            return _read(connected.send(_request(connected, call, pieces, _form_headers(around, file))), call)
        except httpx.TransportError as exc:
            raise translated(exc, call) from exc

    def download(self, call: Call[bytes], file: BinaryIO) -> int:
        """A call whose answer is written to `file` as it comes. Returns: its bytes. Raises: as `send`."""
        try:
            connected = self._connected()
            response = connected.send(_request(connected, call, None, RAW_HEADERS), stream=True)
            with closing(response):
                if response.status_code >= 300:
                    raise from_answer(response.status_code, response.read())
                return sum(file.write(piece) for piece in response.iter_raw())
        except httpx.TransportError as exc:
            raise translated(exc, call) from exc

    @contextmanager
    def opened(self, call: Call[T]) -> Iterator[httpx.Response]:
        """An answer that is read while it comes. Raises: what the server answered; httpx.TransportError."""
        connected = self._connected()
        with closing(connected.send(_request(connected, call, None, EVENT_HEADERS), stream=True)) as response:
            if response.status_code >= 300:
                raise from_answer(response.status_code, response.read())
            yield response

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _once(self, call: Call[T]) -> T:
        """An embedded server may have ended since it last answered: then the next one is asked."""
        try:
            return _read(self._connected().send(_request(self._connected(), call)), call)
        except (httpx.NetworkError, httpx.RemoteProtocolError, ServerStopping) as exc:
            if self._embedded is None or not repeatable(exc, call):
                raise
        self._embedded.ensure(again=True)
        return _read(self._connected().send(_request(self._connected(), call)), call)

    def _connected(self) -> httpx.Client:
        if self._client is None:
            if self._embedded is not None:
                self._embedded.ensure()
            self._client = client(self._config, self._embedded)
        return self._client


class AsyncLink:
    """The same for an event loop."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._embedded = Embedded(Places()) if config.base_url is None else None
        self._client: httpx.AsyncClient | None = None

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
            connected = await self._connected()
            request = _request(connected, call, pieces(), _form_headers(around, file))
            return _read(await connected.send(request), call)
        except httpx.TransportError as exc:
            raise translated(exc, call) from exc

    async def download(self, call: Call[bytes], file: BinaryIO) -> int:
        """As `Link.download`; the file is written in a thread."""
        size = 0
        try:
            connected = await self._connected()
            response = await connected.send(_request(connected, call, None, RAW_HEADERS), stream=True)
            async with aclosing(response):
                if response.status_code >= 300:
                    raise from_answer(response.status_code, await response.aread())
                async for piece in response.aiter_raw():
                    size += await anyio.to_thread.run_sync(file.write, piece)
        except httpx.TransportError as exc:
            raise translated(exc, call) from exc
        return size

    @asynccontextmanager
    async def opened(self, call: Call[T]) -> AsyncIterator[httpx.Response]:
        """As `Link.opened`."""
        connected = await self._connected()
        async with aclosing(
            await connected.send(_request(connected, call, None, EVENT_HEADERS), stream=True)
        ) as response:
            if response.status_code >= 300:
                raise from_answer(response.status_code, await response.aread())
            yield response

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _once(self, call: Call[T]) -> T:
        try:
            connected = await self._connected()
            return _read(await connected.send(_request(connected, call)), call)
        except (httpx.NetworkError, httpx.RemoteProtocolError, ServerStopping) as exc:
            if self._embedded is None or not repeatable(exc, call):
                raise
        await anyio.to_thread.run_sync(self._embedded.ensure, True)
        connected = await self._connected()
        return _read(await connected.send(_request(connected, call)), call)

    async def _connected(self) -> httpx.AsyncClient:
        if self._client is None:
            if self._embedded is not None:
                await anyio.to_thread.run_sync(self._embedded.ensure)
            self._client = async_client(self._config, self._embedded)
        return self._client


def client(config: Config, embedded: Embedded | None) -> httpx.Client:
    if embedded is not None:
        transport = httpx.HTTPTransport(uds=str(embedded.socket), verify=False, limits=LIMITS)
        return httpx.Client(transport=transport, base_url=EMBEDDED_URL, headers=_headers(config))
    url = str(config.base_url)
    return httpx.Client(
        base_url=url, headers=_headers(config), limits=LIMITS, verify=_verify(url), trust_env=_proxied(url)
    )


def async_client(config: Config, embedded: Embedded | None) -> httpx.AsyncClient:
    if embedded is not None:
        transport = httpx.AsyncHTTPTransport(uds=str(embedded.socket), verify=False, limits=LIMITS)
        return httpx.AsyncClient(transport=transport, base_url=EMBEDDED_URL, headers=_headers(config))
    url = str(config.base_url)
    return httpx.AsyncClient(
        base_url=url, headers=_headers(config), limits=LIMITS, verify=_verify(url), trust_env=_proxied(url)
    )


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


def _headers(config: Config) -> dict[str, str]:
    return {
        "X-API-Key": config.api_key,
        "User-Agent": f"instavm-selfhosted/{__version__}",
        "Accept": "application/json",
    }


def _request(
    connected: httpx.Client | httpx.AsyncClient,
    call: Call[T],
    content: Iterable[bytes] | AsyncIterable[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
) -> httpx.Request:
    json_type = {"Content-Type": "application/json"} if call.body is not None else {}
    return connected.build_request(
        call.method,
        call.path,
        content=call.body if content is None else content,
        params=call.params or None,
        headers={**json_type, **(headers or {})},
        timeout=httpx.Timeout(CONNECT_S, read=call.answer_s, write=call.answer_s),
    )


def _form_headers(around: Around, file: BinaryIO) -> dict[str, str]:
    size = os.fstat(file.fileno()).st_size + len(around.head) + len(around.tail)
    return {"Content-Type": around.content_type, "Content-Length": str(size)}


def _read(response: httpx.Response, call: Call[T]) -> T:
    if response.status_code >= 300:
        raise from_answer(response.status_code, response.content)
    return call.read(response.content)


def _verify(url: str) -> bool | ssl.SSLContext:
    """Certificates are checked for https://, always. For plain http nothing is loaded to check them with."""
    return True if url.startswith("https://") else no_authorities()


@functools.cache
def no_authorities() -> ssl.SSLContext:
    """Trusts nobody, so that it can be made in no time (loading the authorities takes 20 ms and more).

    For connections without TLS. Should one of them ever come to TLS all the same, it is refused.
    """
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _proxied(url: str) -> bool:
    """Proxies of the environment are for addresses elsewhere, never for this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
