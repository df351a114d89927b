"""Files over the wire: `POST /upload`, `POST /download`."""

from __future__ import annotations

import posixpath
from typing import Annotated, Final

from pydantic import AfterValidator, SecretStr

from instavm import limits
from instavm.wire.base import Asked, Wire

RAW: Final = "application/octet-stream"
"""`Accept` this on a download, and the file's bytes come as they are; else they come as base64 in JSON."""


def _sendable(path: str) -> str:
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise ValueError("it cannot be written as UTF-8") from None
    if not path or "\0" in path or size > limits.PATH_BYTES:
        raise ValueError("empty, too long, or with a NUL")
    return path


FilePath = Annotated[str, AfterValidator(_sendable)]


class Upload(Asked):
    """The text parts of an upload; the part `file` comes last."""

    remote_path: FilePath
    session_id: str


class Uploaded(Wire):
    """`remote_path` is where the file lies now, absolute."""

    status: str = "success"
    remote_path: str
    size: int


class Download(Asked):
    """As a form or as JSON. A relative `filename` starts at /app."""

    filename: FilePath
    session_id: str
    api_key: SecretStr | None = None


class Downloaded(Wire):
    """`content` is base64; of an empty file it is a newline, since an empty string means something else to clients."""

    filename: str
    content: str
    size: int


def base_name(filename: str | None) -> str:
    """The last component of what a client calls its file: the only part of it that is ever used."""
    name = posixpath.basename((filename or "").replace("\\", "/"))
    return name if name not in ("", ".", "..") and "\0" not in name else "upload"
