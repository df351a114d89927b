"""What confines a sandbox, over the wire: a report and the signature of the host that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from instavm.wire.base import Wire


class Isolation(Wire):
    """`GET /v1/vms/{id}/isolation`.

    `report` is read from the running system when it is asked for. `signature` (base64) is Ed25519 over `signed_bytes(report)`.
    `public_key` (PEM) says which key signed; whether that is your host's you must know from the host (`instavm isolation key`).
    """

    report: dict[str, Any]
    signature: str
    public_key: str
    algorithm: str = "ed25519"


def signed_bytes(report: Mapping[str, Any]) -> bytes:
    """A report in the one spelling that is signed: JSON, keys sorted, no spaces, ASCII."""
    return json.dumps(report, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
