"""Calls to servers elsewhere go through the environment's proxy; what is on this machine never does."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import pytest

from instavm.client.calls import sessions
from instavm.client.config import Config
from instavm.client.transport import AsyncLink, Link
from instavm.errors import NetworkError


class Proxy(BaseHTTPRequestHandler):
    """Answers by itself, and remembers what it was asked for, with which key."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["X-API-Key"]))
        body = b"[]"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def proxy(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{server.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        yield server
        server.shutdown()
        thread.join()


def config(base_url):
    return Config.of("key", base_url, 300, 0, cpu_count=None, memory_mb=None, env=None, metadata=None)


def ask(base_url):
    link = Link(config(base_url))
    try:
        return link.send(sessions.sandboxes(None, 1))
    finally:
        link.close()


def test_a_server_elsewhere_is_asked_through_it(proxy):
    assert ask("http://instavm.invalid:8000/behind") == []
    [(url, key)] = proxy.asked
    assert url.startswith("http://instavm.invalid:8000/behind/v1/") and key == "key"


def test_from_an_event_loop_too(proxy):
    async def asking():
        link = AsyncLink(config("http://instavm.invalid"))
        try:
            return await link.send(sessions.sandboxes(None, 1))
        finally:
            await link.aclose()

    assert anyio.run(asking) == []
    assert len(proxy.asked) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_this_machine_is_asked_directly(proxy, host):
    with pytest.raises(NetworkError, match="cannot be reached"):
        ask(f"http://{host}:1")
    assert proxy.asked == []


def test_so_is_who_is_exempted(proxy, monkeypatch):
    monkeypatch.setenv("no_proxy", ".invalid")
    with pytest.raises(NetworkError, match="cannot be reached"):
        ask("http://instavm.invalid")
    assert proxy.asked == []
