"""The certificates that the operator trusts, trusted inside sandboxes too: put into a template while it is made.

Only those that the image does not have already, in the file that the programs of its distribution read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Final

from instavm.errors import FileError
from instavm.node import files
from instavm.node.agent import Agent

CERTIFICATE: Final = re.compile(rb"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
BUNDLES: Final = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
"""Where families of distributions keep all certificates in one file."""
OWN: Final = (
    "/usr/local/share/ca-certificates/instavm-operator.crt",
    "/etc/pki/ca-trust/source/anchors/instavm-operator.crt",
)
"""Where the same families look for more, when they write that file anew."""
BUNDLE_MAX: Final = 4 << 20
EXTRA_MAX: Final = 100


class Trust:
    """`file`: PEM; None, or one that is not there, adds nothing."""

    def __init__(self, file: Path | None) -> None:
        self._wanted = () if file is None or not file.is_file() else certificates(file.read_bytes())

    def fingerprint(self) -> str:
        return hashlib.sha256(b"\n".join(self._wanted)).hexdigest()

    async def install(self, agent: Agent) -> dict[str, str]:
        """Returns: variables for programs that bring certificates of their own and look at these first.

        Raises as the files API; an image that keeps no certificates gets none.
        """
        for bundle, own in zip(BUNDLES, OWN, strict=True) if self._wanted else ():
            try:
                there = await _read(agent, bundle)
            except FileError:
                continue  # another family of distributions
            have = set(certificates(there))
            missing = [one for one in self._wanted if one not in have]
            extra = b"".join(one + b"\n" for one in missing[:EXTRA_MAX])
            if not extra:
                return {}
            await _write(agent, own, extra)
            await _write(agent, bundle, there.rstrip() + b"\n" + extra)
            return {"NODE_EXTRA_CA_CERTS": own, "REQUESTS_CA_BUNDLE": bundle, "SSL_CERT_FILE": bundle}
        return {}


def certificates(pem: bytes) -> tuple[bytes, ...]:
    """Each in one spelling, in order, once."""
    return tuple(dict.fromkeys(one.replace(b"\r", b"") for one in CERTIFICATE.findall(pem)))


async def _read(agent: Agent, path: str) -> bytes:
    data = bytearray()
    async with aclosing(files.get(agent, path)) as pieces:
        async for piece in pieces:
            data += piece
            if len(data) > BUNDLE_MAX:
                raise FileError(f"{path} is longer than {BUNDLE_MAX} bytes")
    return bytes(data)


async def _write(agent: Agent, path: str, data: bytes) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield data

    await files.put(agent, path, "", content())
