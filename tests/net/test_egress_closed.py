"""Closed means closed: what root in a sandbox tries, what fails around it, and what is cut when a policy changes."""

import itertools
import os
import signal
import time
from pathlib import Path

import anyio
import pytest

from instavm.contract.egress import Egress
from instavm.errors import BootFailed, HostNotReady
from instavm.node.network import space
from instavm.node.network.policy import Policy
from instavm.node.network.rules import TABLE, TCP_PORT, UDP_PORT

pytestmark = pytest.mark.anyio

TRIES = """
import socket, struct
tried = []
def attempt(what, work):
    try:
        work(); tried.append((what, "sent"))
    except OSError as exc:
        tried.append((what, exc.__class__.__name__))
def tcp(to, port):
    s = socket.create_connection((to, port), 5); s.sendall(b"x"); s.recv(1)
def udp(to, port):
    s = socket.socket(2, 2); s.settimeout(2); s.connect((to, port)); s.send(b"x"); s.recv(1)
for to in TARGETS:
    for port in (22, 80, 443, 9999, 15001, 15002): attempt("tcp", lambda: tcp(to, port))
    for port in (53, 123, 443, 9999, 15001, 15002): attempt("udp", lambda: udp(to, port))
    attempt("icmp", lambda: socket.socket(2, 3, 1).sendto(b"\\x08\\0\\xf7\\xff\\0\\0\\0\\0", (to, 0)))
    raw = socket.socket(2, 3, 255)
    for source in ("192.0.0.2", "192.0.0.1", "10.9.9.9", to):
        packet = struct.pack("!BBHHHBBH4s4s", 69, 0, 40, 0, 0, 64, 6, 0, socket.inet_aton(source), socket.inet_aton(to))
        attempt("raw", lambda: raw.sendto(packet + struct.pack("!HHIIBBHHH", 4000, 80, 1, 0, 80, 2, 1000, 0, 0), (to, 0)))
wire = socket.socket(17, 3); wire.bind(("eth0", 0))
for mac in (b"\\x02\\0\\xc0\\0\\0\\1", b"\\xff" * 6, b"\\x02abcde"):
    for kind in (0x0800, 0x86DD, 0x0806, 0x88CC):
        attempt("frame", lambda: wire.send(mac + b"\\x02spoof" + kind.to_bytes(2) + b"\\x60" + b"\\0" * 60))
print(tried)
"""

STAND_IN = "198.18.9.9"
PORTS = (("tcp", TCP_PORT), ("udp", UDP_PORT))
DATAGRAM = (
    "import socket; s = socket.socket(2, 2); s.settimeout(3); s.connect(({!r}, 9999)); s.send(b'x'); print(s.recv(9))"
)
SPOOFED = """
import socket, struct
there = {!r}
packet = struct.pack("!BBHHHBBH4s4s", 69, 0, 29, 0, 0, 64, 17, 0, socket.inet_aton("SOURCE"), socket.inet_aton(there))
socket.socket(2, 3, 255).sendto(packet + struct.pack("!HHHH", 4000, 9999, 9, 0) + b"y", (there, 0))
"""


async def test_nothing_leaves_under_the_default(sandbox, internet):
    """TCP, UDP, ICMP, DNS, NTP, raw packets and frames, to servers, the host, its own namespace and the metadata service."""
    before = internet.packets()
    targets = [internet.a, internet.private, internet.metadata, internet.host, "192.0.0.1", "1.1.1.1"]
    done = await sandbox.python(TRIES.replace("TARGETS", repr(targets)), timeout_s=280)
    tried = eval(done.stdout)
    assert not [what for what, how in tried if what in ("tcp", "udp") and how == "sent"]
    assert {what for what, _ in tried} == {"tcp", "udp", "icmp", "raw", "frame"}
    assert (await sandbox.bash("getent hosts data.evil.test; getent ahosts x.test")).stdout == ""
    assert "unreachable" in (await sandbox.bash("timeout 9 bash -c '</dev/tcp/2001:db8::1/80'")).stderr
    assert internet.seen == [] and internet.packets() == before
    refused = {(one.address or one.name, one.port) for one in await sandbox.log() if not one.allowed}
    assert {(internet.a, 80), (internet.metadata, 80), ("data.evil.test", 53)} <= refused


