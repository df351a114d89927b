"""Firecracker's HTTP interface, over its Unix socket, and what it counts."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import anyio
import httpx

from instavm.errors import BootFailed
from instavm.node import planted
from instavm.node.vmm.process import Words

TIMEOUT_S: Final = 60.0
"""Writing all of a guest's memory to a slow disk takes its time."""
START_S: Final = 20.0
IN_CREATE: Final = 0x100
IN_ATTRIB: Final = 0x004
_libc = ctypes.CDLL(None, use_errno=True)


class Api:
    def __init__(self, root: Path, last_words: Callable[[], str]) -> None:
        """root: what the VMM sees as `/`. last_words: what it printed."""
        self._socket = root / "api.sock"
        self._last_words = last_words
        self._counted = Words(root / "metrics")
        self._opened = ExitStack()
        self._client: httpx.AsyncClient | None = None

    async def ready(self, alive: Callable[[], bool]) -> None:
        """Until it listens. Raises BootFailed."""
        try:
            with anyio.fail_after(START_S):
                await _answers(self._socket, alive)
        except (TimeoutError, ProcessLookupError) as exc:
            raise BootFailed(f"Firecracker did not start: {self._last_words() or 'it said nothing'}") from exc
        await self.call("PUT", "/metrics", {"metrics_path": "/metrics"})

    async def call(self, method: str, path: str, body: Mapping[str, object]) -> None:
        """Raises BootFailed."""
        try:
            answer = await self._connected().request(method, path, json=body)
        except (httpx.HTTPError, OSError) as exc:
            said = self._last_words()
            raise BootFailed(f"Firecracker: {method} {path}: {exc or type(exc).__name__} {said}".strip()) from exc
        if answer.is_error:
            raise BootFailed(f"Firecracker: {method} {path}: {_fault(answer)}")

    def metrics(self) -> str:
        return self._counted.last(1 << 16).rpartition("\n")[2]

    async def aclose(self) -> None:
        """Twice is fine."""
        if self._client is not None:
            await self._client.aclose()
        self._opened.close()
        self._counted.close()

    def _connected(self) -> httpx.AsyncClient:
        """To the socket that was there first, whatever the VMM puts in its place later. Raises OSError."""
        if self._client is None:
            place = self._opened.enter_context(planted.socket_at(self._socket))
            transport = httpx.AsyncHTTPTransport(uds=place)
            self._client = httpx.AsyncClient(transport=transport, base_url="http://firecracker", timeout=TIMEOUT_S)
        return self._client


def _fault(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["fault_message"])[:1000]
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.text[:200]}"


async def _answers(place: Path, alive: Callable[[], bool]) -> None:
    """Wait for a socket to be made and listened at. Raises ProcessLookupError: whoever should do that is gone."""
    watch = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _libc.inotify_add_watch(watch, os.fsencode(place.parent), IN_CREATE | IN_ATTRIB)
        while True:
            try:
                with planted.socket_at(place) as there:
                    await (await anyio.connect_unix(there)).aclose()
                return
            except OSError:
                if not alive():
                    raise ProcessLookupError from None
            with anyio.move_on_after(0.05):  # that it listens, or has ended, nobody tells
                await anyio.wait_readable(watch)
                os.read(watch, 4096)
    finally:
        os.close(watch)
