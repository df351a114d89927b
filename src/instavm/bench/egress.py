"""What the way through the egress filter costs: requests, new connections, TLS and bulk, against a plain veth pair in one run.

Needs root. The client runs in a namespace of its own, where a guest would be, so that the emulator's speed is not in the numbers.
A sandbox's namespace is made as always; in the place of the tap comes a veth whose other end the client has. The server, in a
third namespace, answers at once. Direct and filtered runs take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import anyio

from instavm.bench import report
from instavm.contract.egress import Egress
from instavm.errors import HostNotReady
from instavm.node.network import space
from instavm.node.network.addresses import GATEWAY, GATEWAY_MAC, GUEST, PREFIX
from instavm.node.network.guard import Networks
from instavm.settings import Settings

NAME = "bench.test"
SERVER = "198.51.100.250"
BULK_MIB = 64
ROUNDS = 5
SELF_SIGNED = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=bench"

SERVE = """
import asyncio, dns.message, dns.rrset, ssl, sys
class Names(asyncio.DatagramProtocol):
    def connection_made(self, transport): self.line = transport
    def datagram_received(self, data, asker):
        asked = dns.message.from_wire(data); said = dns.message.make_response(asked)
        if asked.question[0].rdtype == 1:
            said.answer.append(dns.rrset.from_text(asked.question[0].name, 60, "IN", "A", sys.argv[1]))
        self.line.sendto(said.to_wire(), asker)
async def one(reader, writer):
    while True:
        try:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
        except (asyncio.IncompleteReadError, OSError):
            return writer.close()
        size = int(head.split(b" ")[1][1:] or 2)
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % size)
        for left in range(size, 0, -(1 << 18)):
            writer.write(b"x" * min(left, 1 << 18)); await writer.drain()
