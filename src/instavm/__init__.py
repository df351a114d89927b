"""Self-hosted InstaVM sandboxes. `from instavm import InstaVM` is all it takes.

Names are loaded when they are first used: `import instavm` costs next to nothing and loads no server code.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from instavm.version import __version__ as __version__

if TYPE_CHECKING:
    from instavm.client.aio import AsyncInstaVM as AsyncInstaVM
    from instavm.client.results import Execution as Execution
    from instavm.client.sync import InstaVM as InstaVM
    from instavm.errors import AuthenticationError as AuthenticationError
    from instavm.errors import BootFailed as BootFailed
    from instavm.errors import Conflict as Conflict
    from instavm.errors import DiskFull as DiskFull
    from instavm.errors import ExecutionError as ExecutionError
    from instavm.errors import FileError as FileError
    from instavm.errors import FileMissing as FileMissing
    from instavm.errors import ForbiddenError as ForbiddenError
    from instavm.errors import HostNotReady as HostNotReady
    from instavm.errors import InstaVMError as InstaVMError
    from instavm.errors import InvalidInput as InvalidInput
    from instavm.errors import IsolationTooWeak as IsolationTooWeak
    from instavm.errors import NetworkError as NetworkError
    from instavm.errors import NoCapacity as NoCapacity
    from instavm.errors import NotFound as NotFound
    from instavm.errors import OutcomeUnknown as OutcomeUnknown
    from instavm.errors import ProcessEnded as ProcessEnded
    from instavm.errors import ProcessError as ProcessError
    from instavm.errors import ProcessNotFound as ProcessNotFound
    from instavm.errors import QuotaExceededError as QuotaExceededError
    from instavm.errors import RateLimitError as RateLimitError
    from instavm.errors import SessionEnded as SessionEnded
    from instavm.errors import SessionError as SessionError
    from instavm.errors import SessionNotFound as SessionNotFound
    from instavm.errors import SignatureError as SignatureError
    from instavm.errors import UnsupportedOperationError as UnsupportedOperationError

_ERRORS: Final = (
    "AuthenticationError",
    "BootFailed",
    "Conflict",
    "DiskFull",
    "ExecutionError",
    "FileError",
    "FileMissing",
    "ForbiddenError",
    "HostNotReady",
    "InstaVMError",
    "InvalidInput",
    "IsolationTooWeak",
    "NetworkError",
    "NoCapacity",
    "NotFound",
    "OutcomeUnknown",
    "ProcessEnded",
    "ProcessError",
    "ProcessNotFound",
    "QuotaExceededError",
    "RateLimitError",
    "SessionEnded",
    "SessionError",
    "SessionNotFound",
    "SignatureError",
    "UnsupportedOperationError",
)
_HOME: Final = {
    "InstaVM": "instavm.client.sync",
    "AsyncInstaVM": "instavm.client.aio",
    "Execution": "instavm.client.results",
    **dict.fromkeys(_ERRORS, "instavm.errors"),
}
__all__ = ["AsyncInstaVM", "Execution", "InstaVM", *_ERRORS]  # noqa: PLE0604 (all of them are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
