"""The line to the agent of a Firecracker guest: a Unix socket of the VMM's, behind which lies the guest's vsock.

It can be dialled before there is a guest, as QEMU's can: it connects when somebody first speaks or listens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
from anyio.abc import ByteStream

from instavm_guest.link import VSOCK_PORT

ANSWER_S = 0.2
"""The first CONNECT after a snapshot was loaded gets no answer: the guest resets its vsock then. So the first is not waited
for long; each that follows is given twice the time."""
ANSWER_MAX_S = 2.0
AGAIN_S = 0.02
"""Nobody tells when the guest begins to listen."""


class VsockLine(ByteStream):
    def __init__(self, place: Path, running: anyio.Event, alive: Callable[[], bool]) -> None:
        """running: set when there is a guest to connect to. alive: whether its VMM is there."""
        self._place = place
        self._running = running
        self._alive = alive
        self._stream: ByteStream | None = None
        self._connecting = anyio.Lock()
        self._closed = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await (await self._connected()).receive(max_bytes)

    async def send(self, item: bytes) -> None:
        await (await self._connected()).send(item)

    async def send_eof(self) -> None:
        await (await self._connected()).send_eof()

    async def aclose(self) -> None:
        self._closed = True
        if self._stream is not None:
            await self._stream.aclose()

    async def _connected(self) -> ByteStream:
        if self._stream is not None:
            return self._stream
        await self._running.wait()
        async with self._connecting:
            patience = ANSWER_S
            while self._stream is None:
                if self._closed:
                    raise anyio.ClosedResourceError
                if not self._alive():
                    raise anyio.EndOfStream
                self._stream = await self._dial(patience)
                patience = min(2 * patience, ANSWER_MAX_S)
                if self._stream is None:
                    await anyio.sleep(AGAIN_S)
            return self._stream

    async def _dial(self, patience_s: float) -> ByteStream | None:
        """None: nobody listens in there, or there was no answer in time."""
        try:
            stream = await anyio.connect_unix(str(self._place))
        except OSError:
            return None
        answered = False
        try:
            with anyio.move_on_after(patience_s):
                await stream.send(b"CONNECT %d\n" % VSOCK_PORT)
                said = b""
                while not said.endswith(b"\n"):
                    said += await stream.receive(1)  # what comes behind the line is the guest's
                answered = said.startswith(b"OK ")
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass
        finally:
            if not answered:
                with anyio.CancelScope(shield=True):
                    await stream.aclose()
        return stream if answered else None
