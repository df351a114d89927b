"""The SDK's end of a stream: taken up again where it broke, and given up only when nothing comes any more."""

from contextlib import contextmanager

import httpx
import pytest

from instavm.client.streaming import RECONNECTS, Reader, follow
from instavm.errors import NetworkError
from instavm.wire.streams import ID_HEADER

RESULT = '{"stdout": "", "stderr": "", "exit_code": 0, "truncated": false}'


class Broken:
    """A server whose connections break after as many lines as it is told."""

    def __init__(self, *connections):
        self.connections = list(connections)
        self.asked = []
        self.headers = {ID_HEADER: "exe_1"}

    @contextmanager
    def opened(self, call):
        self.asked.append((call.method, call.path, dict(call.params)))
        self.lines = self.connections.pop(0)
        yield self

    def iter_lines(self):
        for line in self.lines:
            if line is None:
                raise httpx.ReadError("broken")
            yield line


def event(number, kind, data):
    return [f"id: {number}", f"event: {kind}", f"data: {data}", ""]


def reader():
    return Reader("0b0f7c7e-0000-4000-8000-000000000000", "x", "python", None)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("instavm.client.streaming.FIRST_PAUSE_S", 0.0)


def test_a_broken_stream_is_taken_up_behind_the_last_whole_event():
    half = event(2, "stdout", '{"text": "b"}')[:2]
    server = Broken(
        [*event(1, "stdout", '{"text": "a"}'), *half, None],
        [": follows", "", *event(2, "stdout", '{"text": "b"}'), *event(3, "result", RESULT)],
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
    server = Broken([*event(5, "stdout", '{"text": "late"}'), *event(6, "result", RESULT)])
    assert list(follow(server, reader()))[-1].result.truncated
