"""What a clone must not share with its template or its siblings, made fresh on the host for every restore."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Mapping


def fresh(hostname: str, env: Mapping[str, str]) -> dict[str, object]:
    """The message that makes a clone someone of its own; contains secrets (entropy, env), so never logged."""
    return {
        **assigned(hostname, env),
        "entropy": secrets.token_hex(64),
        "machine_id": secrets.token_hex(16),
        "boot_id": str(uuid.uuid4()),
        "mac": (b"\x02" + secrets.token_bytes(5)).hex(),  # locally administered, of one machine
    }


def assigned(hostname: str, env: Mapping[str, str]) -> dict[str, object]:
    """What is left to be told to a clone that was made someone of its own before it was known for whom; never logged."""
    return {"time_ns": time.time_ns(), "hostname": hostname, "env": dict(env)}
