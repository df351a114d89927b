"""How a transport reaches the server: by which way, through which proxy, and whom it believes."""

from __future__ import annotations

import functools
import ipaddress
import ssl
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from instavm.errors import NetworkError

LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=None)
"""Connections stay open for as long as the client does: that also tells an embedded server that it is in use.
"""

K = TypeVar("K", httpx.HTTPTransport, httpx.AsyncHTTPTransport)


def transport(kind: type[K], base_url: str | None, socket: Path | None) -> K:
    """socket: of the embedded server; None = the server at `base_url`.

    Raises: NetworkError, when what the environment says of proxies or certificates is of no use.
    """
    try:
        return kind(**_how(str(base_url)) if socket is None else _here(socket))
    except (OSError, ValueError, ImportError) as exc:
        raise NetworkError(f"no connection to {base_url or socket} can be made ready: {exc}") from exc


def _here(socket: Path) -> dict[str, Any]:
    return {"uds": str(socket), "verify": False, "limits": LIMITS}


def _how(url: str) -> dict[str, Any]:
    return {"verify": _verify(url), "limits": LIMITS, "proxy": _proxy(url)}


def _verify(url: str) -> bool | ssl.SSLContext:
    """Certificates are checked for https://, always. For plain http nothing is loaded to check them with."""
    return True if url.startswith("https://") else no_authorities()


@functools.cache
def no_authorities() -> ssl.SSLContext:
    """Trusts nobody, so that it can be made in no time (loading the authorities takes 20 ms and more).

    For connections without TLS. Should one of them ever come to TLS all the same, it is refused.
    """
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _proxy(url: str) -> str | None:
    """The environment's proxy for this address, if it names one. Proxies are for addresses elsewhere, never for this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if _is_here(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
