"""Where log lines go. Only entry points call this."""

from __future__ import annotations

import logging
import logging.handlers
import os
from io import TextIOWrapper
from pathlib import Path
from typing import Final

FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FILE_BYTES: Final = 4 << 20
"""Size at which the file is put aside; one older file is kept."""


class _PrivateFile(logging.handlers.RotatingFileHandler):
    def _open(self) -> TextIOWrapper:
        file = open(self.baseFilename, self.mode, encoding=self.encoding, opener=_private)  # noqa: SIM115
        assert isinstance(file, TextIOWrapper)
        return file


def to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format=FORMAT)


def to_file(path: Path) -> None:
    """Log to `path`, mode 0600, in bounded size."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = _PrivateFile(path, maxBytes=FILE_BYTES, backupCount=1, encoding="utf-8")
    logging.basicConfig(level=logging.INFO, format=FORMAT, handlers=[handler])


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
