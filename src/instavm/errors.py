"""Everything that can go wrong, once. `control.api.errors` maps it to HTTP, `client.errors` maps it back.

InstaVMError
├── InvalidInput            a value the caller sent is refused: names the field, the value and what is allowed
│   ├── BadRequest          the request cannot be read: something essential is missing or malformed
│   └── TooLarge            the request is longer than the server reads
├── AuthenticationError     no key, or a wrong one
├── ForbiddenError          known, but not allowed
│   └── QuotaExceededError  a limit of the account
├── SessionError            something about a session
│   ├── SessionNotFound
│   ├── SessionEnded        killed: it will never run code again
│   └── SessionSuspended    at rest, and nobody said that a call may wake it: resume it first
├── ExecutionError          the code could not be run (code that ran and failed is a result, not an error)
│   └── OutcomeUnknown      the sandbox was lost on the way: the code may or may not have run
├── FileError               a file in a sandbox cannot be read or written: a directory, a device, no permission
│   └── FileMissing            there is no such file
├── ProcessError            something about a process in a sandbox: its stdin is closed, or full
│   ├── ProcessNotFound     there is none of this id in the session's sandbox
│   └── ProcessEnded        it has ended, and takes neither input nor signals
├── Conflict                not now: it contradicts an earlier request, or what the thing is busy with
├── SnapshotError           a snapshot that is no use: not ready yet, or its build failed
├── NotFound                there is no such thing, or it is somebody else's
├── RateLimitError          try again later
│   └── NoCapacity          the host is full
├── HostNotReady            this host lacks something: says what, and how to get it
│   ├── NodeUnresponsive       the process that runs the sandboxes does not answer: they are kept, try again later
│   ├── ServerStopping         the server is about to end and begins nothing any more: repeat the call at the next one
│   └── IsolationTooWeak       it can't confine a sandbox as strongly as was asked for; none was started
├── BootFailed              the sandbox did not come up; nothing of it is left
│   ├── CorruptTemplate     a saved template does not match its checksum; it is set aside and rebuilt
│   └── CorruptSnapshot     what was saved is cut off, altered, or made by another VMM, kernel or CPU: it is not run
├── DiskFull                the host's disk, or the sandbox's own: the text says which
├── GuestProtocolError      the guest sent what the protocol does not allow; its sandbox is ended
├── SignatureError          what is said to be signed by a host was not signed by it, or was altered
├── NetworkError            the server could not be reached or did not answer (client side)
└── UnsupportedOperationError
"""

from __future__ import annotations

import pickle
import reprlib
from typing import Any, TypeVar

E = TypeVar("E", bound="InstaVMError")


class InstaVMError(Exception):
    """What a caller may want to catch. `code` is for programs and stays; the text is for people.

    Errors can be pickled and copied, whatever their constructors take: they cross the processes of a pool whole.
    """

    code = "internal"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self._state())

    def __copy__(self: E) -> E:
        return _restored(type(self), self.args, vars(self))

    def _state(self) -> dict[str, Any]:
        """The attributes, all of which can be pickled: one that cannot be is represented by its text."""
        return {name: value if _picklable(value) else repr(value) for name, value in vars(self).items()}


def _restored(kind: type[E], args: tuple[Any, ...], state: dict[str, Any]) -> E:
    """An error as it was, made without its constructor."""
    exc = kind.__new__(kind, *args)
    exc.args = args
    vars(exc).update(state)
    return exc


def _picklable(value: object) -> bool:
    if value is None or isinstance(value, str | int | float):
        return True
    try:
        pickle.dumps(value)
    except Exception:  # whatever the value's own code raises
        return False
    return True


class InvalidInput(InstaVMError):
    """A value is refused. `field` is its name on the wire, `allowed` says in words what would be accepted."""

    code = "invalid_input"

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(f"{field}: {_short(value)} is not allowed; allowed: {allowed}")


class BadRequest(InvalidInput):
    """The request cannot be understood at all: neither `command` nor `code`, or an id that is no id."""

    code = "bad_request"


class TooLarge(InvalidInput):
    """The request's body is longer than the server reads."""

    code = "too_large"


class AuthenticationError(InstaVMError):
    code = "unauthenticated"


class ForbiddenError(InstaVMError):
    code = "forbidden"


class QuotaExceededError(ForbiddenError):
    code = "quota_exceeded"


class SessionError(InstaVMError):
    code = "session"


class SessionNotFound(SessionError):
    code = "session_not_found"


class SessionEnded(SessionError):
    code = "session_ended"


class SessionSuspended(SessionError):
    code = "session_suspended"


class ExecutionError(InstaVMError):
    code = "execution"


class OutcomeUnknown(ExecutionError):
    """The link broke after the code was sent: it may or may not have run. Never retried for the caller."""

    code = "outcome_unknown"


class FileError(InstaVMError):
    code = "file"


class FileMissing(FileError):
    code = "file_not_found"


class ProcessError(InstaVMError):
    code = "process"


class ProcessNotFound(ProcessError):
    code = "process_not_found"


class ProcessEnded(ProcessError):
    code = "process_ended"


class NotFound(InstaVMError):
    code = "no_such_thing"


class Conflict(InstaVMError):
    code = "conflict"


class SnapshotError(InstaVMError):
    code = "snapshot"


class RateLimitError(InstaVMError):
    """`retry_after_s`: seconds after which it is worth trying again; None when nobody can tell."""

    code = "rate_limited"

    def __init__(self, text: str, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(text)


class NoCapacity(RateLimitError):
    code = "no_capacity"


class HostNotReady(InstaVMError):
    code = "host_not_ready"


class NodeUnresponsive(HostNotReady):
    """The node's process does not answer. Its sandboxes are kept; what was asked for may or may not have happened."""

    code = "node_unresponsive"


class ServerStopping(HostNotReady):
    code = "server_stopping"


class IsolationTooWeak(HostNotReady):
    code = "isolation_too_weak"


class BootFailed(InstaVMError):
    """`console`: the last lines of the guest's serial console, where there are any."""

    code = "boot_failed"
    console = ""


class CorruptTemplate(BootFailed):
    code = "corrupt_template"


class CorruptSnapshot(BootFailed):
    code = "corrupt_snapshot"


class DiskFull(InstaVMError):
    code = "disk_full"


class GuestProtocolError(InstaVMError):
    code = "guest_protocol"


class SignatureError(InstaVMError):
    code = "bad_signature"


class NetworkError(InstaVMError):
    code = "network"


class UnsupportedOperationError(InstaVMError):
    code = "unsupported"


_REPR = reprlib.Repr()
"""Follows values no deeper and no further than is shown of them."""
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200


def _short(value: object, limit: int = 80) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
