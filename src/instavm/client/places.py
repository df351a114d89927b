"""Local files: where a download is written, so that a broken one leaves nothing."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from instavm.client.results import DownloadedFile

LocalPath = str | os.PathLike[str]


@contextmanager
def landing(remote: str, local: LocalPath | None) -> Iterator[tuple[BinaryIO, DownloadedFile]]:
    """A file to write to, and the result that is complete when the block has ended.

    local None: the content comes into memory. Else it appears there under its name when all of it has come, and not before.
    """
    result = DownloadedFile(status="success", filename=remote)
    if local is None:
        memory = io.BytesIO()
        yield memory, result
        result["content"] = memory.getvalue()
        result["size"] = len(result["content"])
        return
    place = Path(local)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f".{place.name}.", delete=False) as file:
        try:
            yield cast(BinaryIO, file), result
            file.flush()
            result["size"] = file.tell()
            Path(file.name).chmod(0o666 & ~_umask())
            Path(file.name).replace(place)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    result["local_path"] = str(place)


def _umask() -> int:
    said = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in said.splitlines() if line.startswith("Umask:")), 8)
