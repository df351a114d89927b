"""What hostile guests send, read by the filter and by somebody else: nothing passes that the other one reads differently."""

import contextlib
import ssl
import struct
from datetime import UTC, datetime, timedelta

import anyio
import dns.message
import dns.rcode
import h11
import httptools
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instavm import hostnames
from instavm.contract.egress import Egress
from instavm.node.network.filter import hello, names, web
from instavm.node.network.filter.seen import Log, Refused
from instavm.node.network.policy import Policy

NAME = "good.test"

HOSTS = (
    b"good.test|GOOD.test|good.test.|good.test:80|evil.test|good.test\0|good.test evil.test||evil.test@good.test"
    b"|good.test,evil.test|good.test\t|evil.test#good.test|good.test:80:90"
).split(b"|")
TARGETS = (
    b"/|*|//evil.test/|/\\evil.test|http://good.test/a?b|http://evil.test/|HTTP://evil.test/|evil.test/|evil.test:80"
    b"|http://good.test@evil.test/|http://evil.test\\@good.test/|http:///evil.test/|http:/evil.test/|ftp://good.test/"
    b"|http://good.test#@evil.test/|http://good.test?@evil.test/|https://good.test|http://good.test:80/"
).split(b"|")
ANY = st.binary(max_size=20)
NAMES_OF_HEADERS = st.sampled_from(
    [b"Host", b"host", b"Host ", b" Host", b"X", b"Hos\0t", b"X-Host", b"Content-Length", b"Transfer-Encoding"]
)
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\n ", b"\0\r\n"])


@st.composite
def heads(draw):
    method = draw(st.sampled_from([b"GET", b"POST", b"CONNECT", b"OPTIONS", b"get", b"G\0T"]))
    version = draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.1 "]))
    lines = method + b" " + draw(st.sampled_from(TARGETS) | ANY) + b" " + version + draw(ENDS)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(NAMES_OF_HEADERS)
        value = (
            draw(st.sampled_from([b"0", b"chunked", b"5", b"0, 5"]))
            if name[:1] in b"CT"
            else draw(st.sampled_from(HOSTS) | ANY)
        )
        lines += name + b":" + draw(st.sampled_from([b" ", b"", b"\t"])) + value + draw(ENDS)
    return lines + draw(st.sampled_from([b"\r\n", b"\n", b""]))


def passed_on(head):
    """What a server would get of this head; None: it does not pass, or is not whole."""
    talk = h11.Connection(h11.SERVER, max_incomplete_event_size=web.HEAD_MAX)
    talk.receive_data(head)
    request = web._understood(talk)
    if request is h11.NEED_DATA:
        return None
    web._check(request, NAME)
    up = h11.Connection(h11.CLIENT)
    return up.send(h11.Request(method=request.method, target=web._path(request), headers=request.headers.raw_items()))


class Server:
    """Another parser's reading."""

    def __init__(self, data):
        self.hosts, self.urls = [], []
        with contextlib.suppress(httptools.HttpParserUpgrade):
            httptools.HttpRequestParser(self).feed_data(data)

    def on_url(self, url):
        self.urls.append(url)

    def on_header(self, name, value):
        if name.lower() == b"host":
            self.hosts.append(value.decode("latin-1"))


@settings(max_examples=1500, deadline=None)
@given(heads() | st.binary(max_size=200))
@example(b"GET HTTP://evil.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n")
@example(b"GET / HTTP/1.1\r\nHost: evil.test@good.test\r\n\r\n")
def test_a_request_that_passes_is_for_the_same_name_to_a_server(head):
    try:
        data = passed_on(head)
    except Refused as exc:
        assert exc.rule in ("bad_name", "wrong_name", "no_name", "connect", "not_tls_or_http")
        return
    if data is None:
        return
    try:
        server = Server(data)
    except httptools.HttpParserError:
        return
    assert [hostnames.read_authority(one)[0] for one in server.hosts] == [NAME], data
    assert [url[:1] for url in server.urls] in ([b"/"], [b"*"]), data


