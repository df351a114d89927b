"""Why the egress filter refuses, and what to do about it, in words for people and programs that read."""

from __future__ import annotations

from typing import Final

from instavm import hostnames

UPSTREAM: Final = frozenset({"unresolved", "unreachable", "proxy"})
"""Rules that are no refusal: the destination is allowed, and does not answer."""
WEB_PORTS: Final = (80, 443)
DNS_PORT: Final = 53

WHY: Final = {
    "packages": "it is a package registry, and allow_package_managers is set",
    "domain": "allowed_domains names it",
    "cidr": "allowed_cidrs holds it",
    "http": "allow_http is set and nothing is listed, so port 80 of every public address is open",
    "https": "allow_https is set and nothing is listed, so port 443 of every public address is open",
    "no_rule": "no rule of the policy in force allows it",
    "port": "the policy in force allows the name, but not on this port",
    "private": "it is, or resolves to, a private or otherwise special address",
    "host": "it is, or resolves to, an address of the host that runs the sandbox",
    "control_plane": "the control plane's own ports are never reached from a sandbox",
    "no_ipv6": "sandboxes have IPv4 only",
    "bad_name": "it is not a host name as DNS and HTTP have it",
    "wrong_name": "the request names another host than the one that was looked up",
    "no_name": "the request does not name the host that it is for",
    "connect": "CONNECT asks for a proxy, and there is none",
    "encrypted_hello": "the TLS handshake hides the name that it is for (encrypted ClientHello)",
    "not_tls_or_http": "on the ports of an allowed name only TLS and HTTP are spoken",
    "connections": "the sandbox has as many connections open as it may",
    "policy_changed": "the policy changed and does not allow it any more",
    "unresolved": "it is allowed, but the name has no address",
    "unreachable": "it is allowed, but nothing answers there",
    "proxy": "it is allowed, but the operator's proxy did not reach it",
}
"""Rule → why it is allowed or refused, as the end of a sentence."""

_OTHER: Final = {
    "bad_name": "use the plain host name: letters, digits, - and _ between dots",
    "wrong_name": "connect to the host that the request is for",
    "no_name": "name the host: a Host header in HTTP, SNI in TLS",
    "connect": "connect to the host directly; no proxy is needed",
    "encrypted_hello": "switch encrypted ClientHello off in the client",
    "not_tls_or_http": "allow the address in allowed_cidrs, where any protocol may be spoken",
    "connections": "close some; the operator sets the limit with INSTAVM_EGRESS_CONNECTIONS",
    "control_plane": "nothing opens these ports",
    "no_ipv6": "use the host's name or its IPv4 address",
    "unresolved": "check the name",
    "unreachable": "check the address and the port",
    "proxy": "ask the operator of the server (INSTAVM_EGRESS_PROXY)",
}


def why(rule: str) -> str:
    """The end of a sentence."""
    return WHY.get(rule, rule)


def remedy(rule: str, name: str | None, address: str | None, port: int, *, registry: bool = False) -> str:
    """How to have it allowed, by SDK and command line, or what to do instead. The fields are those of an entry of the log."""
    if rule in _OTHER:
        return _OTHER[rule]
    if rule in ("private", "host"):
        return f"if it is meant, {_range(address)}"
    if name is None:
        return _range(address)
    if registry and port in (*WEB_PORTS, DNS_PORT):
        return _add("allow_package_managers=True", "--allow-package-managers")
    if port not in (*WEB_PORTS, DNS_PORT):
        return f"use port 80 or 443, on which names are reached; for another port, {_range(address)}"
    host = hostnames.of_service(name)
    return _flag(port) if rule == "port" else _add(f"allowed_domains=[{host!r}]", f"--domain {host}")


def _flag(port: int) -> str:
    flag = "http" if port == WEB_PORTS[0] else "https"
    return _add(f"allow_{flag}=True", f"--allow-{flag}")


def _range(address: str | None) -> str:
    wanted = "ADDRESS/32" if address is None else f"{address}/{128 if ':' in address else 32}"
    return _add(f"allowed_cidrs=[{wanted!r}]", f"--cidr {wanted}")


def _add(sdk: str, cli: str) -> str:
    return f"add {sdk} to vm.set_session_egress(...), or {cli} to: instavm egress set --session ID"
