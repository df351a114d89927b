"""The HTTP application: routes on top of the services, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI

from instavm.contract.node import Node
from instavm.control.accounts import KeyedAccounts, LocalAccounts
from instavm.control.api import (
    description,
    egress,
    errors,
    executions,
    files,
    health,
    keys,
    metrics,
    processes,
    sessions,
    snapshots,
    streams,
    tasks,
    users,
    vms,
)
from instavm.control.api.edge import Edge
from instavm.control.control import Control, open_control
from instavm.control.quotas import Policy
from instavm.control.rates import Rates
from instavm.control.store.database import Store
from instavm.version import __version__


def create_app(node: Node, store: Store, *, private: bool = False, policy: Policy | None = None) -> FastAPI:
    """The whole API on top of one node and one store, both open for as long as the app runs.

    private: the app is reached through a socket that only its owner can open; any API key then means the
    local user. policy: quotas, rates and what the host bears; None = without limits.
    Inside its lifespan, `app.state.control` holds the services.
    """
    policy = policy or Policy()
    rates = Rates(policy.requests_per_s, policy.requests_burst)
    accounts = LocalAccounts(store.accounts) if private else KeyedAccounts(store.accounts, rates)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_control(node, store, accounts, policy) as control:
            app.state.control = control
            yield

    app = described(lifespan)
    app.state.private = private
    app.add_middleware(Edge)
    errors.install(app)
    return app


def described(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None) -> FastAPI:
    """All routes; without the services behind them it can only describe itself."""
    app = FastAPI(
        title="InstaVM, self-hosted",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url="/docs",
        redoc_url=None,
        generate_unique_id_function=description.operation_id,
    )
    # looked through in this order
    parts = (executions, sessions, tasks, files, streams, processes, vms, snapshots, egress, health, users, keys, metrics)
    for part in parts:
        app.include_router(
            part.router, responses=description.problems(500) if part is health else description.EVERYWHERE
        )
    description.describe(app)
    return app


def control_of(app: FastAPI) -> Control:
    """The services of a running app."""
    control: Control = app.state.control
    return control
