"""Calls of one noun under one name: `vm.vms.suspend(…)`, `vm.snapshots.list()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from instavm.client.calls.base import Call


class Manager:
    """The same calls for both clients: they answer in `InstaVM`, and are awaited in `AsyncInstaVM`."""

    def __init__(self, send: Callable[[Call[Any]], Any], calls: Mapping[str, Callable[..., Call[Any]]]) -> None:
        self._send = send
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            call = self._calls[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r} here, but {', '.join(self._calls)}") from None

        @wraps(call)
        def send(*arguments: Any, **named: Any) -> Any:
            return self._send(call(*arguments, **named))

        return send

    def __dir__(self) -> list[str]:
        return [*self._calls]
