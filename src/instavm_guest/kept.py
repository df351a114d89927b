"""What tasks wrote and how they ended, kept until the host has written it down: servers may come and go meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from instavm_guest import frames

HALF_BYTES = 256 << 10
"""Of each stream the first and the last so many bytes are kept."""
ENDED_MAX = 32
FORGOTTEN_MAX = 10_000
"""Names of tasks that are not kept any more: asked for again, they must not run again."""


class Stream:
    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self.left_out = 0

    def add(self, data: bytes) -> None:
        room = HALF_BYTES - len(self._head)
        self._head += data[:room]
        self._tail += data[room:] if room < len(data) else b""
        over = len(self._tail) - HALF_BYTES
        if over > HALF_BYTES:  # not at every byte: cutting off the front moves the rest
            del self._tail[:over]
            self.left_out += over

    def pieces(self) -> Iterator[bytes]:
        over = len(self._tail) - HALF_BYTES
        if over > 0:
            del self._tail[:over]
            self.left_out += over
        note = b"\n... %d bytes left out ...\n" % self.left_out if self.left_out else b""
        data = bytes(self._head) + note + bytes(self._tail)
        for start in range(0, len(data), frames.CHUNK):
            yield data[start : start + frames.CHUNK]


class Kept:
    """One task. `waiter`: the request that hears of it."""

    def __init__(self, request: int) -> None:
        self.waiter = request
        self._end: tuple[int, bytes] | None = None
        self._streams = {frames.STDOUT: Stream(), frames.STDERR: Stream()}

    @property
    def ended(self) -> bool:
        return self._end is not None

    def add(self, kind: int, payload: bytes) -> None:
        if kind in self._streams:
            self._streams[kind].add(payload)
        elif kind in (frames.RAN, frames.FAILED):
            self._end = (kind, payload)

    def so_far(self) -> Iterator[tuple[int, bytes]]:
        """All of it as frames without a request, the end last if it has come."""
        for kind, stream in self._streams.items():
            for piece in stream.pieces():
                yield kind, piece
        if self._end is not None:
            kind, payload = self._end
            if kind == frames.RAN and any(stream.left_out for stream in self._streams.values()):
                payload = frames.cut(payload)
            yield kind, payload


class Tasks:
    """Each runs once, however often it is asked for. Of those that have ended the last ENDED_MAX are kept."""

    def __init__(self, send: Callable[[int, int, bytes], None]) -> None:
        self._send = send
        self._by_name: dict[str, Kept] = {}
        self._forgotten: dict[str, None] = {}
        self.running: dict[int, Kept] = {}
        """By the request that began it."""

    def begin(self, name: str, request: int) -> None:
        ended = [other for other, kept in self._by_name.items() if kept.ended]
        for other in ended[: max(0, len(ended) - ENDED_MAX)]:
            del self._by_name[other]
            self._forgotten[other] = None
        while len(self._forgotten) > FORGOTTEN_MAX:
            del self._forgotten[next(iter(self._forgotten))]
        self._by_name[name] = self.running[request] = Kept(request)

    def forgotten(self, name: str) -> bool:
        """Whether it ended so long ago that nothing is known of it but that."""
        return name in self._forgotten

    def joined(self, name: str, request: int) -> bool:
        """Tell `request` all of the task so far, and what comes from now on. False if there is no such task."""
        kept = self._by_name.get(name)
        if kept is None:
            return False
        kept.waiter = request
        for kind, payload in kept.so_far():
            self._send(kind, request, payload)
        return True

    def take(self, kind: int, request: int, payload: bytes) -> int:
        """Keep what answers the request that began a task; the request that is to hear it now."""
        kept = self.running.get(request)
        if kept is None:
            return request
        kept.add(kind, payload)
        if kept.ended:
            del self.running[request]
        return kept.waiter
