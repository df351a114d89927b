"""The line to the agent of a Firecracker guest: a Unix socket of the VMM's, behind which lies the guest's vsock.

It can be dialled before there is a guest, as QEMU's can: it connects when somebody first speaks or listens. And it connects
again when the machine was saved, since every saving resets the guest's vsock. A connection counts once the guest's agent has
greeted it: one that is made while the reset is under way ends with it. The guest repeats a frame that it could not write to
the end, so of each connection only whole frames are passed on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import anyio
from anyio.abc import ByteStream

from instavm.node import planted
from instavm.node.vmm.line import Line
from instavm_guest.frames import GUEST_PAYLOAD_MAX, HEADER, HELLO, MAGIC
from instavm_guest.link import VSOCK_PORT

ANSWER_S = 0.2
"""The first CONNECT after a snapshot was loaded gets no answer: the guest resets its vsock then. So the first is not waited
for long; each that follows is given twice the time."""
ANSWER_MAX_S = 4.0
AGAIN_S = 0.02
"""Nobody tells when the guest begins to listen."""
DRAIN_S = 0.02
"""What a guest that stands still has written is there already."""


class WholeFrames:
    """Lets through what ends with the end of a frame, and holds the rest. What is no frame of ours is not held."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        data = self._held + data
        end = 0
        while len(data) - end >= HEADER.size:
            magic, _, _, _, length = HEADER.unpack_from(data, end)
            if magic != MAGIC or length > GUEST_PAYLOAD_MAX:
                end = len(data)
            elif end + HEADER.size + length > len(data):
                break
            else:
                end += HEADER.size + length
        self._held = data[end:]
        return data[:end]


class VsockLine(ByteStream):
    def __init__(self, place: Path, running: anyio.Event, alive: Callable[[], bool], *, fresh: bool) -> None:
        """running: set when there is a guest to connect to. alive: whether its VMM is there.

        fresh: the guest is booting, and whoever dials is to have its first greeting.
        """
        self._fresh = fresh
        self._place = place
        self._running = running
        self._alive = alive
        self._stream: ByteStream | None = None
        self._connecting = anyio.Lock()
        self._reading = anyio.Lock()
        self._waiting = anyio.CancelScope()
        self._frames = WholeFrames()
        self._left = b""
        self._stale = False
        self._closed = False

    def renew(self) -> None:
        """The guest has forgotten this connection; what it wrote before can still be read. Only while it stands still."""
        self._stale = True
        self._waiting.cancel()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        while True:
            stream = await self._connected()
            if self._left:
                data, self._left = self._left, b""
                return data
            async with self._reading:
                with anyio.CancelScope() as self._waiting:
                    self._left = self._frames.feed(await stream.receive(max_bytes))

    async def send(self, item: bytes) -> None:
        await (await self._connected()).send(item)

    async def send_eof(self) -> None:
        await (await self._connected()).send_eof()

    async def aclose(self) -> None:
        self._closed = True
        if self._stream is not None:
            await self._stream.aclose()

    async def _connected(self) -> ByteStream:
        if self._stream is not None and not self._stale:
            return self._stream
        await self._running.wait()
        async with self._connecting:
            if self._stale:
                await self._let_go()
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

    async def _let_go(self) -> None:
        """Of a connection that the guest has forgotten, once everything has been read that it wrote."""
        stream, self._stream, self._stale = self._stream, None, False
        if stream is None:
            return
        async with self._reading:
            with anyio.move_on_after(DRAIN_S), suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    self._left += self._frames.feed(await stream.receive())
        self._frames = WholeFrames()
        await stream.aclose()

    async def _dial(self, patience_s: float) -> ByteStream | None:
        """None: nobody listens in there, or there was no answer in time."""
        try:
            with planted.socket_at(self._place) as place:
                stream = await Line.dial(Path(place))
        except OSError:
            return None
        answered = False
        try:
            with anyio.move_on_after(patience_s):
                await stream.send(b"CONNECT %d\n" % VSOCK_PORT)
                said = b""
                while not said.endswith(b"\n"):
                    said += await stream.receive(1)  # what comes behind the line is the guest's
                answered = said.startswith(b"OK ") and await self._greeted(stream)
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass
        finally:
            if not answered:
                with anyio.CancelScope(shield=True):
                    await stream.aclose()
        return stream if answered else None

    async def _greeted(self, stream: ByteStream) -> bool:
        """Whether somebody in there said hello. What comes behind that is kept, and all of it for who waits for a boot."""
        follow, said = WholeFrames(), b""
        while not said:
            said = follow.feed(await stream.receive())
        magic, kind, _, _, length = HEADER.unpack_from(said.ljust(HEADER.size))
        if (magic, kind) != (MAGIC, HELLO):
            return False
        self._frames = follow
        self._left += said if self._fresh else said[HEADER.size + length :]
        self._fresh = False
        return True
