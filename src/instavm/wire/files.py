"""Files over the wire: `POST /upload`, `POST /download`."""

from __future__ import annotations

import posixpath
from typing import Annotated, Final

from pydantic import AfterValidator, SecretStr, ValidationInfo

from instavm import limits
from instavm.errors import InvalidInput
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


def no_tilde(path: str, info: ValidationInfo) -> str:
    """`~` is a shell's word for a home folder: taken as it stands, it would make a folder of that name."""
    if path == "~" or path.startswith("~/"):
        raise InvalidInput(str(info.field_name), path, "a path without ~: write the home folder out, such as /root/…")
    return path


FilePath = Annotated[str, AfterValidator(_sendable), AfterValidator(no_tilde)]


def _one_component(name: str) -> str:
    if "/" in _sendable(name) or name in (".", "..") or len(name.encode()) > limits.FILE_NAME_BYTES:
        raise ValueError("no name of a file")
    return name


FileName = Annotated[str, AfterValidator(_one_component)]


class Upload(Asked):
    """The text parts of an upload; the part `file` comes last."""

    remote_path: FilePath
    session_id: str
    file_name: FileName | None = None
    """What the file is called in a `remote_path` that is a directory: any Unicode. None = as the part `file` says."""


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


def part_filename(name: str) -> str:
    """`name` as the `filename` of a form's part: what does not fit between quotes is escaped, as browsers do it."""
    return name.translate(_ESCAPED)


def from_part_filename(raw: bytes) -> str:
    """A part's `filename` as its client meant it: UTF-8, else Latin-1, which older clients send."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = raw.decode("latin-1")
    for character, escaped in _ESCAPED.items():
        name = name.replace(escaped, chr(character))
    return name


_ESCAPED: Final = {ord('"'): "%22", ord("\r"): "%0D", ord("\n"): "%0A"}


def base_name(filename: str | None) -> str:
    """The last component of what a client calls its file: the only part of it that is ever used."""
    name = posixpath.basename((filename or "").replace("\\", "/"))
    return name if name not in ("", ".", "..") and "\0" not in name else "upload"
