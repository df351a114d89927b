"""Calls that move files. Their bytes are not in here: the transport takes them from, and gives them to, who has them."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final

from instavm import limits
from instavm.client.calls.base import Call, ask, body_of, reading
from instavm.client.results import UploadedFile
from instavm.errors import InvalidInput
from instavm.wire import files as wire

RemotePath = str | os.PathLike[str]
"""A path in a sandbox. A `pathlib.Path` is taken as what it says, with `/` between its parts."""

STALL_S: Final = 300.0
"""Longest pause on the way, and longest wait until the sandbox is there."""


@dataclass(frozen=True, slots=True)
class Around:
    """What goes before and after a file's bytes, and the type of the whole."""

    head: bytes
    tail: bytes
    content_type: str


def upload(session_id: str, local: PurePath, remote: RemotePath) -> tuple[Call[UploadedFile], Around]:
    """Of the local path only the last component is sent, for a `remote` that is a directory. Raises: InvalidInput."""
    path = remote_path(remote, "remote_path")
    name = local.name if local.name and _is_text(local.name) else None
    if name is None and path.endswith("/"):
        raise InvalidInput("file_path", str(local), "a name in UTF-8, or a remote_path that does not end in /")
    given = ask(wire.Upload, remote_path=path, session_id=session_id, file_name=name)
    boundary = secrets.token_hex(16)
    fields = given.model_dump(exclude_none=True)
    text = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    shown = wire.part_filename(name or "upload")
    text += f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{shown}"\r\n\r\n'
    read = reading(wire.Uploaded)
    call = Call(
        "POST",
        "/upload",
        lambda raw: UploadedFile(read(raw).model_dump(mode="json")),
        answer_s=STALL_S,
        repeatable=False,
    )
    around = Around(
        text.encode(),
        f"\r\n--{boundary}--\r\n".encode(),
        f"multipart/form-data; boundary={boundary}",
    )
    return call, around


def download(session_id: str, remote: RemotePath) -> Call[bytes]:
    """Raises: InvalidInput."""
    given = ask(wire.Download, filename=remote_path(remote, "filename"), session_id=session_id)
    body = body_of(given)
    return Call("POST", "/download", lambda raw: raw, body, answer_s=STALL_S)


def remote_path(given: RemotePath, argument: str) -> str:
    """A path in the sandbox, as text: also a `Path` of Windows means folders by its separators. Raises: InvalidInput."""
    try:
        text = given.as_posix() if isinstance(given, PurePath) else os.fspath(given)
    except TypeError:
        raise InvalidInput(argument, given, limits.ALLOWED[argument]) from None
    if not isinstance(text, str):
        raise InvalidInput(argument, given, limits.ALLOWED[argument])
    return text


def _is_text(name: str) -> bool:
    """Names of local files may hold bytes that are no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