async def test_root_inside_changes_its_own_rules_only(sandbox, internet):
    """Rules, routes, addresses and MAC are the guest's to change; what leaves is not."""
    internet.names({"good.test": [internet.a]})
    before = internet.packets()
    mac = (await sandbox.bash("cat /sys/class/net/eth0/address")).stdout.strip()
    await sandbox.bash("nft flush ruleset 2>/dev/null; ip route replace default via 192.0.0.1 src 192.0.0.2")
    for change, back in (
        ("ip addr add 10.9.9.9/8 dev eth0", "ip addr del 10.9.9.9/8 dev eth0"),
        ("ip link set eth0 address 02:aa:aa:aa:aa:aa", f"ip link set eth0 address {mac}"),
        ("ip route add 198.51.100.0/24 dev eth0", "ip route del 198.51.100.0/24 dev eth0"),
        ("ip neigh replace 192.0.0.1 lladdr 02:bb:bb:bb:bb:bb dev eth0", "ip neigh del 192.0.0.1 dev eth0"),
    ):
        tried = f"{change} && (timeout 5 bash -c '</dev/tcp/{internet.a}/80'; echo $?); {back}"
        tried += "; ip route replace default via 192.0.0.1"
        assert (await sandbox.bash(tried)).stdout.strip() in ("1", "124"), change
    assert internet.seen == [] and internet.packets() == before
    await sandbox.allow(domains=("good.test",))
    assert (await sandbox.get("http://good.test/")).startswith("GET"), "it still has its network"


async def test_the_report_has_a_hash_of_what_is_in_force(node, sandbox, start):
    """The same for the same rules; another one when the policy changes, or when rules go behind our back."""

    async def egress(one):
        told = (await node.isolation(one.vm_id)).report
        return told["egress"], [weakness for weakness in told["weaker"] if "egress" in weakness]

    other = await start()
    closed, weaker = await egress(sandbox)
    assert await egress(other) == (closed, weaker) and len(closed["sha256"]) == 64 and weaker == []
    assert closed["policy"]["domains"] == () and closed["kernel_rules"] > 5
    await sandbox.allow(domains=("good.test",))
    opened, _ = await egress(sandbox)
    assert opened["policy"]["domains"] == ("good.test",) and opened["sha256"] != closed["sha256"]
    await sandbox.get("http://evil.test/")
    assert (await egress(sandbox))[0] == opened, "what is counted is no rule"
    await sandbox.allow()
    assert (await egress(sandbox))[0] == closed
    await anyio.to_thread.run_sync(space.apply, other.network.space, "flush ruleset")
    flushed, weaker = await egress(other)
    assert flushed["sha256"] != closed["sha256"] and flushed["kernel_rules"] == 0
    assert "only the filter decides" in weaker[0]


async def test_flushed_rules_open_nothing(start, internet):
    internet.names({"good.test": [internet.a]})
    sandbox = await start(Egress(domains=("good.test",)))
    await anyio.to_thread.run_sync(space.apply, sandbox.network.space, "flush ruleset")
    for url in (f"http://{internet.a}/", "http://good.test/", f"http://{internet.a}:15001/", "http://192.0.0.1:15001/"):
        assert (await sandbox.get(url)).startswith("curl"), url
    assert not [line for line in internet.seen if not line.startswith("dns")]


async def test_the_filter_alone_holds_a_policy(start, internet):
    """Kernel rules that hand it everything open nothing: it looks at each connection and datagram itself."""
    internet.names({"good.test": [internet.a]})
    sandbox = await start(Egress(https=True, domains=("good.test",), cidrs=(f"{internet.private}/32",)))
    everything = "\n".join(f"add rule {TABLE} allowed meta l4proto {p} tproxy ip to :{n} accept" for p, n in PORTS)
    await anyio.to_thread.run_sync(space.apply, sandbox.network.space, everything)
    for name in ("http://good.test/", "https://good.test:8080/"):
        assert (await sandbox.get(name)).startswith("curl"), name
    before = internet.packets()
    for scheme, address in itertools.product(
        ("http", "https"), (internet.a, internet.metadata, internet.host, STAND_IN)
    ):
        assert (await sandbox.get(f"{scheme}://{address}/")).startswith("curl"), (scheme, address)
    for address in (internet.a, internet.metadata):
        assert (await sandbox.python(DATAGRAM.format(address))).exit_code == 1
    assert internet.packets() == before, "nobody was even dialled"
    assert not [line for line in internet.seen if not line.startswith("dns")]
    assert (await sandbox.python(DATAGRAM.format(internet.private))).stdout == "b'echo x'\n"


async def test_the_kernel_alone_holds_a_policy(node, start, internet):
    """A filter that lets everything through gets nothing to let through."""
    sandbox = await start(Egress(cidrs=(f"{internet.private}/32",)))
    everything = Policy(Egress(http=True, https=True, cidrs=("0.0.0.0/0", f"{internet.private}/32")))
    await node._networks.ask("put", sandbox.network.name, **node._networks.told(everything))
    assert (await sandbox.get(f"http://{internet.a}/")).startswith("curl")
    assert (await sandbox.python(DATAGRAM.format(internet.a))).exit_code == 1
    spoofed = SPOOFED.format(internet.private)
    assert (await sandbox.python(spoofed.replace("SOURCE", "10.9.9.9"))).exit_code == 0
    assert (await sandbox.python(spoofed.replace("SOURCE", "192.0.0.1"))).exit_code == 0
    assert (await sandbox.python(DATAGRAM.format(internet.private))).stdout == "b'echo x'\n"
    assert internet.seen == [f"udp {internet.private} 9999"], "no datagram under an address that is not the guest's"


