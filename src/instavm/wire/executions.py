"""`POST /execute`: what is asked, what comes back."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from instavm import limits
from instavm.errors import BadRequest, InvalidInput
from instavm.wire.base import Asked, Wire
from instavm.wire.sessions import Start


def _runnable(command: str) -> str:
    if not command.strip():
        raise ValueError("blank")
    try:
        size = len(command.encode())
    except UnicodeEncodeError:
        raise ValueError("it cannot be written as UTF-8") from None
    if size > limits.COMMAND_BYTES:
        raise ValueError(f"{size} bytes")
    return command


def _known(language: str) -> str:
    language = limits.LANGUAGE_ALIASES.get(language, language)
    if language not in limits.LANGUAGES:
        raise ValueError("unknown language")
    return language


def _default_language(value: object) -> object:
    return "python" if value is None else value


Code = Annotated[str, AfterValidator(_runnable)]
Language = Annotated[str, BeforeValidator(_default_language), AfterValidator(_known)]
TimeoutS = Annotated[
    float,
    Field(strict=True, ge=limits.EXECUTE_TIMEOUT_S_MIN, le=limits.EXECUTE_TIMEOUT_S_MAX, allow_inf_nan=False),
]


class Execute(Asked):
    """One command. It may come as `command` or as `code`, which wins when both are there."""

    command: Code
    session_id: str | None = None
    """None = make a session for it."""
    api_key: SecretStr | None = None
    language: Language = "python"
    timeout: TimeoutS | None = None
    """Seconds of wall clock in the guest; boot is not counted. None = the server's default."""

    @classmethod
    def read(cls) -> frozenset[str]:
        return frozenset({*cls.model_fields, "code"})

    @model_validator(mode="before")
    @classmethod
    def _code_is_command(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        command = given.get("code") if given.get("code") is not None else given.get("command")
        if command is None:
            raise BadRequest("command", None, limits.ALLOWED["command"])
        return {**given, "command": command}

    @model_validator(mode="after")
    def _fits_a_shell(self) -> Self:
        if self.language in limits.SHELLS and "\0" in self.command:
            raise InvalidInput(
                "command", "a shell command with NUL", "for a shell, " + limits.ALLOWED["command"] + ", without NUL"
            )
        return self


class Refusal(Wire):
    """A destination that the sandbox's network refused. The fields are those of an entry of the egress log."""

    name: str | None = None
    address: str | None = None
    port: int
    protocol: str
    rule: str
    count: int
    registry: bool = False


class Execution(Wire):
    """What became of the command. Code that failed is a result too: `exit_code` and `stderr` tell."""

    stdout: str
    stderr: str
    exit_code: int | None = None
    execution_time: float = 0.0
    """Seconds of wall clock in the guest."""
    cpu_time: float = 0.0
    """Seconds."""
    session_id: str | None = None
    language: str | None = None
    timed_out: bool = False
    truncated: bool = False
    reason: str | None = None
    """None = it ended by itself; else what ended it. docs/execute.md lists the words."""
    signal: int | None = None
    """The signal that ended it."""
    peak_memory_bytes: int = 0
    """Largest resident size of one process of it."""
    outputs: list[dict[str, Any]] | None = None
    """Rich outputs, each {MIME type: data}: text as it is, images as base64. Left out by older servers."""
    refused: list[Refusal] | None = None
    """What the sandbox's network refused while the command ran: the first destinations. Left out by older servers."""
    vm_id: str | None = None
    timing: Start | None = None
    """How the sandbox came up; only with the first result that comes out of it."""


class MaybeLate(Execution):
    """The body of an answer that had begun before the result was there.

    code, detail: there is no result, and this is why, as in `wire.errors.Problem`; None = it is a result like any other.
    Clients that don't know them read a result that says so in `stderr`.
    """

    code: str | None = None
    detail: str | None = None
