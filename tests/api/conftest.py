"""A real server on a loopback port, on a node without virtual machines, and two accounts with a key each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import httpx
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from local_node import LocalNode, open_local_node

from instavm import InstaVM
from instavm.control import listen
from instavm.control.accounts import Keys
from instavm.control.app import control_of, create_app
from instavm.control.control import Control
from instavm.control.listen import Listener
from instavm.control.serving import Server, http_config
from instavm.control.store.database import Store, open_store


@dataclass
class Served:
    """`portal` runs things on the server's event loop, where node, store and control live."""

    url: str
    key: str
    other_key: str
    node: LocalNode
    store: Store
    control: Control
    portal: BlockingPortal | None = None
    undocumented: list[tuple[str, str, str]] = field(default_factory=list)
    """Answers with a status that the OpenAPI document does not name."""

    def client(self, **more):
        return InstaVM(self.key, self.url, **more)

    def events(self, session_id):
        return self.portal.call(self.store.sessions.events, session_id)


class Documented:
    """Notes every answer whose status its operation's part of the OpenAPI document does not name."""

    def __init__(self, app, document, undocumented):
        self._app = app
        self._document = document
        self._undocumented = undocumented

    async def __call__(self, scope, receive, send):
        async def look(message):
            if message["type"] == "http.response.start" and (route := scope.get("route")) is not None:
                self._check(scope["method"], route.path, str(message["status"]))
            await send(message)

        await self._app(scope, receive, look)

    def _check(self, method, path, status):
        operation = self._document["paths"].get(path, {}).get(method.lower())
        if operation is not None and status not in operation["responses"]:
            self._undocumented.append((method, path, status))


@asynccontextmanager
async def running(folder) -> AsyncIterator[Served]:
    listener = Listener(listen.on_tcp("127.0.0.1", 0), private=False)
    host, port = listener.socket.getsockname()
    ready = anyio.Event()
    async with open_local_node() as node, open_store(folder / "control.db") as store:
        keys = Keys(store.accounts)
        _, key = await keys.create("first")
        _, other = await keys.create("second", tenant="other")
        app, undocumented = create_app(node, store), []
        app.add_middleware(Documented, document=app.openapi(), undocumented=undocumented)
        server = Server(http_config(app, listener), ready.set)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [listener.socket])
            await ready.wait()
            yield Served(f"http://{host}:{port}", key, other, node, store, control_of(app), undocumented=undocumented)
            server.should_exit = True
        assert not node.places, "the server ended and left sandboxes behind"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Served]:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(running(tmp_path_factory.mktemp("server"))) as served,
    ):
        served.portal = portal
        yield served


@pytest.fixture
def vm(server):
    with server.client() as vm:
        yield vm


@pytest.fixture(scope="module")
def module_vm(server):
    with server.client() as vm:
        yield vm


@pytest.fixture
def http(server):
    """Plain HTTP with the first account's key."""
    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.key}) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """Every test ends what it started."""
    if "server" not in request.fixturenames:
        yield
        return
    server = request.getfixturevalue("server")
    before = set(server.node.places)
    yield
    assert set(server.node.places) == before
    assert not server.node.booting
    assert not server.undocumented, "docs/openapi.json does not tell the truth"


@pytest.fixture
def anyio_backend():
    return "asyncio"
