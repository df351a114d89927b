"""`GET /v1/users/me`."""

from __future__ import annotations

from instavm.wire.base import Wire


class User(Wire):
    id: str
    email: str | None
    name: str
    is_verified: bool
