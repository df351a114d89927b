"""Calls about egress policies: what a sandbox may reach, and where it went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypedDict

from instavm.client.calls.base import Call, ask, reading, record, segment
from instavm.client.results import EgressCheck, EgressLog, EgressPolicy
from instavm.wire import egress as wire

Target = Literal["session", "vm"]
APPLY_S: Final = 120.0
"""A policy that is set while a sandbox comes up is answered once it is up."""


class Policy(TypedDict, total=False):
    """What a sandbox may reach. What is left out of the flags is allowed, of the lists empty: nothing given opens the web."""

    allow_package_managers: bool
    allow_http: bool
    allow_https: bool
    allowed_domains: Sequence[str] | None
    allowed_cidrs: Sequence[str] | None


FLAGS: Final = ("allow_package_managers", "allow_http", "allow_https")


def put(target: Target, name: str, policy: Policy) -> Call[EgressPolicy]:
    """Raises: InvalidInput, for a domain or an address range that no server would take."""
    given = ask(wire.SetEgress, **_whole(policy))
    body = given.model_dump_json(exclude_none=True).encode()
    return Call("POST", _path(target, name), _policy, body, answer_s=APPLY_S)


def get(target: Target, name: str) -> Call[EgressPolicy]:
    return Call("GET", _path(target, name), _policy)


def check(target: Target, name: str, host: str, port: int, protocol: str, policy: Policy | None) -> Call[EgressCheck]:
    """Raises: InvalidInput."""
    tried = None if policy is None else ask(wire.SetEgress, **_whole(policy)).model_dump(exclude_none=True)
    given = ask(wire.CheckEgress, host=host, port=port, protocol=protocol, policy=tried)
    path, read = f"{_path(target, name)}/check", record(EgressCheck, wire.EgressCheck)
    if tried is None:
        params = {"host": host, "port": str(port), "protocol": protocol}
        return Call("GET", path, read, params=params, answer_s=APPLY_S)
    body = given.model_dump_json(exclude_none=True).encode()
    return Call("POST", path, read, body, answer_s=APPLY_S)


def log(target: Target, name: str) -> Call[EgressLog]:
    read = reading(wire.EgressLog)
    path = f"{_path(target, name)}/log"
    return Call("GET", path, lambda raw: EgressLog(read(raw).model_dump(mode="json")), answer_s=APPLY_S)


def _whole(policy: Policy) -> dict[str, object]:
    return dict.fromkeys(FLAGS, True) | dict(policy)


def _policy(raw: bytes) -> EgressPolicy:
    return EgressPolicy(reading(wire.EgressPolicy)(raw).model_dump(mode="json"))


def _path(target: Target, name: str) -> str:
    named = {f"{target}_id": name}
    return f"/v1/egress/{target}/{segment(**named)}"
