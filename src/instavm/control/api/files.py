"""Routes of files: upload and download, streamed both ways."""

import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

import anyio
from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError
from starlette.responses import Response, StreamingResponse

from instavm.control.api.description import IN_SANDBOX
from instavm.control.api.here import Here, caller_with
from instavm.control.api.multipart import Form
from instavm.control.api.patience import while_connected
from instavm.errors import BadRequest, InstaVMError
from instavm.wire import files as wire
from instavm.wire.text import parsed
from instavm.wire.validation import refusal

router = APIRouter(tags=["files"])

M = TypeVar("M", bound=BaseModel)

DRAIN_S: Final = 60.0
"""How long the rest of a refused upload is still read."""
LINE: Final = 3 << 14
"""Bytes that become base64 together: a multiple of three, so that the pieces fit together."""

_FORM: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["remote_path", "session_id", "file"],
    "properties": {
        "remote_path": {"type": "string"},
        "session_id": {"type": "string"},
        "file_name": {"type": "string"},
        "recursive": {"type": "string"},
        "file": {"type": "string", "format": "binary"},
    },
}


@router.post(
    "/upload",
    response_model=wire.Uploaded,
    responses=IN_SANDBOX,
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
)
async def upload(request: Request, here: Here) -> wire.Uploaded:
    """Straight into the sandbox. `file` comes last; a directory takes it as `file_name`, else by its own filename."""
    form = Form(request)
    try:
        await form.until_file()
        caller = await caller_with(request, here, form.fields.get("api_key"))
        ask = _checked(wire.Upload, form.fields)
        name = ask.file_name or wire.base_name(form.filename)
        stored = await here.files.put(caller, ask.session_id, ask.remote_path, name, form.chunks())
    except InstaVMError:
        with anyio.move_on_after(DRAIN_S):
            await _drained(form)
        raise
    return wire.Uploaded(remote_path=stored.path, size=stored.size_bytes)


@router.post(
    "/download",
    response_model=wire.Downloaded,
    responses={200: {"content": {wire.RAW: {}}}, **IN_SANDBOX},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                kind: {"schema": wire.Download.model_json_schema()}
                for kind in ("application/x-www-form-urlencoded", "application/json")
            },
        }
    },
)
async def download(request: Request, here: Here) -> Response:
    """One file, as base64 in JSON, or as it is for `Accept: application/octet-stream`."""
    given = await _given(request)
    caller = await caller_with(request, here, given.get("api_key"))
    ask = _checked(wire.Download, given)
    pieces = await here.files.get(caller, ask.session_id, ask.filename)
    first = await while_connected(
        request, anext(pieces, b"")
    )  # before the answer begins: what is refused is refused with a status of its own
    whole = _after(first, pieces)
    if wire.RAW in request.headers.get("accept", ""):
        return StreamingResponse(whole, media_type=wire.RAW)
    return StreamingResponse(_as_json(ask.filename, whole), media_type="application/json")


async def _after(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        if first:
            yield first
        async for piece in rest:
            yield piece


async def _as_json(filename: str, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield b'{"filename": %s, "content": "' % json.dumps(filename).encode()
    size, kept = 0, b""
    async for piece in pieces:
        size += len(piece)
        kept += piece
        if (whole := len(kept) // LINE * LINE) > 0:
            yield base64.b64encode(kept[:whole])
            kept = kept[whole:]
    yield base64.b64encode(kept) if size else b"\\n"
    yield b'", "size": %d}' % size


async def _given(request: Request) -> dict[str, Any]:
    body = await request.body()
    if "json" not in request.headers.get("content-type", ""):
        try:
            return dict(parse_qsl(body.decode(), keep_blank_values=True, errors="strict"))
        except ValueError:
            raise BadRequest("body", "text that is not UTF-8", "a form, or a JSON object") from None
    try:
        given = parsed(body)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise BadRequest("body", "text that is not JSON", "a JSON object")
    return given


def _checked(model: type[M], given: dict[str, Any]) -> M:
    try:
        return model.model_validate(given)
    except ValidationError as exc:
        raise refusal(exc.errors(include_url=False, include_context=False)) from None


async def _drained(form: Form) -> None:
    try:
        await form.drain()
    except InstaVMError:
        return  # what it was refused for matters more than how the rest of it is broken
