"""`GET /v1/users/me`."""

from __future__ import annotations

from pydantic import Field

from instavm.wire.base import Wire


class User(Wire):
    id: str
    email: str | None
    name: str
    is_verified: bool


class SshKeys(Wire):
    """Always empty so far: sandboxes are not reached by SSH, so no key can be added."""

    keys: list[str] = Field(default_factory=list)
