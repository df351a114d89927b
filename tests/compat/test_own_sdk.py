"""The same checks through our own client, sync and async, from one definition of the calls."""

import functools
import hashlib
import os
import uuid

import anyio.to_thread
import pytest

from instavm import AsyncInstaVM, ExecutionError, FileError, FileMissing, InstaVM, InvalidInput, SessionEnded

pytestmark = pytest.mark.anyio


class InThread:
    """A blocking client with the face of the async one: each method runs in a thread."""

    def __init__(self, client):
        self._client = client

    def __getattr__(self, name):
        value = getattr(self._client, name)
        if not callable(value):
            return value

        async def call(*args, **more):
            return await anyio.to_thread.run_sync(functools.partial(value, *args, **more))

        return call

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        await anyio.to_thread.run_sync(self._client.__exit__, *exc)


async def blocking(key, url, **more):
    return InThread(await anyio.to_thread.run_sync(lambda: InstaVM(key, url, **more)))


async def asynchronous(key, url, **more):
    return AsyncInstaVM(key, url, **more)


@pytest.fixture(params=[blocking, asynchronous], ids=["sync", "async"])
async def client(request, served, anyio_backend):
    async def client(**more):
        return await request.param(served.key, served.url, **more)

    return client


async def test_a_session_from_begin_to_end(client):
    async with await client(metadata={"m": uuid.uuid4().hex}, env={"DATABASE_URL": "postgres://x"}) as vm:
        result = await vm.execute("print(6*7)")
        assert (result.stdout, result.stderr, result.exit_code) == ("42\n", "", 0)
        await vm.execute("x = 42")
        assert (await vm.execute("print(x)")).stdout == "42\n"
        assert (await vm.execute("pwd; echo $DATABASE_URL", language="bash")).stdout == "/app\npostgres://x\n"
        assert (await vm.execute("exit 7", language="bash")).exit_code == 7
        assert (await vm.execute("!echo hi")).stdout == "hi\n"
        status = await vm.get_session_status()
        assert (status.vm_alive, status.vm_status, await vm.is_session_active()) == (True, "active", True)
        info = await vm.get_session_info()
        assert [one.sandbox_id for one in await vm.list_sandboxes(metadata=info.metadata)] == [status.vm_id]
        assert (await vm.get_usage()).execution_count == 6
        with pytest.raises((InvalidInput, ExecutionError)):
            await vm.execute("print(1)", language="cobol")
        await vm.kill()
        assert vm.session_id is None
        with pytest.raises(SessionEnded):
            await vm.execute("1")


async def test_files_and_tasks(client, tmp_path):
    data = os.urandom(1 << 20)
    (tmp_path / "a.bin").write_bytes(data)
    async with await client() as vm:
        assert (await vm.upload_file(tmp_path / "a.bin", "in/")).remote_path == "/app/in/a.bin"
        told = (await vm.execute("sha256sum < in/a.bin", language="bash")).stdout
        assert told == f"{hashlib.sha256(data).hexdigest()}  -\n"
        assert (await vm.download_file("in/a.bin")).content == data
        await vm.download_file("in/a.bin", tmp_path / "b.bin")
        assert (tmp_path / "b.bin").read_bytes() == data
        with pytest.raises(FileMissing):
            await vm.download_file("nope")
        with pytest.raises(FileError):
            await vm.download_file("in")
        task = await vm.execute_async("echo done; exit 3", language="bash")
        result = await vm.get_task_result(task.task_id, poll_interval=0.1)
        assert (result.stdout, result.exit_code, result.status) == ("done\n", 3, "failed")
