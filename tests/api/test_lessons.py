"""Faults that other systems had: a revoked key that lives on in a cache, timeouts of nothing, broken streams told as success."""

import anyio
import httpx
import pytest
from test_streams import events

from instavm import InstaVMError
from instavm.control.accounts import KeyedAccounts, Keys
from instavm.control.rates import Rates
from instavm.control.store.database import open_accounts
from instavm.errors import AuthenticationError, OutcomeUnknown


@pytest.mark.anyio
async def test_a_key_revoked_while_it_is_looked_up_is_not_believed_afterwards(tmp_path, monkeypatch):
    async with open_accounts(tmp_path / "db") as rows:
        keys, accounts = Keys(rows), KeyedAccounts(rows, Rates(100, 100))
        key_id, key = await keys.create("mine")
        found, goes_on, look = anyio.Event(), anyio.Event(), rows.by_hash

        async def slowly(hashed):
            row = await look(hashed)
            found.set()
            await goes_on.wait()
            return row

        monkeypatch.setattr(rows, "by_hash", slowly)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(accounts.tenant_of, key)
            await found.wait()
            await keys.revoke(key_id)
            accounts.forget()
            goes_on.set()
        with pytest.raises(AuthenticationError):
            await accounts.tenant_of(key)


@pytest.mark.parametrize("wrong", [0, -1, -0.5, 0.5, "1", True, 1e308, None])
@pytest.mark.parametrize("path", ["/execute", "/execute_async", "/execute/stream"])
def test_a_timeout_of_nothing_is_refused(vm, http, path, wrong):
    ask = {"command": "1", "session_id": vm.session_id, "timeout": wrong}
    allowed = wrong is None or (wrong == 1e308 and path == "/execute_async")
    answer = http.post(path, json=ask)
    assert answer.status_code == (200 if allowed else 422), answer.text
    assert allowed or answer.json()["field"] == "timeout"


@pytest.mark.parametrize("wrong", [-1, -0.001, 61, "1", True])
def test_a_wait_of_less_than_nothing_is_refused(vm, http, wrong):
    answer = http.post(f"/v1/sessions/{vm.session_id}/processes/prc_1/wait", json={"timeout": wrong})
    assert (answer.status_code, answer.json()["field"]) == (422, "timeout")


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("error", [OutcomeUnknown("the sandbox was lost"), RuntimeError("nobody foresaw this")])
def test_a_download_that_fails_midway_is_no_success(server, vm, http, monkeypatch, raw, error):
    async def breaks(vm_id, path):
        yield b"first"
        raise error

    monkeypatch.setattr(server.node, "get_file", breaks)
    headers = {"Accept": "application/octet-stream"} if raw else {}
    with pytest.raises(httpx.RemoteProtocolError):
        http.post("/download", json={"filename": "x", "session_id": vm.session_id}, headers=headers)
    with pytest.raises(InstaVMError):
        vm.download_file("x")


@pytest.mark.parametrize("error", [OutcomeUnknown("the sandbox was lost"), RuntimeError("nobody foresaw this")])
def test_a_stream_that_fails_ends_with_an_error(server, vm, http, monkeypatch, error):
    async def breaks(vm_id, command, on_output=None):
        on_output("stdout", b"first")
        raise error

    monkeypatch.setattr(server.node, "execute", breaks)
    ask = {"command": "1", "session_id": vm.session_id}
    with http.stream("POST", "/execute/stream", json=ask) as response:
        told = [kind for _, kind, _ in events(response)]
    assert told == ["stdout", "error"]
