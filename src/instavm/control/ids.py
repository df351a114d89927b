"""Names and keys that control hands out."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from typing import Final

ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
"""Base32, lower case: safe in a DNS label, a user name and an interface name."""
VM_ID_LENGTH: Final = 10
"""50 random bits; with `vm-` in front it still fits into the 15 bytes of an interface name."""
KEY_PREFIX: Final = "instavm_sk_"


def new_session_id() -> str:
    return str(uuid.uuid4())


def new_vm_id() -> str:
    """`vm-` and ten letters: never a UUID, because clients tell sessions from VMs by that."""
    return "vm-" + "".join(secrets.choice(ALPHABET) for _ in range(VM_ID_LENGTH))


def new_snapshot_id() -> str:
    return "snap-" + "".join(secrets.choice(ALPHABET) for _ in range(VM_ID_LENGTH))


def new_task_id() -> str:
    return "tsk_" + secrets.token_hex(12)


def new_process_id() -> str:
    return "prc_" + secrets.token_hex(8)


def new_key() -> str:
    """An API key with 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def key_hash(key: str) -> str:
    """What is stored of a key. A plain hash is enough: the key is random, so there is nothing to guess."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
