"""Code that takes all there is: the result says what ended it, and the next call works. The table in docs/execute.md is this."""

import pytest

pytestmark = pytest.mark.anyio


async def next_calls_work(sandbox):
    assert (await sandbox.python("print('next')")).stdout == "next\n"
    assert (await sandbox.bash("ls -d /app")).stdout == "/app\n"


async def test_a_memory_hog_is_ended_with_oom(sandbox):
    hog = "kept = []\nwhile True: kept.append(b'x' * (16 << 20))"
    result = await sandbox.python(hog, timeout_s=120)
    assert (result.exit_code, result.signal, result.reason) == (137, 9, "oom")
    assert result.peak_memory_bytes > 200 << 20
    assert "out of memory" in result.stderr and "variables are gone" in result.stderr
    await next_calls_work(sandbox)
    result = await sandbox.bash("exec python3 -S -c 'kept = [b\"x\" * (16 << 20) for _ in range(99)]'", timeout_s=120)
    assert (result.exit_code, result.reason) == (137, "oom")
    await next_calls_work(sandbox)


async def test_too_many_processes_are_refused_and_told_as_pids(sandbox):
    code = "import os, time\npids = []\nwhile True:\n    pid = os.fork()\n    if not pid: time.sleep(1000)\n    pids.append(pid)"
    result = await sandbox.python(code, timeout_s=120)
    assert (result.exit_code, result.reason) == (1, "pids")
    await next_calls_work(sandbox)


async def test_a_fork_bomb_does_not_keep_the_next_call_from_working(sandbox):
    await sandbox.bash(":(){ :|:& };:")
    await next_calls_work(sandbox)


async def test_a_full_disk_is_told_and_can_be_emptied(sandbox):
    fill = "fallocate -l $(( $(df --output=avail -B1 / | tail -1) - 65536 )) /big; head -c 9000000 /dev/zero > /more"
    result = await sandbox.bash(fill)
    assert (result.exit_code, result.reason) == (1, "disk_full")
    result = await sandbox.python("open('/again', 'wb').write(b'x' * 9_000_000)")
    assert (result.exit_code, result.reason) == (1, "disk_full")
    await sandbox.bash("rm /big /more /again")
    await next_calls_work(sandbox)


async def test_a_hundred_megabytes_without_a_newline_are_cut_in_the_middle(sandbox):
    code = "import os\nos.write(1, b'head')\nfor _ in range(100): os.write(1, b'x' * 1_000_000)\nos.write(1, b'tail');"
    result = await sandbox.python(code, timeout_s=120)
    assert result.truncated
    assert result.stdout.startswith("headxxx") and result.stdout.endswith("xxxtail")
    assert len(result.stdout) < 17 << 20
    await next_calls_work(sandbox)


async def test_bytes_that_are_not_text_are_replaced(sandbox):
    result = await sandbox.python("import os\nos.write(1, bytes(range(256)));")
    assert result.stdout.startswith("\x00\x01") and "\ufffd" in result.stdout
    await next_calls_work(sandbox)


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.closerange(0, 4096)",
        "import os; os._exit(3)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
    ],
)
async def test_an_interpreter_that_is_lost_is_told_and_replaced(sandbox, code):
    result = await sandbox.python(code)
    assert result.reason == "interpreter_crashed"
    assert result.exit_code != 0
    await next_calls_work(sandbox)


async def test_killing_everything_from_inside_leaves_the_agent(sandbox):
    """The agent has no number in the user's world, and pid 1 of it takes no signals."""
    await sandbox.bash("kill -9 -1; kill -9 1; true")
    await next_calls_work(sandbox)
