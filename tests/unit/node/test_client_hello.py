"""The name in a ClientHello: as a real client writes it, in pieces, and made up by somebody who wants something."""

import contextlib
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instavm.hostnames import BadName
from instavm.node.network.filter.hello import Hello, Malformed, read


def written(name):
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    link = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        link.do_handshake()
    return outgoing.read()


HELLO = written("Good.Example")


def in_records(record, size):
    """The same message, cut into records of `size` bytes."""
    body = record[5:]
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(record[:3] + len(part).to_bytes(2) + part for part in parts)


def test_a_real_one():
    assert read(HELLO) == Hello("good.example", False)
    assert read(written(None)) == Hello(None, False)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_one_in_many_records(size):
    assert read(in_records(HELLO, size)) == Hello("good.example", False)


@given(st.integers(0, len(HELLO) - 1))
def test_a_part_of_one_is_not_yet_one(length):
    assert read(HELLO[:length]) is None


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",
    ],
)
def test_what_is_none(data):
    with pytest.raises(Malformed):
        read(data)


@given(st.binary(max_size=400))
def test_noise_is_refused_or_incomplete(noise):
    with contextlib.suppress(Malformed, BadName):
        assert read(noise) is None or read(noise).name is None or noise[:1] == b"\x16"


@given(st.integers(5, len(HELLO) - 1), st.binary(min_size=1, max_size=3))
def test_an_altered_one_never_raises_anything_else(at, bytes_):
    with contextlib.suppress(Malformed, BadName):
        read(HELLO[:at] + bytes_ + HELLO[at + len(bytes_) :])
