"""The SDK's end of a stream: taken up again where it broke, and given up only when nothing comes any more."""

from contextlib import contextmanager

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instavm.client.streaming import RECONNECTS, Reader, follow
from instavm.errors import NetworkError
from instavm.wire.streams import ID_HEADER, Text

RESULT = '{"stdout": "", "stderr": "", "exit_code": 0, "truncated": false}'


class Pieces(httpx.SyncByteStream):
    def __init__(self, pieces):
        self.pieces = pieces

    def __iter__(self):
        for piece in self.pieces:
            if piece is None:
                raise httpx.ReadError("broken")
            yield piece


class Broken:
    """A server whose connections break after as many pieces as it is told."""

    def __init__(self, *connections):
        self.connections = list(connections)
        self.asked = []

    @contextmanager
    def opened(self, call):
        self.asked.append((call.method, call.path, dict(call.params)))
        headers = {ID_HEADER: "exe_1", "Content-Type": "text/event-stream; charset=utf-8"}
        yield httpx.Response(200, headers=headers, stream=Pieces(self.connections.pop(0)))


def event(number, kind, data):
    return f"id: {number}\nevent: {kind}\ndata: {data}\n\n".encode()


def reader():
    return Reader("0b0f7c7e-0000-4000-8000-000000000000", "x", "python", None)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("instavm.client.streaming.FIRST_PAUSE_S", 0.0)


def test_a_broken_stream_is_taken_up_behind_the_last_whole_event():
    second = event(2, "stdout", '{"text": "b"}')
    server = Broken(
        [event(1, "stdout", '{"text": "a"}'), second[:20], None],
        [b": follows\n\n", second, event(3, "result", RESULT)],
    )
    found = list(follow(server, reader()))
    assert [one.get("text") for one in found] == ["a", "b", None]
    assert found[-1].result.stdout == "ab"
    assert not found[-1].result.truncated
    assert server.asked == [("POST", "/execute/stream", {}), ("GET", "/v1/executions/exe_1/stream", {"after": "1"})]


def test_the_code_is_sent_once_even_if_nothing_came_back():
    server = Broken([None], *[[None]] * RECONNECTS)
    with pytest.raises(NetworkError):
        list(follow(server, reader()))
    assert [method for method, *_ in server.asked] == ["POST"] + ["GET"] * RECONNECTS


def test_what_the_server_could_not_keep_is_missing_and_told():
    server = Broken([event(5, "stdout", '{"text": "late"}'), event(6, "result", RESULT)])
    assert list(follow(server, reader()))[-1].result.truncated


@given(st.text(st.characters(codec="utf-8")), st.integers(1, 64))
def test_text_arrives_as_it_was_sent_wherever_a_connection_cuts_it(text, size):
    whole = event(1, "stdout", Text(text=text).model_dump_json()) + event(2, "result", RESULT)
    server = Broken([whole[start : start + size] for start in range(0, len(whole), size)])
    assert list(follow(server, reader()))[-1].result.stdout == text


BROKEN = [b"id: 1\nevent: stdout\ndata: {\n\n", b"event: stdout\ndata: {}\n\n", b"id: 1\nevent: stdout\ndata: {}\n\n"]


@pytest.mark.parametrize("broken", BROKEN)
def test_events_that_cannot_be_read_are_an_error_of_ours(broken):
    with pytest.raises(NetworkError, match="cannot be read"):
        list(follow(Broken(*[[broken]] * (RECONNECTS + 1)), reader()))
