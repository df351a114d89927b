"""One reading of host names: what is taken, what is not, and that nobody else reads differently what is taken."""

import dns.exception
import dns.name
import idna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instavm import hostnames
from instavm.hostnames import BadName

PLAIN = {
    "good.test": "good.test",
    "GOOD.Test": "good.test",
    "good.test.": "good.test",
    "_srv._tcp.good.test": "_srv._tcp.good.test",
    "xn--bcher-kva.example": "xn--bcher-kva.example",
    "1e100.net": "1e100.net",
    "localhost": "localhost",
    "a" * 63 + ".test": "a" * 63 + ".test",
}
BAD = (
    *("", ".", "good.test..", ".good.test", "good..test", "-good.test", "good-.test", "a" * 64 + ".test"),
    *("good.test\0", "evil.test\0.good.test", "good\n.test", "good.test\n", "good.test\t", " good.test", "good test"),
    *("good%2etest", "good.test%00", "user@good.test", "good.test:80", "good.test/", "good.test\\", "[::1]", "::1"),
    *("127.0.0.1", "0x7f.1", "0x7f.0.0.1", "2130706433", "017700000001", "127.1", "1.2.3.4.", "a.0x", "good.0x1f"),
    *(
        "bücher.example",
        "good\u3002test",
        "\u212aelvin.test",
        "good\xad.test",
        "*",
        "*.good.test",
        "good.test,evil.test",
    ),
    ".".join(["a" * 63] * 4),
)


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_name(text):
    assert hostnames.read(text) == PLAIN[text]


@pytest.mark.parametrize("text", BAD)
def test_what_is_none_is_refused_and_not_repaired(text):
    with pytest.raises(BadName):
        hostnames.read(text)
    with pytest.raises(BadName):
        hostnames.read_authority(f"{text}:80")


@pytest.mark.parametrize(("text", "port"), [("Good.test", None), ("good.test:80", 80), ("good.test.:65535", 65535)])
def test_a_name_with_a_port(text, port):
    assert hostnames.read_authority(text) == ("good.test", port)


@pytest.mark.parametrize(
    "text", ["good.test:", "good.test:x", "good.test:80:90", "good.test:65536", "good.test:+8", "good.test:٨"]
)
def test_a_port_that_is_none(text):
    with pytest.raises(BadName):
        hostnames.read_authority(text)


def test_people_may_type_letters_beyond_ascii():
    assert hostnames.read_typed(" Bücher.example ") == "xn--bcher-kva.example"
    assert hostnames.read_typed("ｇｏｏｄ。test") == "good.test"
    with pytest.raises(BadName):
        hostnames.read_typed("１２７.０.０.１")


@given(st.text(st.sampled_from("aZ0-_.xX%@:\0\n\t é。"), max_size=40) | st.text(max_size=300))
def test_what_is_taken_reads_the_same_for_others(text):
    """dnspython and idna agree on every name that is taken, and reading it again changes nothing."""
    try:
        name = hostnames.read(text)
    except BadName:
        return
    assert hostnames.read(name) == name
    assert dns.name.from_text(text).to_text(omit_final_dot=True).lower() == name
    if "_" not in name and "xn--" not in name:
        assert idna.encode(text, uts46=True).decode().rstrip(".") == name


@given(st.text(max_size=300))
def test_what_is_shown_in_a_log_is_one_line_of_ascii(text):
    shown = hostnames.shown(text)
    assert shown.isascii() and shown.isprintable() and len(shown) <= hostnames.NAME_MAX


@given(st.binary(max_size=64))
def test_names_as_dns_carries_them(label):
    """A label of any bytes is shown with escapes, which no name that is taken has."""
    try:
        text = dns.name.Name([label, b"test", b""]).to_text(omit_final_dot=True)
    except dns.exception.DNSException:
        return
    try:
        name = hostnames.read(text)
    except BadName:
        return
    assert name.encode() == label.lower() + b".test"
