"""What a route is handed: the services, and who is calling."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Final

from fastapi import Depends, Request

from instavm.control.control import Control
from instavm.control.store.accounts import Tenant
from instavm.errors import AuthenticationError
from instavm.wire.text import parsed

ENDING: Final = "instavm.ending"
"""Where a request's scope has the functions to call when it is over: `edge.Edge` calls them."""


async def control_of(request: Request) -> Control:
    control: Control = request.app.state.control
    return control


Here = Annotated[Control, Depends(control_of)]


async def caller_of(request: Request) -> Tenant:
    """Whose key came with the request: `X-API-Key`, `Authorization: Bearer`, or `api_key` in a JSON body. Asked once.

    Raises: AuthenticationError: no key, a wrong one, or two that differ; RateLimitError.
    """
    return await caller_with(request, await control_of(request), await _body_key(request))


async def caller_with(request: Request, control: Control, body_key: Any) -> Tenant:
    """The same for a body that a route reads itself. The request is counted as one of its tenant's until it is answered.

    Raises: as `caller_of`; RateLimitError also when too many of the tenant's are under way.
    """
    given = body_key.strip() if isinstance(body_key, str) else None
    keys = {key for key in (*_header_keys(request), given) if key}
    if len(keys) > 1:
        raise AuthenticationError("two different API keys came with one request")
    if not keys:
        raise AuthenticationError("an API key is needed: header X-API-Key, or api_key in the JSON body")
    tenant = await control.accounts.tenant_of(keys.pop())
    control.requests.take(tenant.id)
    request.scope[ENDING].append(partial(control.requests.release, tenant.id))
    return tenant


Caller = Annotated[Tenant, Depends(caller_of)]


def _header_keys(request: Request) -> list[str]:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    keys = [value.strip() for value in request.headers.getlist("x-api-key")]
    return [*keys, token.strip()] if scheme.lower() == "bearer" else keys


async def _body_key(request: Request) -> str | None:
    """The body is read once and kept by the request; it is looked into only when it can hold a key."""
    if request.method == "GET" or b'"api_key"' not in (body := await request.body()):
        return None
    try:
        given = parsed(body)
    except ValueError:
        return None
    key = given.get("api_key") if isinstance(given, dict) else None
    return key.strip() if isinstance(key, str) else None
