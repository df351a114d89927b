"""Is the server there, and of which version."""

from __future__ import annotations

from instavm.client.calls.base import Call, reading
from instavm.wire.health import Health


def health() -> Call[Health]:
    return Call("GET", "/health", reading(Health), answer_s=10.0)
