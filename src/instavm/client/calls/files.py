"""Calls that move files. Their bytes are not in here: the transport takes them from, and gives them to, who has them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final

from instavm.client.calls.base import Call, ask, reading
from instavm.client.results import UploadedFile
from instavm.wire import files as wire

STALL_S: Final = 300.0
"""Longest pause on the way, and longest wait until the sandbox is there."""


@dataclass(frozen=True, slots=True)
class Around:
    """What goes before and after a file's bytes, and the type of the whole."""

    head: bytes
    tail: bytes
    content_type: str


def upload(session_id: str, local: PurePath, remote: str) -> tuple[Call[UploadedFile], Around]:
    """Of the local path only the last component is sent, for a `remote` that is a directory. Raises: InvalidInput."""
    given = ask(wire.Upload, remote_path=remote, session_id=session_id)
    boundary = secrets.token_hex(16)
    fields = {"remote_path": given.remote_path, "session_id": given.session_id}
    text = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    name = local.name.translate(_ESCAPED)
    text += f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    read = reading(wire.Uploaded)
    call = Call(
        "POST",
        "/upload",
        lambda raw: UploadedFile(read(raw).model_dump(mode="json")),
        answer_s=STALL_S,
        repeatable=False,
    )
    around = Around(
        text.encode("utf-8", "replace"),
        f"\r\n--{boundary}--\r\n".encode(),
        f"multipart/form-data; boundary={boundary}",
    )
    return call, around


def download(session_id: str, remote: str) -> Call[bytes]:
    """Raises: InvalidInput."""
    given = ask(wire.Download, filename=remote, session_id=session_id)
    body = given.model_dump_json(exclude_unset=True).encode()
    return Call("POST", "/download", lambda raw: raw, body, answer_s=STALL_S)


_ESCAPED: Final = {ord('"'): "%22", ord("\r"): "%0D", ord("\n"): "%0A"}
