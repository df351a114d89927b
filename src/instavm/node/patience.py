"""How often package managers in a sandbox try again. Most sandboxes reach no registry, which no retry changes.

By default pip tries six times in 8 s, apt four times in 7 s, npm three times in 70 s, uv four times. Variables hold in every
image, and a file for apt where there is apt; what the image or the user of a sandbox sets goes first.
"""

from __future__ import annotations

from typing import Final

from instavm.contract.executions import Command

RETRIES: Final = {
    "PIP_RETRIES": "1",
    "UV_HTTP_RETRIES": "1",
    "npm_config_fetch_retries": "1",
    "npm_config_fetch_retry_mintimeout": "200",
}
"""Retries, not attempts; milliseconds before npm's."""
_APT_LINES: Final = r'Acquire::Retries "1";\nAcquire::Retries::Delay "false";\n'
APT: Final = Command(
    f"cd /etc/apt/apt.conf.d 2>/dev/null && printf '{_APT_LINES}' >00instavm-retries || true", "sh", 60
)
"""apt has no variable for it. It reads its files in the order of their names, so what another one says of it holds."""
