"""Files into and out of the user's world, as the agent sees them.

The agent never opens a path of the user's: a courier does (`courier.py`), a process of its own in the user's world. The agent
passes bytes on, and holds no more of them than the host gave credit for.
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections import deque
from typing import TYPE_CHECKING

from instavm_guest import courier, frames
from instavm_guest.courier import COMMIT, DATA, RESULT
from instavm_guest.frames import Message
from instavm_guest.world import Cgroup

if TYPE_CHECKING:
    from instavm_guest.agent import Agent
    from instavm_guest.programs import Programs

SOCKET_BYTES = 512 << 10


class Transfer:
    """One file on its way. Nothing here blocks: data waits for room in the socket, or for credit of the host."""

    def __init__(self, request: int, line: socket.socket, cgroup: Cgroup) -> None:
        self.request = request
        self.line = line
        self.cgroup = cgroup
        self.waiting: deque[tuple[bytes, bytes]] = deque()
        """Packets for the courier: a letter and a payload."""
        self.credit = 0


class Files:
    def __init__(self, agent: Agent, programs: Programs) -> None:
        self._agent = agent
        self._programs = programs
        self._transfers: dict[int, Transfer] = {}
        self._lingering: list[Cgroup] = []

    def handle(self, kind: int, request: int, payload: bytes) -> None:
        """One frame about a file. Raises what the frame's request is to fail with."""
        if kind in (frames.PUT, frames.GET):
            self._begin(kind, request, frames.decode_json(payload))
        elif (transfer := self._transfers.get(request)) is None:
            return  # it has ended, which the host hears or has heard
        elif kind == frames.DATA:
            transfer.waiting.append((DATA, payload))
            self._pass_on(transfer)
        elif kind == frames.COMMIT:
            transfer.waiting.append((COMMIT, b""))
            self._pass_on(transfer)
        elif kind == frames.CREDIT:
            transfer.credit += frames.decode_json(payload)["bytes"]
            self._watch(transfer)

    def cancel(self, request: int) -> None:
        if (transfer := self._transfers.get(request)) is not None:
            self._agent.fail(request, "cancelled", "cancelled")
            self._end(transfer)

    def _begin(self, kind: int, request: int, ask: Message) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        ours.setblocking(False)
        task = json.dumps({"kind": "put" if kind == frames.PUT else "get", "path": ask["path"], "name": ask["name"]})
        cgroup = Cgroup(f"file-{request}")
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            fds = [theirs.fileno(), null, null]
            self._programs.spawn([(courier.PROGRAM, task)], {}, "/", cgroup, fds, lambda _report: self._exited(cgroup))
        finally:
            os.close(null)
            theirs.close()
        transfer = self._transfers[request] = Transfer(request, ours, cgroup)
        transfer.credit = 0 if kind == frames.GET else 1
        self._agent.watch(ours.fileno(), lambda _fd: self._ready(transfer))
        self._watch(transfer)

    def _watch(self, transfer: Transfer) -> None:
        """Listen for what can be dealt with: words of the process while there is credit, room while data waits."""
        wanted = (select.POLLIN if transfer.credit > 0 else 0) | (select.POLLOUT if transfer.waiting else 0)
        self._agent.interest(transfer.line.fileno(), wanted)

    def _ready(self, transfer: Transfer) -> None:
        if transfer.waiting:
            self._pass_on(transfer)
        if transfer.request in self._transfers and transfer.credit > 0:
            self._heard(transfer)

    def _pass_on(self, transfer: Transfer) -> None:
        """Give the process what waits for it, and tell the host how much it took."""
        taken = 0
        while transfer.waiting:
            try:
                transfer.line.sendmsg(transfer.waiting[0])
            except BlockingIOError:
                break
            except OSError:
                transfer.waiting.clear()  # it has ended; its last word is still to be read
                break
            taken += len(transfer.waiting.popleft()[1])
        if taken:
            self._agent.send(frames.TAKEN, transfer.request, json.dumps({"bytes": taken}).encode())
        self._watch(transfer)

    def _heard(self, transfer: Transfer) -> None:
        try:
            packet = _next(transfer.line)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if packet[:1] == DATA:
            transfer.credit -= len(packet) - 1
            self._agent.send(frames.CONTENT, transfer.request, packet[1:])
            self._watch(transfer)
            return
        self._end(transfer)
        result = (
            json.loads(packet[1:]) if packet[:1] == RESULT else {"code": "file", "message": "the transfer was killed"}
        )
        if "code" in result:
            self._agent.fail(transfer.request, result["code"], result["message"])
        else:
            self._agent.answer(transfer.request, result)

    def _end(self, transfer: Transfer) -> None:
        """Its process sees the end of the line and cleans up behind itself; one that hangs is the user's, like any other."""
        del self._transfers[transfer.request]
        self._agent.unwatch(transfer.line.fileno())
        transfer.line.close()

    def _exited(self, cgroup: Cgroup) -> None:
        self._lingering = [group for group in (*self._lingering, cgroup) if not group.remove()]


def _next(line: socket.socket) -> bytes:
    """A packet. When the other side ended with something of ours unread, that is told first, and its last word lies behind."""
    try:
        return line.recv(frames.CHUNK + 1)
    except ConnectionResetError:
        return line.recv(frames.CHUNK + 1)
