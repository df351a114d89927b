"""Files into and out of a real sandbox: byte-exact, bounded, and never anywhere else."""

import hashlib
import os
from contextlib import aclosing

import anyio
import pytest

from instavm.errors import DiskFull, FileError, FileMissing

pytestmark = pytest.mark.anyio


async def pieces(data, size=100_000):
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def put(sandbox, path, data, name="given.bin"):
    return await sandbox.node.put_file(sandbox.vm_id, path, name, pieces(data))


async def get(sandbox, path):
    async with aclosing(sandbox.node.get_file(sandbox.vm_id, path)) as reading:
        return b"".join([piece async for piece in reading])


async def test_a_file_goes_in_and_comes_out_as_it_was(sandbox):
    data = os.urandom(3_000_001)
    stored = await put(sandbox, "/app/a.bin", data)
    assert (stored.path, stored.size_bytes) == ("/app/a.bin", len(data))
    told = await sandbox.bash("sha256sum < a.bin; ls -A; stat -c '%U %a' a.bin")
    assert told.stdout == f"{hashlib.sha256(data).hexdigest()}  -\na.bin\nroot 644\n"
    assert await get(sandbox, "a.bin") == data
    assert await get(sandbox, "/app/../app/./a.bin") == data


async def test_where_a_file_comes_to_lie(sandbox):
    """Relative paths start at /app; directories are made; a directory takes the file under its own name."""
    assert (await put(sandbox, "new/er/x", b"1")).path == "/app/new/er/x"
    assert (await put(sandbox, "new/er", b"2")).path == "/app/new/er/given.bin"
    assert (await put(sandbox, "/srv/made/", b"3")).path == "/srv/made/given.bin"
    assert (await sandbox.bash("cat new/er/* /srv/made/given.bin")).stdout == "213"


async def test_an_empty_file_and_one_that_replaces_another(sandbox):
    await sandbox.bash("echo old > x; chmod 750 x; ln -s x y")
    assert (await put(sandbox, "y", b"")).path == "/app/x"
    assert await get(sandbox, "x") == b""
    assert (await sandbox.bash("stat -c %a x; test -L y && echo link")).stdout == "750\nlink\n"


async def test_a_file_that_is_mounted_can_be_written_too(sandbox):
    await put(sandbox, "/etc/hosts", b"127.0.0.1 me\n")
    assert (await sandbox.bash("cat /etc/hosts; ls -A /etc | grep part")).stdout == "127.0.0.1 me\n"


@pytest.mark.parametrize(
    "path", ["pipe", "/dev/zero", "/dev/null", "/proc/1/mem", "/proc/self/environ", "/sys/power/state", "."]
)
async def test_what_is_no_file_is_refused_and_nothing_hangs(sandbox, path):
    await sandbox.bash("mkfifo pipe")
    with anyio.fail_after(60):
        with pytest.raises(FileError):
            await get(sandbox, path)
        if path != ".":
            with pytest.raises(FileError):
                await put(sandbox, path, b"x")
    assert (await sandbox.bash("test -p pipe && echo pipe")).stdout == "pipe\n"


async def test_what_is_not_there_is_missing(sandbox):
    for path in ("nope", "/app/no/such", "/etc/passwd/x"):
        with pytest.raises(FileMissing):
            await get(sandbox, path)


async def test_no_path_leads_out_of_the_users_world(sandbox):
    """S12: the agent's own root holds /sandbox, which must not be seen by any spelling."""
    await sandbox.bash("ln -s / up; ln -s /proc/1/root/../.. out")
    for path in ("../../../sandbox/app", "up/sandbox/app", "out/sandbox/app", "/proc/1/root/sandbox/app"):
        with pytest.raises(FileMissing):
            await get(sandbox, path)
    assert (await put(sandbox, "../../../../tmp/x", b"1")).path == "/tmp/x"


async def test_a_full_disk_is_told_and_what_was_there_stays(sandbox):
    await sandbox.bash("mkdir /small; mount -t tmpfs -o size=1m none /small; echo old > /small/x")
    for _ in range(8):  # how much of it is on its way when the disk is full differs each time
        with pytest.raises(DiskFull, match="the sandbox's own disk"):
            await put(sandbox, "/small/x", os.urandom(3 << 20))
    assert (await sandbox.bash("cat /small/x; ls -A /small")).stdout == "old\nx\n"


async def test_an_upload_that_is_broken_off_leaves_nothing(sandbox):
    async def broken():
        yield b"x" * 200_000
        raise ConnectionError("the client went away")

    with pytest.raises(ConnectionError):
        await sandbox.node.put_file(sandbox.vm_id, "/tmp/half/x", "x", broken())
    gone = await sandbox.bash(
        "for i in $(seq 100); do ls -A /tmp/half | grep -q . || break; sleep 0.1; done; ls -A /tmp/half"
    )
    assert gone.stdout == ""


async def test_code_runs_on_while_a_download_waits_for_its_reader(sandbox):
    """Back-pressure holds the file, not the agent."""
    await sandbox.bash("truncate -s 64M big")
    async with aclosing(sandbox.node.get_file(sandbox.vm_id, "big")) as reading:
        first = await anext(reading)
        assert (await sandbox.python("print(1)")).stdout == "1\n"
    assert first == bytes(len(first))
    assert (await sandbox.bash("echo still here")).stdout == "still here\n"


async def test_staged_variables_are_there_for_what_starts_afterwards(sandbox):
    await sandbox.node.stage_env(sandbox.vm_id, {"TOKEN": "s3cret"})
    assert (await sandbox.bash("echo $TOKEN")).stdout == "s3cret\n"
    assert (await sandbox.python("import os; print(os.environ['TOKEN'])")).stdout == "s3cret\n"
    await sandbox.python("os._exit(3)")
    assert (await sandbox.python("import os; print(os.environ['TOKEN'])")).stdout == "s3cret\n", "in a new interpreter"