async def main(address, cert, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(cert, key)
    await asyncio.start_server(one, address, 80); await asyncio.start_server(one, address, 443, ssl=context)
    await asyncio.get_running_loop().create_datagram_endpoint(Names, (address, 53))
    print("ready", flush=True); await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
asyncio.run(main(*sys.argv[1:]))
"""
CLIENT = """
import json, socket, ssl, sys, time
name, address, requests, bulk = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
context = ssl.create_default_context(); context.check_hostname = False; context.verify_mode = ssl.CERT_NONE
def dial(port):
    s = socket.create_connection((address, port), 20); s.setsockopt(6, 1, 1)
    return context.wrap_socket(s, server_hostname=name) if port == 443 else s
def ask(s, size=2):
    s.sendall(f"GET /{size} HTTP/1.1\\r\\nHost: {name}\\r\\n\\r\\n".encode())
    data = b""
    while b"\\r\\n\\r\\n" not in data: data += s.recv(65536)
    left = size - len(data.partition(b"\\r\\n\\r\\n")[2])
    while left: left -= len(s.recv(min(left, 1 << 18)))
def timed(work):
    began = time.perf_counter(); work(); return (time.perf_counter() - began) * 1000
def fresh(port):
    s = dial(port); ask(s); s.close()
told = {}
for word, port in (("HTTP", 80), ("TLS", 443)):
    kept = dial(port); ask(kept)
    told[f"{word}, request on an open connection"] = [timed(lambda: ask(kept)) for _ in range(requests)]
    told[f"{word}, connection and request"] = [timed(lambda: fresh(port)) for _ in range(requests // 3)]
    told[f"{word}, {bulk >> 20} MiB"] = [timed(lambda: ask(kept, bulk))]
print(json.dumps(told))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def namespaces(*names: str) -> Iterator[None]:
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextlib.contextmanager
def started(command: list[str | Path]) -> Iterator[None]:
    """A program that says when it is ready, and ends when its input does."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield
        process.stdin.close()


def wire(server: str, client: str) -> None:
    """Host to server, and client to server, each by a veth pair."""
    ip("link", "add", server, "type", "veth", "peer", "name", "host0", "netns", server)
    ip("addr", "add", "100.127.254.1/30", "dev", server)
    ip("link", "set", server, "up")
    ip("link", "add", "direct0", "netns", client, "type", "veth", "peer", "name", "direct0", "netns", server)
    for inside, device, address in (
        (server, "host0", "100.127.254.2/30"),
        (server, "direct0", "100.127.253.2/30"),
        (server, "lo", f"{SERVER}/32"),
        (client, "direct0", "100.127.253.1/30"),
    ):
        ip("-n", inside, "addr", "add", address, "dev", device)
        ip("-n", inside, "link", "set", device, "up")
    ip("route", "add", f"{SERVER}/32", "via", "100.127.254.2")
    ip("-n", client, "route", "add", f"{SERVER}/32", "via", "100.127.253.2")
    ip("-n", server, "route", "add", "default", "via", "100.127.254.1")


def replace_tap(inside: space.Space, client: str) -> None:
    """Where the guest's wire ends, the client's begins."""
    inside.close_tap()
    peer = f"/proc/{os.getpid()}/fd/{inside.fd}"
    ip("-n", client, "link", "add", "guest0", "type", "veth", "peer", "name", "tap0", "netns", peer)
    ip("-n", client, "addr", "add", f"{GUEST}/{PREFIX}", "dev", "guest0")
    ip("-n", client, "link", "set", "guest0", "up")
    ip("-n", client, "route", "add", "198.18.0.0/15", "via", GATEWAY)

    def address() -> None:
        for words in (
            ("addr", "add", f"{GATEWAY}/{PREFIX}", "dev", "tap0"),
            ("link", "set", "tap0", "address", GATEWAY_MAC, "up"),
        ):
            ip(*words)

    space.within(inside, address)


def resolved(client: str) -> str:
    """The name's stand-in, from the sandbox's own DNS."""
    code = f"""
import dns.message, dns.query
print(dns.query.udp(dns.message.make_query("{NAME}", "A"), "{GATEWAY}", timeout=5).answer[0][0])"""
    done = subprocess.run(
        ["ip", "netns", "exec", client, sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def measured(client: str, address: str, requests: int) -> dict[str, list[float]]:
    command = ["ip", "netns", "exec", client, sys.executable, "-c", CLIENT, NAME, address, str(requests)]
    done = subprocess.run([*command, str(BULK_MIB << 20)], check=True, capture_output=True, text=True)
    told: dict[str, list[float]] = json.loads(done.stdout)
    return told


def measure(count: int) -> report.Results:
    """`count` requests of each kind on an open connection; a third as many connections. Raises: HostNotReady."""
    return anyio.run(_measure, count)


async def _measure(count: int) -> report.Results:
    number = os.getpid() % 10_000
    server, client = f"ivms{number}", f"ivmc{number}"
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as home, namespaces(server, client):
        wire(server, client)
        cert, key = Path(home) / "cert", Path(home) / "key"
        made: list[str | Path] = [*SELF_SIGNED.split(), "-keyout", key, "-out", cert]
        await anyio.run_process(made)
        serve: list[str | Path] = ["ip", "netns", "exec", server, sys.executable, "-c", SERVE, SERVER, cert, key]
        with started(serve):
            networks = Networks(Settings(egress_dns=(SERVER,)))
            async with networks.open():
                network = await networks.make()
                if network is None:
                    raise HostNotReady(f"no network can be made here: {networks.refusal}")
                try:
                    await network.put(Egress(domains=(NAME,)), ())
                    await anyio.to_thread.run_sync(replace_tap, network.space, client)
                    stand_in = await anyio.to_thread.run_sync(resolved, client)
                    for _ in range(ROUNDS):
                        for how, address in (("direct", SERVER), ("filtered", stand_in)):
                            found = await anyio.to_thread.run_sync(measured, client, address, max(3, count // ROUNDS))
                            for what, taken in found.items():
                                times.setdefault(f"{what}, {how}", []).extend(taken)
                finally:
                    await network.aclose()
    return {what: report.spread(taken) for what, taken in sorted(times.items())}
