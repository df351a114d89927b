"""Calls about the account."""

from __future__ import annotations

from instavm.client.calls.base import Call, reading
from instavm.client.results import User
from instavm.wire import users as wire


def me() -> Call[User]:
    read = reading(wire.User)
    return Call("GET", "/v1/users/me", lambda raw: User(read(raw).model_dump(mode="json")))
