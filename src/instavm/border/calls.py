"""What crosses the border, read off the `Node` protocol itself: a method that is added there needs nothing here.

Parameters are values, callbacks that return nothing, or one stream of bytes; a result is a value or a stream of bytes.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Final

from pydantic import PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from instavm import errors
from instavm.contract.node import Node
from instavm.contract.sandboxes import Ended
from instavm.errors import InstaVMError

HERE: Final = frozenset({"on_end", "memory", "responds"})
"""Methods that `RemoteNode` answers by itself."""


@dataclass(frozen=True, slots=True)
class Value:
    adapter: TypeAdapter[Any]


@dataclass(frozen=True, slots=True)
class Callback:
    adapter: TypeAdapter[Any]
    """Of its arguments, as a tuple."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """A stream of them."""


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    parameters: Mapping[str, Value | Callback | Bytes]
    """In the order of the protocol."""
    returns: Value | Bytes


def dumped(kind: Value | Callback, value: Any) -> Any:
    return kind.adapter.dump_python(value)


def loaded(kind: Value | Callback, value: Any) -> Any:
    """Raises ValueError: it is not what the protocol says."""
    try:
        return kind.adapter.validate_python(value)
    except ValidationError as exc:
        problem = exc.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"{problem['loc']}: {problem['msg']}") from None


def dump_error(exc: InstaVMError) -> dict[str, Any]:
    """Its class, its words, and the plain values that it carries."""
    more = {name: value for name, value in vars(exc).items() if isinstance(value, str | int | float | NoneType)}
    return {"error": type(exc).__name__, "text": str(exc), "more": more}


def load_error(told: Any) -> InstaVMError:
    """Raises ValueError."""
    if isinstance(told, InstaVMError):
        return told
    if not (isinstance(told, dict) and isinstance(told.get("error"), str) and isinstance(told.get("more"), dict)):
        raise ValueError("not an error")
    kind = getattr(errors, told["error"], None)
    if not (isinstance(kind, type) and issubclass(kind, InstaVMError)):
        raise ValueError(f"no error is called {told['error'][:40]}")
    made = kind.__new__(kind)
    Exception.__init__(made, str(told.get("text")))
    vars(made).update(told["more"])
    return made


_ERROR = Annotated[InstaVMError, PlainSerializer(dump_error), PlainValidator(load_error)]


def _methods() -> dict[str, Method]:
    functions = inspect.getmembers(Node, inspect.isfunction)
    return {name: _method(name, made) for name, made in functions if not name.startswith("_") and name not in HERE}


def _method(name: str, function: Callable[..., Any]) -> Method:
    hints = typing.get_type_hints(function, localns={"InstaVMError": _ERROR}, include_extras=True)
    returns = hints.pop("return")
    parameters = {parameter: _parameter(hint) for parameter, hint in hints.items()}
    streamed = typing.get_origin(returns) is AsyncGenerator
    assert streamed or inspect.iscoroutinefunction(function), f"Node.{name} can't be asked from another process"
    return Method(name, parameters, Bytes() if streamed else Value(TypeAdapter(returns)))


def _parameter(hint: Any) -> Value | Callback | Bytes:
    one = _without_none(hint)
    if typing.get_origin(one) is AsyncIterator:
        return Bytes()
    if typing.get_origin(one) is Callable:
        arguments: Any = tuple[tuple(typing.get_args(one)[0])]  # type: ignore[misc]
        return Callback(TypeAdapter(arguments))
    return Value(TypeAdapter(hint))


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, UnionType):
        rest = [one for one in typing.get_args(hint) if one is not NoneType]
        return rest[0] if len(rest) == 1 else hint
    return hint


METHODS: Final = _methods()
ENDED: Final = Value(TypeAdapter(Ended))
