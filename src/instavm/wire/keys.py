"""API keys over the wire."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from instavm.wire.base import Asked, Timestamp, Wire
from instavm.wire.sessions import or_


class CreateKey(Asked):
    description: Annotated[str, or_(""), Field(max_length=1000)] = ""


class UpdateKey(Asked):
    description: str | None = Field(None, max_length=1000)


class Key(Wire):
    """`prefix` is what may be shown of a key."""

    id: int
    description: str
    prefix: str
    created_at: Timestamp
    last_used_at: Timestamp | None = None


class NewKey(Key):
    """The only answer that ever holds the whole key, under two names."""

    key: str = Field(repr=False)
    api_key: str = Field(repr=False)


class RevokedKey(Wire):
    status: str = "revoked"
    id: int
