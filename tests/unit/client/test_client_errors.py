"""Every error goes out through one table and comes back through the other as the same class."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instavm import errors
from instavm.client.errors import BY_STATUS, from_answer, retry_after_s, tree
from instavm.control.api.errors import answer, status_of

ALL = sorted(set(tree()), key=lambda kind: kind.__name__)


def example(kind):
    if issubclass(kind, errors.InvalidInput):
        return kind("memory_mb", 9, "256 to 8192")
    return kind("what happened")


@pytest.mark.parametrize("kind", ALL)
def test_an_error_comes_back_as_what_it_was(kind):
    sent = answer(example(kind))
    back = from_answer(sent.status_code, sent.body)
    assert type(back) is kind
    assert str(back) == str(example(kind))
    if issubclass(kind, errors.InvalidInput):
        assert (back.field, back.allowed) == ("memory_mb", "256 to 8192")


@pytest.mark.parametrize("kind", ALL)
def test_every_error_has_a_status_and_a_code_of_its_own(kind):
    assert 400 <= status_of(example(kind)) <= 599
    assert [other for other in ALL if other.code == kind.code] == [kind]
    body = json.loads(answer(example(kind)).body)
    assert isinstance(body, dict)
    assert body["detail"]


def test_a_status_alone_is_enough_for_servers_that_send_no_code():
    for status, kind in BY_STATUS.items():
        back = from_answer(status, b'{"detail": "why"}')
        assert type(back) is kind
        assert "why" in str(back)


@given(st.integers(300, 599), st.binary(max_size=200))
def test_whatever_comes_back_is_some_error_of_ours(status, body):
    assert isinstance(from_answer(status, body), errors.InstaVMError)


PAGE = b"<html><head><title>502 Bad\nGateway</title><style>h1 {color: red}</style></head><body><h1>nginx</h1>"


def test_a_page_of_a_proxy_is_told_by_its_words():
    exc = from_answer(502, PAGE)
    assert (type(exc), str(exc)) == (errors.NetworkError, "502 Bad Gateway: 502 Bad Gateway")
    assert str(from_answer(503, b"<script>1<2</script><p>Down &amp; out")) == "503 Service Unavailable: Down & out"
    assert str(from_answer(500, b"")) == "500 Internal Server Error: no detail was given"
    assert len(str(from_answer(502, b"<html>" + b"x" * 10_000))) < 600


def test_a_redirect_says_where_to():
    exc = from_answer(308, b"", {"location": "https://x/"}, "http://x")
    assert isinstance(exc, errors.NetworkError)
    assert "base_url http://x redirects to https://x/ (308)" in str(exc)


@pytest.mark.parametrize("body", [b'{"detail": "Not Found", "code": "not_found"}', b"<title>404 Not Found</title>", b""])
def test_an_address_that_is_not_there_points_at_base_url(body):
    assert "the client adds /v1 by itself" in str(from_answer(404, body, {}, "http://x/v1"))
    assert "does base_url point at" in str(from_answer(404, body, {}, "http://x"))


def test_when_to_try_again_reaches_the_caller():
    sent = answer(errors.NoCapacity("the host is full", retry_after_s=7))
    back = from_answer(sent.status_code, sent.body, sent.headers)
    assert (type(back), back.retry_after_s) == (errors.NoCapacity, 7.0)
    assert from_answer(429, b'{"detail": "slow"}').retry_after_s is None


@pytest.mark.parametrize(("header", "seconds"), [("3", 3.0), ("Mon, 01 Jan 2001 00:00:00 GMT", 0.0), ("soon", None), ("", None)])
def test_a_time_to_wait_is_seconds_or_a_date(header, seconds):
    assert retry_after_s(header) == seconds
