"""What every model of the wire has in common."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, PlainSerializer, model_validator

from instavm import limits
from instavm.errors import InvalidInput
from instavm.wire.text import flaw

PROTOCOL: Final = 1
"""Raised when client and embedded server can no longer work together. Told by `GET /health`."""


class Wire(BaseModel):
    """Frozen; unknown fields are ignored both ways: old clients meet new servers, new clients old ones."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Asked(Wire):
    """What a client sends. Raises InvalidInput, which names the field and never its value: for text that is no Unicode, numbers
    that are not finite, values nested too deep.
    """

    @model_validator(mode="before")
    @classmethod
    def _writable(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if name in cls.read() and (found := flaw(value)) is not None:
                raise InvalidInput(name, found, limits.ALLOWED.get(name, "text of whole characters, finite numbers"))
        return given

    @classmethod
    def read(cls) -> frozenset[str]:
        """The names that count; others are ignored, whatever they hold."""
        return frozenset(cls.model_fields)


def to_text(moment: datetime) -> str:
    """UTC, and it starts with `YYYY-MM-DDTHH:MM:SS` because clients compare it as text."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


Timestamp = Annotated[datetime, PlainSerializer(to_text, return_type=str, when_used="json")]
