"""What a client is told: by its arguments, else by the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from instavm.client.calls import sessions
from instavm.errors import AuthenticationError, InvalidInput
from instavm.wire.sessions import CreateSession


@dataclass(frozen=True, slots=True)
class Config:
    """`base_url` None = the embedded server of this user."""

    api_key: str = field(repr=False)
    base_url: str | None
    session: CreateSession
    max_retries: int

    @classmethod
    def of(
        cls,
        api_key: str | None,
        base_url: str | None,
        timeout: int,
        max_retries: int,
        *,
        cpu_count: int | None,
        memory_mb: int | None,
        env: Mapping[str, Any] | None,
        metadata: Mapping[str, Any] | None,
        require_isolation: str | None = None,
    ) -> Config:
        """Raises: AuthenticationError (no key), InvalidInput."""
        if not isinstance(api_key, str | None):
            raise AuthenticationError(f"an API key is text, not a {type(api_key).__name__}")
        key = (os.environ.get("INSTAVM_API_KEY") if api_key is None else api_key) or ""
        if not key.strip():
            raise AuthenticationError("an API key is needed: InstaVM(api_key=...) or INSTAVM_API_KEY")
        if not key.isascii() or not key.isprintable():
            raise AuthenticationError("an API key is made of printable ASCII characters only")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise InvalidInput("max_retries", max_retries, "a whole number from 0")
        given = sessions.wanted(
            lifetime_s=timeout,
            cpu_count=cpu_count,
            memory_mb=memory_mb,
            env=env,
            metadata=metadata,
            require_isolation=require_isolation,
        )
        return cls(key.strip(), _address(base_url), given, max_retries)


def _address(base_url: str | None) -> str | None:
    url = os.environ.get("INSTAVM_BASE_URL") if base_url is None else base_url
    if not url:
        return None
    if not _is_address(url):
        raise InvalidInput("base_url", url, "an address that starts with http:// or https://, such as http://host:8000")
    return url.rstrip("/")


def _is_address(url: object) -> bool:
    if not isinstance(url, str) or not url.isprintable():
        return False
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")  # which knows how long the parts of a name may be
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query
    except ValueError:  # a port that is no number, a bracket that is not closed
        return False
