"""Carries one file into or out of the user's world: a process in there, forked from its pid 1.

The user's root is the only one that it has. So no `..`, no link and no mount leads further than the user could go anyway, and
whatever blocks blocks this process alone. It talks to the agent over a SOCK_SEQPACKET pair, one letter and a payload in each
packet:

    agent to courier   D data | C all of it was sent
    courier to agent   D data | R JSON: the result, or an error

Everything it needs is imported before the user's world is entered: nothing of ours lies in there.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat

from instavm_guest import frames
from instavm_guest.frames import Message

PROGRAM = "\0instavm-courier"
"""What the spawner is asked to start: no program can have that name."""
BASE = "/app"
"""What a relative path starts from."""
DATA = b"D"
COMMIT = b"C"
RESULT = b"R"
_NOT_FILES = ("/proc", "/sys")
"""File systems whose files are questions to the kernel and not files."""
_CODES = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_found",
    errno.EISDIR: "is_directory",
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
}


class Refused(Exception):
    """`code` is one of those that the host knows."""

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        super().__init__(text)


def serve(task: str) -> None:
    """Carry out one transfer over descriptor 0 and end the process. `task`: JSON of `kind`, `path` and, to put, `name`."""
    line = socket.socket(fileno=0)
    try:
        ask = json.loads(task)
        result = _put(line, ask["path"], ask["name"]) if ask["kind"] == "put" else _get(line, ask["path"])
    except Refused as exc:
        result = {"code": exc.code, "message": str(exc)}
    except OSError as exc:
        result = {"code": _CODES.get(exc.errno or 0, "file"), "message": os.strerror(exc.errno or errno.EIO)}
    except BaseException as exc:
        result = {"code": "file", "message": f"{type(exc).__name__}: {exc}"}
    try:
        line.send(RESULT + json.dumps({name: _as_text(value) for name, value in result.items()}).encode())
    finally:
        os._exit(0)


def _put(line: socket.socket, path: str, name: str) -> Message:
    """All or nothing: what was there stays as it was until the last byte has come."""
    target = os.path.join(BASE, path)
    if path.endswith("/") or os.path.isdir(target):
        target = os.path.join(target, name)
    target = os.path.realpath(target)
    try:
        had: os.stat_result | None = os.stat(target)
    except FileNotFoundError:
        had = None
    if had is not None and not stat.S_ISREG(had.st_mode):
        raise _not_a_file(target, had.st_mode)
    if had is not None and had.st_dev in _kernel_devices():
        raise Refused("not_a_file", f"{target} belongs to the kernel")
    folder = os.path.dirname(target)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        raise Refused("not_a_file", f"{folder} is not a directory") from None
    part = os.path.join(folder, f".{os.urandom(8).hex()}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        size = _receive(line, fd)
        if had is not None:
            os.fchmod(fd, stat.S_IMODE(had.st_mode))
            os.fchown(fd, had.st_uid, had.st_gid)
        _into_place(part, target)
    except BaseException:
        os.unlink(part)
        raise
    return {"path": target, "size": size}


def _receive(line: socket.socket, fd: int) -> int:
    size = 0
    while True:
        packet = line.recv(frames.CHUNK + 1)
        kind, data = packet[:1], memoryview(packet)[1:]
        if kind == COMMIT:
            return size
        if kind != DATA:
            raise Refused("file", "the transfer was broken off")
        while data:
            written = os.write(fd, data)
            size += written
            data = data[written:]


def _into_place(part: str, target: str) -> None:
    try:
        os.replace(part, target)
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise
        with open(part, "rb") as source, open(target, "wb") as place:  # a mount point, like /etc/hosts
            while data := source.read(frames.CHUNK):
                place.write(data)
        os.unlink(part)


def _get(line: socket.socket, path: str) -> Message:
    target = os.path.join(BASE, path)
    found = os.stat(target)
    if not stat.S_ISREG(found.st_mode):  # asked before it is opened: opening a device may already do something
        raise _not_a_file(target, found.st_mode)
    fd = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise _not_a_file(target, found.st_mode)
    if found.st_dev in _kernel_devices():
        raise Refused("not_a_file", f"{target} belongs to the kernel")
    size = 0
    while data := os.read(fd, frames.CHUNK):
        line.send(DATA + data)
        size += len(data)
    return {"path": target, "size": size}


def _as_text(value: object) -> object:
    """A path may hold bytes that are no UTF-8; the host takes text only."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _kernel_devices() -> set[int]:
    return {os.stat(place).st_dev for place in _NOT_FILES if os.path.isdir(place)}


def _not_a_file(path: str, mode: int) -> Refused:
    if stat.S_ISDIR(mode):
        return Refused("is_directory", f"{path} is a directory")
    return Refused("not_a_file", f"{path} is not a regular file")
