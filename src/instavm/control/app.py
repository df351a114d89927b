"""The HTTP application: routes on top of the services, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from instavm.control.accounts import KeyedAccounts, LocalAccounts
from instavm.control.api import errors, executions, health, sessions, users
from instavm.control.api.edge import Edge
from instavm.control.control import Control, open_control
from instavm.control.node import Node
from instavm.control.store.database import Store
from instavm.version import __version__


def create_app(node: Node, store: Store, *, private: bool = False) -> FastAPI:
    """The whole API on top of one node and one store, both open for as long as the app runs.

    private: the app is reached through a socket that only its owner can open; any API key then means the
    local user. Inside its lifespan, `app.state.control` holds the services.
    """
    accounts = LocalAccounts(store.accounts) if private else KeyedAccounts(store.accounts)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_control(node, store, accounts) as control:
            app.state.control = control
            yield

    app = FastAPI(
        title="InstaVM, self-hosted",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.private = private
    app.add_middleware(Edge)
    errors.install(app)
    for part in (health, users, sessions, executions):
        app.include_router(part.router)
    return app


def control_of(app: FastAPI) -> Control:
    """The services of a running app."""
    control: Control = app.state.control
    return control
