"""What every model of the wire has in common."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, PlainSerializer

PROTOCOL: Final = 1
"""Raised when client and embedded server can no longer work together. Told by `GET /health`."""


class Wire(BaseModel):
    """Frozen; unknown fields are ignored both ways: old clients meet new servers, new clients old ones."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def to_text(moment: datetime) -> str:
    """UTC, and it starts with `YYYY-MM-DDTHH:MM:SS` because clients compare it as text."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


Timestamp = Annotated[datetime, PlainSerializer(to_text, return_type=str, when_used="json")]
