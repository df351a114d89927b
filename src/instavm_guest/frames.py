"""Frames between host and guest: one plain file that both sides share. docs/protocol.md is the authority.

A frame is a 12-byte header and a payload. The header, in network byte order:

    magic u8 = 0xA5 | kind u8 | reserved u16 = 0 | request u32 | length u32

`request` ties answers to the question they answer; 0 belongs to none. Control kinds carry one JSON object in UTF-8;
STDOUT, STDERR, DATA and CONTENT carry raw bytes; EXECUTE and RAN, which every command needs, have a fixed shape: to an
emulated guest a JSON object more costs 0.1 ms and more.
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

Message = dict[str, Any]
"""A JSON object. Whoever reads a field of it checks it."""

PROTOCOL = 2
MAGIC = 0xA5
HEADER = struct.Struct("!BBHII")

# host to guest
CONFIGURE = 1  # once per template: what the image asks for
IDENTIFY = 2  # once per restore, before anything else: be someone of your own
EXECUTE = 3
CANCEL = 4
REST = 5  # once per template: it is about to be saved
SYNC = 7  # another server takes up the line: answer with the same token, whatever was half-sent before
STAGE_ENV = 6  # variables for everything that starts from now on
FREEZE = 8  # let nobody write to the disk; ends by itself after seconds
THAW = 9
PROCESS = 10  # something about a process that runs in the background
CLOCK = 11  # what time it is; never answered
ASSIGN = 12  # some time after IDENTIFY, before anybody's code: whose this is, and what time
# about files; their kinds lie above all others, so that one comparison tells them apart
PUT = 32
GET = 33
DATA = 34  # bytes for the file
COMMIT = 35  # all of it was sent
CREDIT = 36  # so many more bytes of the file may be sent
# guest to host
HELLO = 16
STDOUT = 17
STDERR = 18
DONE = 19  # the last answer to a request, but for EXECUTE
FAILED = 20  # the last answer to a request that could not be carried out
SYNCED = 21
OUTPUT = 22  # a piece of a rich output: one byte, 1 for the last piece, then bytes of JSON
RAN = 23  # the last answer to EXECUTE: how it ended
CONTENT = 48  # bytes of the file
TAKEN = 49  # so many bytes of DATA have left the agent's memory

FROM_HOST = frozenset(
    {
        *(CONFIGURE, IDENTIFY, EXECUTE, CANCEL, REST, SYNC, STAGE_ENV, FREEZE, THAW, PROCESS, CLOCK, ASSIGN),
        *(PUT, GET, DATA, COMMIT, CREDIT),
    }
)
FROM_GUEST = frozenset({HELLO, STDOUT, STDERR, DONE, FAILED, OUTPUT, SYNCED, RAN, CONTENT, TAKEN})

HOST_PAYLOAD_MAX = 8 << 20
"""Largest payload the host sends: a message of 1 MiB may grow sixfold as JSON."""
GUEST_PAYLOAD_MAX = 128 << 10
"""Largest payload the guest may send; a longer stream is cut into several frames."""
CHUNK = 64 << 10

LANGUAGES = ("python", "javascript", "bash", "sh")
REASONS = (
    None,
    "timeout",
    "cancelled",
    "interpreter_crashed",
    "interpreter_missing",
    "oom",
    "pids",
    "disk_full",
)
"""Why a program or a cell ended, other than by itself. Both travel as their place in here."""
CUT, RESTARTED = 1, 2
"""Flags of an end: outputs were left out; the interpreter, with all its variables, was lost."""
_EXECUTE = struct.Struct("!BIII")
_END = struct.Struct("!BBiddQ")


# json.loads and json.dumps look for white space and build a coder at each call; a guest pays for every step of that.
_decode = json.JSONDecoder().raw_decode
_encode = json.JSONEncoder(separators=(",", ":")).encode


class FrameError(ValueError):
    """The other side sent what the protocol does not allow. The link cannot be used any more."""


def encode(kind: int, request: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(MAGIC, kind, 0, request, len(payload)) + payload


def encode_json(kind: int, request: int, message: Message) -> bytes:
    return encode(kind, request, json_payload(message))


def json_payload(message: Message) -> bytes:
    return _encode(message).encode()


def decode_json(payload: bytes) -> Message:
    """Raises FrameError for anything but one JSON object."""
    try:
        text = payload.decode()
        message, end = _decode(text)
    except (ValueError, RecursionError) as exc:
        raise FrameError(f"payload is not JSON: {exc}") from None
    if end != len(text) or not isinstance(message, dict):
        raise FrameError("payload is not a JSON object")
    return message


def execute_payload(language: str, timeout_ms: int, code: str, env: Message, task: str | None) -> bytes:
    """`task`: the name under which it runs once."""
    text, more = code.encode("utf-8", "surrogatepass"), json_payload(env) if env else b""
    sizes = _EXECUTE.pack(LANGUAGES.index(language), timeout_ms, len(text), len(more))
    return b"".join((sizes, text, more, (task or "").encode()))


def read_execute(payload: bytes) -> tuple[str, int, bytes, Message, str]:
    """(language, timeout in ms, code, environment, task or ""). Only of what the host sent, which is not lied to by itself."""
    language, timeout_ms, code_size, env_size = _EXECUTE.unpack_from(payload)
    env = _EXECUTE.size + code_size
    task = env + env_size
    return (
        LANGUAGES[language],
        timeout_ms,
        payload[_EXECUTE.size : env],
        decode_json(payload[env:task]) if env_size else {},
        payload[task:].decode(),
    )


class End(NamedTuple):
    """What became of a program or a cell. A negative `exit_code` is the signal that ended it."""

    flags: int
    reason: str | None
    exit_code: int
    wall_s: float
    cpu_s: float
    peak_kib: int


def end_payload(exit_code: int, wall_s: float, cpu_s: float, peak_kib: int, reason: str | None, flags: int = 0) -> bytes:
    return _END.pack(flags, REASONS.index(reason), exit_code, wall_s, cpu_s, peak_kib)


def cut(payload: bytes) -> bytes:
    """The same end, of which outputs were left out."""
    return bytes([payload[0] | CUT]) + payload[1:]


def read_end(payload: bytes) -> End:
    """Its numbers are any that fit. Raises FrameError: it is none."""
    try:
        flags, reason, exit_code, wall_s, cpu_s, peak_kib = _END.unpack(payload)
        return End(flags, REASONS[reason], exit_code, wall_s, cpu_s, peak_kib)
    except (struct.error, IndexError):
        raise FrameError(f"{payload[:40]!r} tells no end") from None


class Decoder:
    """Bytes in, whole frames out. Holds at most one frame and what was read behind it.

    What belongs to a frame that is not whole yet is only collected; it is put together once, when the rest is there.
    """

    def __init__(self, kinds: frozenset[int], payload_max: int) -> None:
        self._kinds = kinds
        self._payload_max = payload_max
        self._pieces: list[bytes] = []
        self._size = 0
        self._needed = HEADER.size

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Every frame that `data` completes, as (kind, request, payload). Raises FrameError."""
        if self._pieces or len(data) < self._needed:
            self._pieces.append(data)
            self._size += len(data)
            if self._size < self._needed:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
        frames: list[tuple[int, int, bytes]] = []
        start, end = 0, len(data)
        self._needed = HEADER.size
        while end - start >= HEADER.size:
            kind, request, length = self._header(data, start)
            body = start + HEADER.size
            if end - body < length:
                self._needed += length
                break
            start = body + length
            frames.append((kind, request, data[body:start]))
        self._size = end - start
        if start < end:
            self._pieces.append(data[start:])
        return frames

    def _header(self, data: bytes, start: int) -> tuple[int, int, int]:
        magic, kind, reserved, request, length = HEADER.unpack_from(data, start)
        if magic != MAGIC or reserved != 0:
            raise FrameError(f"bad magic {magic:#x} or reserved field {reserved}")
        if kind not in self._kinds:
            raise FrameError(f"kind {kind} is not allowed in this direction")
        if length > self._payload_max:
            raise FrameError(f"payload of {length} bytes; at most {self._payload_max} are allowed")
        return kind, request, length
