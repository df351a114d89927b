"""Local files: what an upload reads, and where a download is written, so that a broken one leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import posixpath
import secrets
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

import anyio
import anyio.to_thread

from instavm.client.results import DownloadedFile
from instavm.errors import FileError, InvalidInput

LocalPath = str | os.PathLike[str]

T = TypeVar("T")

PIECE_BYTES: Final = 256 << 10
"""How much of a file is in memory at one time."""
BINARY: Final = getattr(os, "O_BINARY", 0)
"""Only Windows has it, and changes line ends without it."""


class Source:
    """A file that is uploaded, as it was when it was opened: what is appended meanwhile is not part of it.

    size: bytes; None when it cannot be told ahead, as of a pipe, a device or a file under /proc.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        found = os.fstat(file.fileno())
        self.size = found.st_size if stat.S_ISREG(found.st_mode) and found.st_size else None
        self._path = path
        self._file = file
        self._left = self.size

    def read(self) -> bytes:
        """The next piece; empty at the end. Raises: FileError, when it cannot be read or became shorter."""
        try:
            piece = self._file.read(PIECE_BYTES if self._left is None else min(PIECE_BYTES, self._left))
        except OSError as exc:
            raise FileError(f"{self._path} cannot be read: {exc.strerror or exc}") from exc
        if self._left is not None:
            self._left -= len(piece)
            if not piece and self._left:
                raise FileError(f"{self._path} became {self._left} bytes shorter while it was uploaded; nothing was stored")
        return piece


@contextmanager
def source(path: Path) -> Iterator[Source]:
    """Raises: OSError, as `open` does: FileNotFoundError, IsADirectoryError, PermissionError."""
    with path.open("rb") as file:
        yield Source(path, file)


def local_path(given: LocalPath, argument: str) -> Path:
    """Raises: InvalidInput, for what can be no name of a local file."""
    allowed = "the path of a local file, as text or pathlib.Path, not empty and without NUL"
    try:
        text = os.fspath(given)
    except TypeError:
        raise InvalidInput(argument, given, allowed) from None
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidInput(argument, given, allowed)
    return Path(text)


@asynccontextmanager
async def in_threads(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """For an event loop: what opens and closes files may block."""
    entered = await anyio.to_thread.run_sync(manager.__enter__)
    try:
        yield entered
    except BaseException:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(manager.__exit__, *sys.exc_info())
        raise
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(manager.__exit__, None, None, None)


@contextmanager
def landing(remote: str, local: LocalPath | None) -> Iterator[tuple[BinaryIO, DownloadedFile]]:
    """A file to write to, and the result, whose `size` the block sets; the result is complete when the block has ended.

    local None: the content comes into memory. A file appears there under its name when all of it has come, and not
    before; one that is there keeps its mode, and a link goes on being one. A folder takes the file under its remote name. A
    device or a pipe is written to as it is.
    Raises: InvalidInput; OSError of the local place, as `open` does.
    """
    result = DownloadedFile(status="success", filename=remote)
    if local is None:
        memory = io.BytesIO()
        yield memory, result
        result["content"] = memory.getvalue()
        return
    place = local_path(local, "local_path")
    if place.is_dir():
        place = _within(place, remote)
    with _direct(place) if _is_written_through(place) else _aside(Path(os.path.realpath(place))) as file:
        yield file, result
    result["local_path"] = str(place)


def _within(folder: Path, remote: str) -> Path:
    name = posixpath.basename(remote)
    if name in ("", ".", "..") or Path(name).name != name:
        raise InvalidInput("local_path", str(folder), "the name of a file: the remote one is none that a file can have here")
    return folder / name


def _is_written_through(place: Path) -> bool:
    """Devices, pipes, and what only the kernel can lead to: nothing can be put in their place."""
    try:
        if not stat.S_ISREG(place.stat().st_mode):
            return True
    except FileNotFoundError:
        return False
    while place.is_symlink():
        if os.path.realpath(place.parent).startswith("/proc/"):
            return True
        place = place.parent / place.readlink()
    return False


@contextmanager
def _direct(place: Path) -> Iterator[BinaryIO]:
    with place.open("wb") as file:
        yield file


@contextmanager
def _aside(place: Path) -> Iterator[BinaryIO]:
    """Written beside `place` and moved there at the end of the block."""
    was = place.stat() if place.exists() else None
    if was is not None and not os.access(place, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    part = place.with_name(f".instavm-{secrets.token_hex(8)}")
    try:
        number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(place)) from None  # of the place that was asked for, not of `part`
    try:
        with open(number, "wb") as file:  # noqa: PTH123 (by its descriptor)
            yield file
        if was is not None:
            _like(part, was)
        part.replace(place)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _like(part: Path, was: os.stat_result) -> None:
    """Owner and mode of the file that is replaced."""
    if hasattr(os, "chown"):
        with contextlib.suppress(PermissionError):  # only root may give files away
            os.chown(part, was.st_uid, was.st_gid)
    part.chmod(stat.S_IMODE(was.st_mode))
