"""What the operator sets for all sandboxes: a proxy to go through, a limit of bandwidth, registries of their own."""

import socket
import threading
import time

import probed
import pytest
from internet import Live

from instavm.contract.egress import Egress
from instavm.contract.sandboxes import SandboxSpec
from instavm.node.runtime import Runtime

pytestmark = pytest.mark.anyio


class Proxy(threading.Thread):
    """An HTTP proxy that knows CONNECT, wants a password, and finds every name at one address."""

    def __init__(self, target):
        super().__init__(daemon=True)
        self.target, self.asked = target, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://user:word@127.0.0.1:{self.listener.getsockname()[1]}"

    def run(self):
        while True:
            try:
                link, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(link,), daemon=True).start()

    def serve(self, link):
        head = b""
        while b"\r\n\r\n" not in head:
            head += link.recv(4096)
        lines = head.decode().split("\r\n")
        self.asked.append(lines[0])
        if "Proxy-Authorization: Basic dXNlcjp3b3Jk" not in lines:
            link.sendall(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")
            return link.close()
        out = socket.create_connection((self.target, int(lines[0].split()[1].rpartition(":")[2])))
        link.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        for one, other in ((link, out), (out, link)):
            threading.Thread(target=self.pass_on, args=(one, other), daemon=True).start()
        return None

    def pass_on(self, one, other):
        try:
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture
async def behind(settings, short_folder, internet, anyio_backend):
    """A sandbox on a node with a proxy and 8 megabits per second, and the proxy."""
    proxy = Proxy(internet.a)
    proxy.start()
    change = {"egress_proxy": proxy.url, "egress_mbit_per_s": 8.0, "spare_machines": 0}
    mine = probed.at(settings, short_folder / "behind", **change)
    async with Runtime.open(mine) as node:
        await node.start(SandboxSpec("vm-behind", 2, 512, egress=Egress(domains=("good.test",), cidrs=("10.0.0.0/8",))))
        yield Live(node, "vm-behind"), proxy
    proxy.listener.close()


async def test_allowed_names_go_through_the_proxy_and_no_faster_than_allowed(behind, internet):
    sandbox, proxy = behind
    assert await sandbox.get("http://good.test/") == f"GET / at {internet.a}:80 0"
    assert await sandbox.get("https://good.test/") == f"GET / at {internet.a}:443 0"
    assert await sandbox.get("http://evil.test/") == "curl 6"
    assert await sandbox.get(f"http://{internet.private}:8080/") == f"GET / at {internet.private}:8080 0"
    asked = ["CONNECT good.test:80 HTTP/1.1", "CONNECT good.test:443 HTTP/1.1"]
    assert proxy.asked == asked, "ranges are reached directly, refused names not at all"
    began = time.monotonic()
    done = await sandbox.bash("curl -s http://good.test/bytes/3000000 | wc -c")
    assert done.stdout == "3000000\n" and time.monotonic() - began > 2.5


async def test_a_registry_that_the_operator_names_may_be_private(settings, short_folder, internet):
    internet.names({"mirror.test": [internet.private], "own.test": [internet.private]})
    change = {"egress_package_hosts": ("mirror.test:8080",), "egress_dns": (internet.a,), "spare_machines": 0}
    mine = probed.at(settings, short_folder / "mirror", **change)
    async with Runtime.open(mine) as node:
        await node.start(SandboxSpec("vm-mirror", 2, 512, egress=Egress(packages=True)))
        sandbox = Live(node, "vm-mirror")
        assert await sandbox.get("http://mirror.test:8080/") == f"GET / at {internet.private}:8080 0"
        assert (await sandbox.get("http://mirror.test/")).startswith("curl")
        await sandbox.allow(domains=("own.test",))
        assert (await sandbox.get("http://own.test/")).startswith("curl")
        assert (await sandbox.get("http://mirror.test:8080/")).startswith("curl")
        assert [one for one in await sandbox.log() if one.name == "mirror.test" and one.registry and not one.allowed]
