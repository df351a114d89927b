"""Files into and out of a sandbox, over the line to its agent: in pieces, with credit, so that nobody holds much of one.

The guest is hostile: it may take its time, but it cannot send more than it was given credit for, nor take what was not sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator

import anyio

from instavm.contract.files import StoredFile
from instavm.errors import DiskFull, ExecutionError, FileError, FileMissing, GuestProtocolError, InstaVMError
from instavm.node.agent import Agent, Request, within
from instavm_guest import frames

WINDOW_BYTES = 1 << 20
"""How much of a file may be on its way between host and guest."""
STALL_S = 60.0
"""How long a guest may take to move on; a file system of the user's own may hang."""
PATH_MAX = 8192


class Transfer(Request):
    """A file on its way, as its request sees it."""

    def __init__(self, path: str) -> None:
        super().__init__(None)
        self._path = path
        self._moved = anyio.Event()
        self._pieces: deque[bytes] = deque()
        self._received = 0
        self.under_way = 0
        self.credit = 0

    def file(self, kind: int, payload: bytes) -> None:
        if kind == frames.TAKEN:
            taken = frames.decode_json(payload).get("bytes")
            if type(taken) is not int or not 0 < taken <= self.under_way:
                raise frames.FrameError(f"the guest took {str(taken)[:40]} of {self.under_way} bytes")
            self.under_way -= taken
        else:
            self.credit -= len(payload)
            if self.credit < -frames.CHUNK or not payload:
                raise frames.FrameError("the guest sent more of a file than it was asked for")
            self._received += len(payload)
            self._pieces.append(payload)
        self._wake()

    def refusal(self, told: frames.Message) -> InstaVMError:
        text = f"{self._path}: {str(told.get('message'))[:500]}"
        match told.get("code"):
            case "not_found":
                return FileMissing(text)
            case "disk_full":
                return DiskFull(f"{text} (the sandbox's own disk)")
            case "is_directory" | "not_a_file" | "file" | "cancelled":
                return FileError(text)
        return ExecutionError(f"the guest's agent: {text}")

    def end(self) -> None:
        super().end()
        self._wake()

    async def room(self, size: int) -> None:
        """Wait until `size` more bytes may be sent. Raises what the guest refused with."""
        while self.under_way + size > WINDOW_BYTES and not self.done.is_set():
            await self._progress(self._moved)
        if self.error is not None:
            raise self.error
        if self.done.is_set():
            raise GuestProtocolError("the guest ended a file before all of it was there")
        self.under_way += size

    async def piece(self) -> bytes | None:
        """The next bytes, or None at the end of the file."""
        while not self._pieces and not self.done.is_set():
            await self._progress(self._moved)
        if self._pieces:
            return self._pieces.popleft()
        if self.error is not None:
            raise self.error
        if (self.answer or {}).get("size") != self._received:
            raise GuestProtocolError("the guest sent another number of bytes than it says")
        return None

    async def stored(self) -> StoredFile:
        """What the guest says it wrote."""
        await self._progress(self.done)
        if self.error is not None:
            raise self.error
        path, size = (self.answer or {}).get("path"), (self.answer or {}).get("size")
        if not isinstance(path, str) or len(path) > PATH_MAX or type(size) is not int or size < 0:
            raise GuestProtocolError("the guest's answer about a file can't be read")
        return StoredFile(path, size)

    def _wake(self) -> None:
        self._moved.set()
        self._moved = anyio.Event()

    async def _progress(self, event: anyio.Event) -> None:
        try:
            await within(event, STALL_S)
        except TimeoutError:
            raise FileError(f"{self._path}: the sandbox moved nothing for {STALL_S:.0f} s") from None


async def put(agent: Agent, path: str, name: str, chunks: AsyncIterator[bytes]) -> StoredFile:
    """As `Node.put_file`, but for what a lost line means."""
    transfer = Transfer(path)
    async with agent.exchange(transfer) as number:
        await agent.send(frames.PUT, number, frames.json_payload({"path": path, "name": name}))
        async for chunk in chunks:
            for start in range(0, len(chunk), frames.CHUNK):
                piece = chunk[start : start + frames.CHUNK]
                await transfer.room(len(piece))
                await agent.send(frames.DATA, number, piece)
        await transfer.room(0)
        await agent.send(frames.COMMIT, number, b"")
        return await transfer.stored()


async def get(agent: Agent, path: str) -> AsyncGenerator[bytes, None]:
    """As `Node.get_file`, but for what a lost line means."""
    transfer = Transfer(path)
    async with agent.exchange(transfer) as number:
        await agent.send(frames.GET, number, frames.json_payload({"path": path, "name": ""}))
        owed = WINDOW_BYTES
        while True:
            if owed >= WINDOW_BYTES // 2:
                transfer.credit += owed
                await agent.send(frames.CREDIT, number, frames.json_payload({"bytes": owed}))
                owed = 0
            piece = await transfer.piece()
            if piece is None:
                return
            yield piece
            owed += len(piece)
