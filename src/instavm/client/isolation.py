"""Checking an isolation report without asking anybody: was it signed by this host, and is it as it was?"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from instavm.errors import SignatureError, UnsupportedOperationError
from instavm.wire.isolation import signed_bytes


def verify(document: Mapping[str, Any], public_key: str) -> Mapping[str, Any]:
    """The report in `document` (as `get_isolation` returns it), if the host whose key (PEM) is given has signed it.

    Raises: SignatureError; UnsupportedOperationError (the library for it is not installed).
    """
    try:
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 (an extra, not needed for sandboxes)
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
        from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        raise UnsupportedOperationError("checking a signature needs: pip install 'instavm-selfhosted[server]'") from exc
    try:
        key = load_pem_public_key(public_key.encode())
    except ValueError as exc:
        raise SignatureError(f"the public key can't be read: {exc}") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError("the public key is not an Ed25519 key")
    try:
        report: Mapping[str, Any] = document["report"]
        key.verify(base64.b64decode(document["signature"], validate=True), signed_bytes(report))
    except (KeyError, TypeError, ValueError, binascii.Error) as exc:
        raise SignatureError(f"this is no isolation report: {exc!r}") from exc
    except InvalidSignature:
        raise SignatureError("the report was not signed with this key, or was altered since") from None
    return report
