"""Options that several commands take, and what they mean for the SDK."""

from __future__ import annotations

import os
from typing import Annotated, Any, Final

import typer

from instavm.client.embedded import Embedded
from instavm.client.sync import InstaVM
from instavm.errors import InvalidInput
from instavm.settings import Places

LOCAL_KEY: Final = "local"
"""Sent when no key is given: the embedded server takes any."""

ApiKey = Annotated[str | None, typer.Option("--api-key", help="Else INSTAVM_API_KEY; the embedded server needs none.")]
BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", help="Else INSTAVM_BASE_URL; without either, the embedded server is used."),
]
AsJson = Annotated[bool, typer.Option("--json", "-j", help="Print one JSON object.")]


def client(api_key: str | None, base_url: str | None, **more: Any) -> InstaVM:
    """A client, with no key needed for the embedded server, which runs when this returns. Raises: as `InstaVM`."""
    embedded = not (base_url or os.environ.get("INSTAVM_BASE_URL"))
    if not api_key and embedded and not os.environ.get("INSTAVM_API_KEY"):
        api_key = LOCAL_KEY
    vm = InstaVM(api_key, base_url, **more)
    if embedded:
        Embedded(Places()).ensure()
    return vm


def environment(pairs: list[str]) -> dict[str, str]:
    """`K=V` each. Raises: InvalidInput, which does not repeat the value."""
    env = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidInput("env", name, "NAME=VALUE")
        env[name] = value
    return env
