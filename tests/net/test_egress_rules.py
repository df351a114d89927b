"""What a policy lets through, by the table of docs/network.md, seen from inside and from the servers out there."""

import pytest

from instavm.contract.egress import Egress
from instavm.node.trust import Trust

pytestmark = pytest.mark.anyio

REFUSED = ("curl 7", "curl 22", "curl 35", "curl 52", "curl 56")
UNKNOWN = "curl 6"


async def test_listed_names_are_reached_and_nothing_else(sandbox, internet):
    internet.names({"good.test": [internet.a], "other.test": [internet.a], "sub.good.test": [internet.b]})
    await sandbox.allow(domains=("good.test",))
    assert await sandbox.get("http://good.test/x") == f"GET /x at {internet.a}:80 0"
    assert await sandbox.get("https://good.test/y") == f"GET /y at {internet.a}:443 0"
    assert await sandbox.get("http://other.test/") == UNKNOWN
    assert await sandbox.get("http://sub.good.test/") == UNKNOWN
    assert await sandbox.get("http://good.test:8080/") in REFUSED
    assert await sandbox.get(f"http://{internet.a}/") in REFUSED
    assert not any("other.test" in line or "sub.good" in line for line in internet.seen), "nothing was even asked"


async def test_flags_narrow_what_lists_allow(sandbox, internet):
    internet.names({"good.test": [internet.a]})
    await sandbox.allow(http=True, domains=("good.test",))
    assert (await sandbox.get("http://good.test/")).startswith("GET")
    assert await sandbox.get("https://good.test/") in REFUSED
    assert await sandbox.get(f"http://{internet.b}/") in REFUSED


async def test_a_star_stands_for_every_name_below(sandbox, internet):
    internet.names({"a.good.test": [internet.a], "b.a.good.test": [internet.a], "good.test": [internet.a]})
    await sandbox.allow(domains=("*.good.test",))
    assert (await sandbox.get("http://a.good.test/")).startswith("GET")
    assert (await sandbox.get("http://b.a.good.test/")).startswith("GET")
    assert await sandbox.get("http://good.test/") == UNKNOWN
    assert await sandbox.get("http://evilgood.test/") == UNKNOWN


async def test_flags_alone_open_their_port_to_the_public(sandbox, internet):
    internet.names({"any.test": [internet.b]})
    await sandbox.allow(https=True)
    assert await sandbox.get("https://any.test/") == f"GET / at {internet.b}:443 0"
    assert await sandbox.get(f"https://{internet.a}/") == f"GET / at {internet.a}:443 0"
    assert await sandbox.get("http://any.test/") in REFUSED
    for never in (internet.private, internet.metadata, internet.host):
        assert await sandbox.get(f"https://{never}/") in REFUSED
    assert not any(internet.private in line or internet.metadata in line for line in internet.seen)


async def test_ranges_are_reached_on_any_port(sandbox, internet):
    await sandbox.allow(cidrs=(f"{internet.private}/32",))
    assert await sandbox.get(f"http://{internet.private}:8080/") == f"GET / at {internet.private}:8080 0"
    assert await sandbox.get(f"http://{internet.a}/") in REFUSED
    echo = "import socket; s = socket.create_connection(('{}', 9999), 10); s.sendall(b'hi'); print(s.recv(9))"
    assert (await sandbox.python(echo.format(internet.private))).stdout == "b'hi'\n"
    datagram = (
        "import socket; s = socket.socket(2, 2); s.settimeout(10); s.connect(('{}', 9999))\n"
        "s.send(b'hi'); print(s.recv(99)); s.send(b'again'); print(s.recv(99))"
    )
    assert (await sandbox.python(datagram.format(internet.private))).stdout == "b'echo hi'\nb'echo again'\n"
    assert "ConnectionRefusedError" in (await sandbox.python(echo.format(internet.b))).stderr
    assert (await sandbox.python(datagram.format(internet.b))).exit_code == 1


async def test_a_policy_holds_from_the_first_moment(start, internet):
    internet.names({"good.test": [internet.a]})
    sandbox = await start(Egress(domains=("good.test",)))
    assert (await sandbox.get("http://good.test/")).startswith("GET")


async def test_a_name_with_more_than_one_address_is_reached_where_it_answers(sandbox, internet):
    internet.names({"two.test": [internet.private, internet.b]})
    await sandbox.allow(domains=("two.test",))
    assert await sandbox.get("http://two.test/") == f"GET / at {internet.b}:80 0"


async def test_what_goes_through_is_whole(sandbox, internet):
    """Bodies both ways, many requests on one connection, HEAD, and a megabyte."""
    internet.names({"good.test": [internet.a]})
    await sandbox.allow(domains=("good.test",))
    code = """
import http.client
c = http.client.HTTPConnection("good.test", timeout=20)
for n in range(3):
    c.request("POST", f"/{n}", body=b"y" * 100_000); print(c.getresponse().read().decode().split()[-1])
c.request("HEAD", "/h"); r = c.getresponse(); r.read(); print(r.status)
c.request("GET", "/bytes/1000000"); print(len(c.getresponse().read()))
c.request("POST", "/chunked", body=iter([b"a" * 10, b"b" * 20]), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
print(c.getresponse().status)
"""
    done = await sandbox.python(code)
    assert done.stdout == "100000\n100000\n100000\n200\n1000000\n200\n", done.stderr
    log = await sandbox.node.egress_log(sandbox.vm_id)
    assert log.bytes_sent > 300_000 and log.bytes_received > 1_000_000


async def test_what_the_operator_trusts_is_trusted_inside(start, internet):
    """As it is put into templates while they are made, for programs that bring certificates of their own as well."""
    internet.names({"good.test": [internet.a], "other.test": [internet.a]})
    sandbox = await start(Egress(domains=("good.test", "other.test")))

    async def said(command):
        return (await sandbox.bash(command)).stdout

    assert await said("curl -s https://good.test/ || echo curl $?") == "curl 60\n"
    variables = await Trust(internet.folder / "cert.pem").install(sandbox.agent)
    assert await said("curl -s https://good.test/") == f"GET / at {internet.a}:443 0\n"
    assert "curl 60" in await said("curl -s https://other.test/ || echo curl $?")
    named = " ".join(f"{name}={value}" for name, value in variables.items())
    asked = "node -e \"require('https').get('https://good.test/', (r) => console.log(r.statusCode))\""
    assert await said(f"{named} {asked}") == "200\n"
