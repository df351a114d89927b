"""What one account may have under way at one time: more is refused with the bound's name, and the others are not disturbed."""

import time
from collections import Counter
from contextlib import ExitStack

import httpx
import pytest
from local_node import NODE_FULL_MIB, LocalNode

from instavm import limits
from instavm.control.bounds import Bound
from instavm.errors import NoCapacity, RateLimitError

SLEEPS = {"command": "sleep 1000", "language": "bash"}


@pytest.fixture
def bounded(server, monkeypatch):
    """Set what one of the server's bounds allows."""

    def bound(owner, allowed):
        name = "requests" if owner is server.control else "_bound"
        had = getattr(owner, name)
        made = Bound(had._what, allowed)
        if owner is server.control:
            object.__setattr__(owner, name, made)
            undone.callback(object.__setattr__, owner, name, had)
        else:
            monkeypatch.setattr(owner, name, made)
        return made

    with ExitStack() as undone:
        yield bound


def refused(answer, what, bound):
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (429, "rate_limited")
    assert f"{bound} {what}" in problem["detail"] and "limit" in problem["detail"]
    assert int(answer.headers["Retry-After"]) >= 1


def until(happened):
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_bound_is_of_each_account_and_free_again_afterwards():
    bound = Bound("things", 2)
    with bound.held("a"), bound.held("a"), bound.held("b"):
        with pytest.raises(RateLimitError, match="2 things"):
            bound.take("a")
    with bound.held("a"), bound.held("a"):
        pass
    assert bound._taken == Counter()


def test_streamed_executions_have_a_bound(server, vm, http, bounded):
    bound = bounded(server.control.streams, 2)
    ask = {**SLEEPS, "session_id": vm.session_id}
    with ExitStack() as open_streams:
        ids = [
            open_streams.enter_context(http.stream("POST", "/execute/stream", json=ask)).headers["X-Execution-Id"]
            for _ in range(2)
        ]
        refused(http.post("/execute/stream", json=ask), "streamed executions", 2)
        other = httpx.post(f"{server.url}/execute/stream", json=ask, headers={"X-API-Key": server.other_key})
        assert other.status_code == 404, "the other account has its own bound"
        for one in ids:
            http.post(f"/v1/executions/{one}/cancel")
    until(lambda: not bound._taken)
    assert [event.type for event in vm.stream("echo one", language="bash")] == ["stdout", "result"]


def test_executions_that_wait_for_their_turn_have_a_bound(server, vm, http, bounded):
    bound = bounded(server.control.executions, 1)
    ask = {**SLEEPS, "session_id": vm.session_id}
    with http.stream("POST", "/execute/stream", json=ask) as running:
        until(lambda: bound._taken)
        refused(http.post("/execute", json=ask), "executions", 1)
        http.post(f"/v1/executions/{running.headers['X-Execution-Id']}/cancel")
    until(lambda: not bound._taken)


def test_requests_under_way_have_a_bound_whatever_they_ask_for(server, vm, http, bounded):
    bound = bounded(server.control, 1)
    ask = {**SLEEPS, "session_id": vm.session_id}
    with http.stream("POST", "/execute/stream", json=ask) as running:
        for path in ("/v1/vms", "/v1/users/me", "/v1/executions"):
            refused(http.get(path), "requests", 1)
    until(lambda: not bound._taken)
    assert http.get("/v1/users/me").status_code == 200
    http.post(f"/v1/executions/{running.headers['X-Execution-Id']}/cancel")


def test_uploads_and_downloads_have_a_bound(server, vm, http, bounded):
    bound = bounded(server.control.files, 0)
    form = {"remote_path": "x", "session_id": vm.session_id}
    refused(http.post("/upload", data=form, files={"file": b"x"}), "file transfers", 0)
    refused(http.post("/download", json={"filename": "x", "session_id": vm.session_id}), "file transfers", 0)
    assert not bound._taken


def test_builds_have_a_bound(http, monkeypatch):
    monkeypatch.setattr(limits, "BUILDS_MAX", 1)
    made = http.post("/v1/snapshots", json={"oci_image": "hangs"}).json()
    refused(http.post("/v1/snapshots", json={"oci_image": "hangs"}), "builds of snapshots", 1)
    http.delete(f"/v1/snapshots/{made['id']}")


def test_tasks_have_a_bound(server, vm, http, monkeypatch):
    monkeypatch.setattr(limits, "TASKS_MAX", 1)
    ask = {**SLEEPS, "session_id": vm.session_id}
    assert http.post("/execute_async", json=ask).status_code == 200
    refused(http.post("/execute_async", json=ask), "tasks", 1)


def test_a_full_node_says_when_to_come_back(server, http, monkeypatch):
    """What the node knows of it, as a header and in the body."""

    async def full(self, spec):
        raise NoCapacity("this host is full", 41.5)

    monkeypatch.setattr(LocalNode, "_misbehave", full)
    answer = http.post("/v1/vms", json={"memory_mb": NODE_FULL_MIB})
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "42")
    assert answer.json()["retry_after_s"] == 41.5
