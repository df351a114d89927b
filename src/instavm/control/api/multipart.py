"""A multipart form read while it arrives: its text parts first, then its file, piece by piece, never as a whole."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from instavm import limits
from instavm.errors import BadRequest, InvalidInput, NetworkError, TooLarge
from instavm.wire.files import from_part_filename

FILE: Final = "file"


class Form:
    """`fields` holds the text parts that came before the file; whatever comes after it is passed over."""

    def __init__(self, request: Request) -> None:
        self._stream = request.stream()
        self._parser = _parser(request, self)
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._chunks: deque[bytes] = deque()
        self._state = "text"
        self._text_bytes = 0
        self._header = [b"", b""]
        self._headers: dict[str, str] = {}
        self._name = ""
        self._value = b""

    async def until_file(self) -> None:
        """Read the text parts. Raises: BadRequest, when no file follows or what comes is no form; TooLarge."""
        while self._state == "text":
            if not await self._more():
                raise BadRequest(FILE, None, limits.ALLOWED[FILE])

    async def chunks(self) -> AsyncIterator[bytes]:
        """The file. Raises: BadRequest, NetworkError, when it is cut off."""
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self._state != "file":
                return
            if not await self._more():
                raise BadRequest("body", "a form without an end", limits.ALLOWED["form"])

    async def drain(self) -> None:
        """Read on without looking, so that the answer finds a client that has finished sending."""
        self._chunks.clear()
        while await self._more():
            self._chunks.clear()

    async def _more(self) -> bool:
        try:
            data = await anext(self._stream, b"")
            if data:
                self._parser.write(data)
            return bool(data)
        except MultipartParseError as exc:
            raise BadRequest("body", f"not a form: {exc}", limits.ALLOWED["form"]) from None
        except ClientDisconnect:
            raise NetworkError("the client went away during the upload") from None

    # what the parser calls, in the order of the form

    def on_part_begin(self) -> None:
        self._headers, self._header, self._value = {}, [b"", b""], b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header[0] += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header[1] += data[start:end]

    def on_header_end(self) -> None:
        # Latin-1 keeps the bytes as they are, also through `parse_options_header`: their encoding is told later
        self._headers[self._header[0].decode("latin-1").lower()] = self._header[1].decode("latin-1")
        self._header = [b"", b""]

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", ""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._state == "text" and self._name == FILE:
            self.filename = from_part_filename(options.get(b"filename", b""))
            self._state = "file"

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._state == "file":
            self._chunks.append(data[start:end])
        elif self._state == "text":
            self._count(end - start)
            self._value += data[start:end]

    def on_part_end(self) -> None:
        if self._state == "file":
            self._state = "over"
        elif self._state == "text":
            try:
                self.fields[self._name] = self._value.decode()
            except UnicodeDecodeError:
                raise InvalidInput(self._name, self._value, "text in UTF-8") from None

    def _count(self, size: int) -> None:
        self._text_bytes += size
        if self._text_bytes > limits.FORM_BYTES:
            raise TooLarge("form", f"{self._text_bytes} bytes of text", limits.ALLOWED["form"])


def _parser(request: Request, form: Form) -> MultipartParser:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise BadRequest("body", kind.decode("latin-1") or "without a type", limits.ALLOWED["form"])
    return MultipartParser(
        boundary,
        {
            "on_part_begin": form.on_part_begin,
            "on_header_field": form.on_header_field,
            "on_header_value": form.on_header_value,
            "on_header_end": form.on_header_end,
            "on_headers_finished": form.on_headers_finished,
            "on_part_data": form.on_part_data,
            "on_part_end": form.on_part_end,
        },
    )
