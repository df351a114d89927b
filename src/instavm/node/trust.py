"""The certificates that the operator trusts, trusted inside sandboxes too: put into a template while it is made.

Only those that the image does not have already, by the image's own means, so that every program there finds them.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Final

from instavm.errors import FileError
from instavm.node import files
from instavm.node.agent import Agent
from instavm.sandbox import Command

log = logging.getLogger(__name__)

CERTIFICATE: Final = re.compile(rb"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
BUNDLES: Final = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
BUNDLE_MAX: Final = 4 << 20
EXTRA_MAX: Final = 100
ALL: Final = "/etc/instavm/operator-certificates.pem"
"""For programs that know of no system store."""
INSTALL: Final = f"""
set -e
if command -v update-ca-certificates >/dev/null; then
    folder=/usr/local/share/ca-certificates update=update-ca-certificates bundle={BUNDLES[0]}
elif command -v update-ca-trust >/dev/null; then
    folder=/etc/pki/ca-trust/source/anchors update='update-ca-trust extract' bundle={BUNDLES[1]}
else
    exit 3
fi
mkdir -p $folder
awk -v folder=$folder '/BEGIN/ {{ n++ }} {{ print > (folder "/instavm-operator-" n ".crt") }}' {ALL}
$update >&2
echo $bundle
"""
INSTALL_S: Final = 120.0


class Trust:
    """`file`: PEM; None, or one that is not there, adds nothing."""

    def __init__(self, file: Path | None) -> None:
        self._wanted = () if file is None or not file.is_file() else certificates(file.read_bytes())

    def fingerprint(self) -> str:
        return hashlib.sha256(b"\n".join(self._wanted)).hexdigest()

    async def install(self, agent: Agent) -> dict[str, str]:
        """Returns: variables for programs that bring certificates of their own and look at these first.

        Raises as the files API; an image without the means is told of in the log.
        """
        extra = await self._missing(agent)
        if not extra:
            return {}

        async def content() -> AsyncIterator[bytes]:
            for one in extra:
                yield one + b"\n"

        await files.put(agent, ALL, "", content())
        done = await agent.execute(Command(INSTALL, "sh", INSTALL_S))
        if done.exit_code != 0:
            log.warning("this image does not take the operator's certificates: %s", done.stderr[-500:])
            return {"NODE_EXTRA_CA_CERTS": ALL}
        bundle = done.stdout.split()[-1]
        return {"NODE_EXTRA_CA_CERTS": ALL, "REQUESTS_CA_BUNDLE": bundle, "SSL_CERT_FILE": bundle}

    async def _missing(self, agent: Agent) -> tuple[bytes, ...]:
        """Certificates that the image lacks."""
        if not self._wanted:
            return ()
        have: set[bytes] = set()
        for bundle in BUNDLES:
            try:
                have |= set(certificates(await _read(agent, bundle)))
            except FileError:
                continue  # another family of distributions
        return tuple(one for one in self._wanted if one not in have)[:EXTRA_MAX]


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
