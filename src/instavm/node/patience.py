"""How often package managers in a sandbox try again. Most sandboxes reach no registry, which no retry changes.

By default pip tries six times in 8 s, npm three times in 70 s, uv four times. As variables of the sandbox this holds for every
image; what the image or the user of a sandbox sets goes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

RETRIES: Final = {
    "PIP_RETRIES": "1",
    "UV_HTTP_RETRIES": "1",
    "npm_config_fetch_retries": "1",
    "npm_config_fetch_retry_mintimeout": "200",
}
"""Retries, not attempts; milliseconds before npm's."""


def beside(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that an image with this environment does not set itself."""
    return {name: value for name, value in RETRIES.items() if name not in env}
