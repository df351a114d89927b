"""The filter's process killed again and again under traffic: what is refused stays refused, to the packet.

`KILLS=100 pytest tests/net/test_filter_kills.py` for as many as one likes.
"""

import json
import os
import signal

import anyio
import pytest
from wired import wired

from instavm.contract.egress import Egress
from instavm.errors import HostNotReady
from instavm.node.network.guard import Networks

pytestmark = pytest.mark.anyio
KILLS = int(os.environ.get("KILLS", "6"))
TRAFFIC = """
import socket, sys, threading, time
a, b, private, metadata = sys.argv[1:]
passed, stop, lock = [], False, threading.Lock()
def tcp(to, port, name):
    with socket.create_connection((to, port), 3) as link:
        link.settimeout(3)
        link.sendall(f"GET / HTTP/1.0\\r\\nHost: {name}\\r\\n\\r\\n".encode())
        return link.recv(4096)
def udp(to):
    with socket.socket(2, 2) as link:
        link.settimeout(0.2); link.connect((to, 9999)); link.send(b"x"); return link.recv(99)
def again(what, work):
    while not stop:
        try:
            if b"200 OK" in (said := work()) or said.startswith(b"echo"):
                with lock: passed.append(what)
        except OSError: time.sleep(0.01)
tries = {
    "good": lambda: tcp("good.test", 80, "good.test"), "name": lambda: tcp("evil.test", 80, "evil.test"),
    "host": lambda: tcp("good.test", 80, "evil.test"), "b": lambda: tcp(b, 80, "good.test"),
    "other": lambda: tcp(a, 80, "good.test"),
    "private": lambda: tcp(private, 9999, "x"), "metadata": lambda: tcp(metadata, 80, "x"), "udp": lambda: udp(b),
    "metadata udp": lambda: udp(metadata),
}
threads = [threading.Thread(target=again, args=one) for one in tries.items()]
for one in threads: one.start()
print("ready", flush=True)
sys.stdin.readline(); stop = True
for one in threads: one.join()
print({what: passed.count(what) for what in tries})
"""


@pytest.fixture
def watched(internet):
    """Counts packets to all but the server that is allowed."""
    refused = (internet.b, internet.private, internet.metadata)
    internet.nft(f"add rule ip seen arrive ip daddr {{ {', '.join(refused)} }} counter")

    def counted():
        told = json.loads(internet.nft("list chain ip seen arrive"))["nftables"]
        rule = [one["rule"] for one in told if "rule" in one][-1]
        return rule["handle"], next(part["counter"]["packets"] for part in rule["expr"] if "counter" in part)

    yield lambda: counted()[1]
    internet.nft(f"delete rule ip seen arrive handle {counted()[0]}")


@pytest.mark.timeout(60 + 10 * KILLS)
async def test_no_packet_gets_out_and_what_starts_meanwhile_starts_closed(settings, internet, watched):
    internet.names({"good.test": [internet.a], "evil.test": [internet.b]})
    networks = Networks(settings.model_copy(update={"egress_dns": (internet.a,)}))
    allowed = Egress(domains=("good.test",))
    async with networks.open():
        network = await networks.make()
        await network.put(allowed, ())
        with wired(network.space) as guest:
            traffic = guest.start(TRAFFIC, internet.a, internet.b, internet.private, internet.metadata)
            assert await anyio.to_thread.run_sync(traffic.stdout.readline) == "ready\n"
            for _ in range(KILLS):
                await networks.ready()
                await anyio.sleep(0.3)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(starts, networks, allowed)
                    os.kill(networks.filter_pid, signal.SIGKILL)
            await networks.ready()
            await anyio.sleep(1)
            told = eval((await anyio.to_thread.run_sync(traffic.communicate, "\n"))[0])
            assert told.pop("good") > KILLS, "what is allowed got through between two kills"
            assert set(told.values()) == {0}
            assert watched() == 0
            code = "import urllib.request; print(urllib.request.urlopen('http://good.test/').status)"
            assert await anyio.to_thread.run_sync(guest.python, code) == "200\n", "all is well afterwards"
            assert (await network.in_force()).policy == allowed
        await network.aclose()
    assert len(networks) == 0


async def starts(networks, allowed):
    """A network that is made while there is no filter: closed, until its policy is in force by its own account."""
    made = None
    try:
        made = await networks.make()
        assert not made.policy.egress.opens
        await made.put(allowed, ())
        assert (await made.in_force()).policy == allowed
    except HostNotReady:
        assert made is None or not made.policy.egress.opens
    finally:
        if made is not None:
            await made.aclose()
