"""Files in a folder that a VMM may write to: what lies there under a name may be a link that a hostile VMM has planted.

Nothing in such a folder is opened, connected to or given other rights by its name alone: it is opened without following links,
looked at, and used by its descriptor. As root, the server could otherwise be led to any file or socket of the host.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instavm.errors import BootFailed


@contextmanager
def socket_at(path: Path) -> Iterator[str]:
    """Another path of the socket at `path`, which is still the same one when the name has become another's.

    Raises OSError: there is none, or something else lies there.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise FileNotFoundError(f"{path} is no socket")
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def take(path: Path, final: Path) -> None:
    """Make the plain file at `path` the server's own, as `final`, in a folder of the server's. Raises BootFailed, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        made = os.fstat(fd)
        if not stat.S_ISREG(made.st_mode) or made.st_nlink != 1:
            raise BootFailed(f"{path.name}: the VMM made something else than a file")
        os.fchown(fd, os.geteuid(), os.getegid())
        os.fchmod(fd, 0o600)
        path.rename(final)
        moved = final.lstat()
        if (moved.st_dev, moved.st_ino) != (made.st_dev, made.st_ino):
            final.unlink()
            raise BootFailed(f"{path.name}: the VMM put something else in its place")
    finally:
        os.close(fd)


def make_folders(top: Path, *names: str) -> Path:
    """Folders one below the other, under one of the server's. Raises FileExistsError: whatever lies there, it is not ours."""
    if not stat.S_ISDIR(top.lstat().st_mode):
        raise FileExistsError(errno.EEXIST, "it is no folder", str(top))
    for name in names:
        top = top / name
        top.mkdir(mode=0o755)
    return top


def make_empty(path: Path) -> None:
    """A new file, for something to be put in its place. Raises FileExistsError."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
