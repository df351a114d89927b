"""One call to the server as a value: what to send and how to read the answer. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter, ValidationError

from instavm.client.results import Record
from instavm.errors import InvalidInput, NetworkError
from instavm.wire.base import Asked
from instavm.wire.validation import refusal

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
R = TypeVar("R", bound=Record)

QUICK_S: Final = 60.0
"""How long the server may take for what does not run code."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    read: Callable[[bytes], T]
    body: bytes | None = field(default=None, repr=False)
    """JSON. Not in the repr: it may hold a key, or values of environment variables."""
    params: Mapping[str, str] = field(default_factory=dict)
    answer_s: float = QUICK_S
    """Longest wait for the answer, in seconds."""
    repeatable: bool = True
    """Whether doing it twice does no harm. Running code is not: nobody knows what it does."""


def ask(model: type[M], names: Mapping[str, str] | None = None, /, **given: Any) -> M:
    """A request, checked by the rules that the server applies. None means: leave it out.

    names: wire field → the argument that the caller of the SDK gave, where the two differ.
    Raises: InvalidInput, before anything is sent; also for a name that there is not: a misspelt one would leave out what it
    was to restrict.
    """
    known = model.read() if issubclass(model, Asked) else frozenset(model.model_fields)
    for name, value in given.items():
        if name not in known:
            raise InvalidInput(name, value, f"no argument of this name, but these: {', '.join(sorted(known))}")
    plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in given.items()}
    try:
        return model.model_validate({name: value for name, value in plain.items() if value is not None})
    except ValidationError as exc:
        refused = refusal(exc.errors(include_url=False, include_context=False))
    except InvalidInput as exc:
        refused = exc
    field = (names or {}).get(refused.field, refused.field)
    raise type(refused)(field, refused.value, refused.allowed) from None


def body_of(given: BaseModel) -> bytes:
    """What is sent of a request: what was given, as JSON. Raises: InvalidInput, for what JSON cannot hold."""
    return given.model_dump_json(exclude_unset=True).encode()


def reading(model: type[M]) -> Callable[[bytes], M]:
    """Raises: NetworkError, when what came back is not what this server speaks."""

    def read(body: bytes) -> M:
        try:
            return model.model_validate_json(body)
        except ValidationError as exc:
            raise NetworkError(
                f"the server's answer is not a {model.__name__} ({exc.error_count()} things are wrong):"
                f" does base_url point at an InstaVM server? It begins {body[:80]!r}"
            ) from None

    return read


def record(kind: type[R], model: type[BaseModel]) -> Callable[[bytes], R]:
    """One object of the wire as what users get. Raises: as `reading`."""
    read = reading(model)
    return lambda body: kind(read(body).model_dump(mode="json"))


def records(kind: type[R], model: type[M]) -> Callable[[bytes], list[R]]:
    """A list of them. Raises: NetworkError."""
    many: TypeAdapter[list[Any]] = TypeAdapter(list[model])  # type: ignore[valid-type]

    def read(body: bytes) -> list[R]:
        try:
            return [kind(one.model_dump(mode="json")) for one in many.validate_json(body)]
        except ValidationError:
            raise NetworkError(f"the server's answer is not a list of {model.__name__}s") from None

    return read


def segment(**named: str) -> str:
    """A path parameter, given by its name, with nothing left that means anything in a URL. Raises: InvalidInput."""
    [(argument, text)] = named.items()
    allowed = "an id, as the server gave it"
    if not isinstance(text, str) or not text:
        raise InvalidInput(argument, text, allowed)
    try:
        return quote(text, safe="")
    except UnicodeEncodeError:
        raise InvalidInput(argument, text, allowed) from None