async def test_the_filter_has_no_rights(node):
    """It parses what hostile guests and servers send."""
    await node._networks.ready()
    status = Path(f"/proc/{node._networks.filter_pid}/status").read_text()
    told = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert told["Uid"].split() == told["Gid"].split() == ["65534"] * 4 and told["Groups"].split() == []
    assert {told[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {"0" * 16}
    assert told["NoNewPrivs"] == "1"


async def test_without_its_filter_nothing_passes_and_no_open_sandbox_is_made(node, start, internet):
    internet.names({"good.test": [internet.a]})
    sandbox = await start(Egress(domains=("good.test",)))
    assert (await sandbox.get("http://good.test/")).startswith("GET")
    pid = node._networks.filter_pid
    os.kill(pid, signal.SIGSTOP)
    internet.forget()
    assert (await sandbox.get("http://good.test/", "-m", "3")).startswith("curl")
    assert internet.seen == []
    os.kill(pid, signal.SIGKILL)
    with anyio.fail_after(30):
        while node._networks.filter_pid in (pid, None):
            await anyio.sleep(0.05)
        await node._networks.ready()
    assert (await sandbox.get("http://good.test/")).startswith("GET"), "a new filter knows what was allowed"


async def test_a_create_fails_when_its_rules_cannot_be_applied(start, monkeypatch):
    def broken(*_):
        raise HostNotReady("nftables: broken for this test")

    monkeypatch.setattr(space, "apply", broken)
    with pytest.raises((HostNotReady, BootFailed), match="broken for this test"):
        await start(Egress(https=True))


async def test_what_is_no_longer_allowed_is_cut(sandbox, internet):
    """Within a second, by name and by range, with a reset; what is still allowed goes on."""
    internet.names({"good.test": [internet.a], "kept.test": [internet.b]})
    await sandbox.allow(domains=("good.test", "kept.test"), cidrs=(f"{internet.private}/32",))
    opened = """
import socket, time
def web(name):
    s = socket.create_connection((name, 80), 10)
    s.sendall(b"POST / HTTP/1.1\\r\\nHost: " + name.encode() + b"\\r\\nContent-Length: 9\\r\\n\\r\\nx")
    return s
good, kept = web("good.test"), web("kept.test")
near = socket.create_connection((PRIVATE, 9999), 10); near.sendall(b"a"); near.recv(1)
""".replace("PRIVATE", repr(internet.private))
    assert (await sandbox.python(opened)).exit_code == 0
    await anyio.sleep(1)
    ended = """
def state(s):
    s.settimeout(1)
    try:
        return "closed" if s.recv(1) == b"" else "data"
    except TimeoutError:
        return "open"
    except OSError as exc:
        return exc.__class__.__name__
print([state(s) for s in (good, near, kept)])
"""
    began = time.monotonic()
    await sandbox.allow(domains=("kept.test",))
    assert time.monotonic() - began < 1
    assert (await sandbox.python(ended)).stdout == "['ConnectionResetError', 'ConnectionResetError', 'open']\n"
    assert [one for one in await sandbox.log() if one.rule == "policy_changed" and one.name == "good.test"]


async def test_a_neighbour_is_nowhere(sandbox, start):
    """Both have the same address; each means itself by it."""
    other = await start(Egress(cidrs=("192.0.0.0/24", "10.0.0.0/8")))
    await other.bash("python3 -m http.server 8000 >/dev/null 2>&1 &")
    await sandbox.allow(http=True, https=True, cidrs=("192.0.0.0/24",))
    assert (await sandbox.get("http://192.0.0.2:8000/")).startswith("curl")
    for address in ("192.0.0.1", "192.0.0.3"):
        assert (await sandbox.get(f"http://{address}:8000/")).startswith("curl")


async def test_connections_are_bounded(sandbox, internet):
    await sandbox.allow(cidrs=(f"{internet.private}/32",))
    code = f"""
import socket
links, alive = [], 0
for _ in range(25):
    try:
        s = socket.create_connection(({internet.private!r}, 9999), 10); links.append(s)
        s.sendall(b"x"); alive += s.recv(1) == b"x"
    except OSError:
        pass
print(alive)
for s in links: s.close()
"""
    assert (await sandbox.python(code)).stdout == "20\n"
    assert [one for one in await sandbox.log() if one.rule == "connections"]