def certificate(folder):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
    pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "pem").write_bytes(pem + key.private_bytes(*form))
    return folder / "pem"


@pytest.fixture(scope="module")
def openssl(tmp_path_factory):
    """What OpenSSL, as a server, takes for the name in a ClientHello; raises SSLError when it takes it for none."""
    context, heard = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
    context.load_cert_chain(certificate(tmp_path_factory.mktemp("tls")))
    context.sni_callback = lambda _link, name, _context: heard.append(name)

    def read(data):
        heard.clear()
        incoming = ssl.MemoryBIO()
        incoming.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True).do_handshake()
        return heard[0] if heard else None

    return read


def written(name):
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


HELLO = written(NAME)
AT = HELLO.index(NAME.encode())


@settings(max_examples=1000, deadline=None)
@given(
    st.one_of(st.integers(AT - 12, AT + len(NAME) + 8), st.integers(5, len(HELLO) - 1)),
    st.binary(min_size=1, max_size=4),
    st.integers(-8, 8),
)
def test_a_hello_that_passes_is_for_the_same_name_to_openssl(openssl, at, bytes_, grown):
    data = bytearray(HELLO[:at] + bytes_ + HELLO[at + len(bytes_) :])
    if grown > 4:
        data[3:5] = ((data[3] << 8 | data[4]) + grown).to_bytes(2)
        data += b"\0" * grown
    try:
        said = hello.read(bytes(data))
    except (hello.Malformed, hostnames.BadName):
        return
    if said is None or said.name is None or said.encrypted:
        return
    with contextlib.suppress(ssl.SSLError):
        heard = openssl(bytes(data))
        assert heard is None or hostnames.read(heard) == said.name


@settings(max_examples=500)
@given(st.binary(max_size=400), st.booleans())
def test_bytes_that_claim_to_be_a_hello_never_crash(noise, framed):
    data = b"\x16\3\1" + len(noise).to_bytes(2) + noise if framed else noise
    with contextlib.suppress(hello.Malformed, hostnames.BadName):
        hello.read(data)


class Sandbox:
    """As much of one as answering questions takes; whatever is looked up is there."""

    class dialer:
        proxy = "there is one, so that nothing is looked up"

    def __init__(self):
        self.policy, self.log, self.named = Policy(Egress(domains=("good.test", "*.good.test"))), Log(), []

    def stand_in(self, name):
        self.named.append(name)
        return "198.18.1.0"


def labels(question):
    """The name asked for, read without anybody's help; None where it is not written out plainly."""
    found, at = [], 12
    while at < len(question) and (size := question[at]):
        if size > 63:
            return None
        found.append(question[at + 1 : at + 1 + size])
        at += 1 + size
    return b".".join(found).lower() if all(b"." not in one for one in found) else None


LABELS = st.sampled_from([b"good", b"GOOD", b"test", b"evil", b"x", b"good.test", b"test\0", b"-"]) | st.binary(
    max_size=63
)
QUESTIONS = st.lists(LABELS, max_size=5).map(
    lambda found: (
        struct.pack("!6H", 7, 256, 1, 0, 0, 0) + b"".join(bytes([len(one)]) + one for one in found) + b"\0\0\1\0\1"
    )
)


@settings(max_examples=1000, deadline=None)
@given(
    QUESTIONS
    | st.binary(max_size=300)
    | QUESTIONS.flatmap(lambda one: st.binary(max_size=40).map(lambda more: one + more))
)
def test_a_question_that_is_answered_is_about_an_allowed_name(question):
    sandbox = Sandbox()
    said = anyio.run(names.answer, sandbox, question)
    if said is None:
        return
    answer = dns.message.from_wire(said)
    for name in sandbox.named:
        assert sandbox.policy.lookup(name)
        assert labels(question) in (name.encode(), None)
    assert bool(answer.answer) == bool(sandbox.named)
    assert answer.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN, dns.rcode.REFUSED)
