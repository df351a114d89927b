"""`GET /health`: answers without a key."""

from __future__ import annotations

from instavm.wire.base import Wire


class Health(Wire):
    status: str
    version: str
    protocol: int
    """`wire.base.PROTOCOL` of the server."""
    sandboxes: int | None = None
    """How many are live; told on a private socket only."""
