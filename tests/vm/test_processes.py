"""Processes in the background of a real sandbox: they are kept there, with what they write, and tell it to who asks."""

import itertools
import signal

import anyio
import pytest

from instavm.contract.processes import ProcessSpec
from instavm.errors import ProcessEnded, ProcessError, ProcessNotFound, RateLimitError

pytestmark = pytest.mark.anyio
NAMES = itertools.count(1)
MIB = 1 << 20


async def begin(sandbox, *argv, cwd="/app", **env):
    spec = ProcessSpec(f"prc_test{next(NAMES)}", argv, " ".join(argv), cwd, env)
    return await sandbox.node.start_process(sandbox.vm_id, spec)


async def bash(sandbox, line, **more):
    return await begin(sandbox, "bash", "-c", line, **more)


async def read(sandbox, process, since=0, until="end", timeout_s=60.0, size=MIB):
    return await sandbox.node.read_process(sandbox.vm_id, process.id, since, size, until, timeout_s)


def text(log, *channels):
    return b"".join(data for channel, data in log.pieces if channel in (channels or ("stdout", "stderr"))).decode()


async def test_it_runs_on_and_its_output_and_end_are_told_later(sandbox):
    process = await bash(sandbox, "echo $WHO in $PWD; echo oops >&2; exit 3", cwd="/tmp", WHO="me")
    assert process.pid > 1 and process.ended is None
    log = await read(sandbox, process)
    assert (text(log, "stdout"), text(log, "stderr")) == ("me in /tmp\n", "oops\n")
    assert (log.state.ended.exit_code, log.state.ended.signal, log.state.ended.reason) == (3, None, None)
    assert (log.next, log.lost) == (len("me in /tmp\noops\n"), 0)
    assert [one.id for one in await sandbox.node.processes(sandbox.vm_id)] == [process.id]


async def test_a_program_without_a_shell_gets_its_arguments_as_they_are(sandbox):
    log = await read(sandbox, await begin(sandbox, "printf", "%s|", "a b", "$HOME", "*"))
    assert text(log) == "a b|$HOME|*|"


@pytest.mark.parametrize(
    ("argv", "cwd", "exit_code", "says"),
    [(["no-such-program"], "/app", 127, "not found"), (["true"], "/no/such/folder", 126, "/no/such/folder")],
)
async def test_what_cannot_be_started_ends_and_says_why(sandbox, argv, cwd, exit_code, says):
    log = await read(sandbox, await begin(sandbox, *argv, cwd=cwd))
    assert log.state.ended.exit_code == exit_code and says in text(log, "stderr")


async def test_output_is_waited_for_and_read_on_where_one_was(sandbox):
    process = await bash(sandbox, "echo one; read line; echo two $line")
    first = await read(sandbox, process, until="more")
    assert text(first) == "one\n"
    later = await read(sandbox, process, first.next, until="more", timeout_s=0.2)
    assert text(later) == "" and later.state.ended is None, "there was nothing in time"
    await sandbox.node.write_process(sandbox.vm_id, process.id, b"words\n", False)
    assert text(await read(sandbox, process, first.next)) == "two words\n"


async def test_stdin_takes_more_than_a_pipe_holds_and_comes_to_its_end(sandbox):
    process = await bash(sandbox, "sleep 0.3; sha256sum; wc -c </dev/stdin")
    data = bytes(range(256)) * 4000
    await sandbox.node.write_process(sandbox.vm_id, process.id, data, True)
    log = await read(sandbox, process)
    digest = (
        await sandbox.python("import hashlib; print(hashlib.sha256(bytes(range(256)) * 4000).hexdigest())")
    ).stdout
    assert text(log).startswith(digest.strip())


async def test_stdin_that_is_full_closed_or_of_an_ended_process_is_refused(sandbox):
    deaf = await bash(sandbox, "sleep 1000")
    await sandbox.node.write_process(sandbox.vm_id, deaf.id, b"x" * MIB, False)
    with pytest.raises(ProcessError, match="does not read"):
        await sandbox.node.write_process(sandbox.vm_id, deaf.id, b"x" * MIB, False)
    await sandbox.node.write_process(sandbox.vm_id, deaf.id, b"", True)
    with pytest.raises(ProcessError, match="closed"):
        await sandbox.node.write_process(sandbox.vm_id, deaf.id, b"x", False)
    await sandbox.node.signal_process(sandbox.vm_id, deaf.id, signal.SIGTERM)
    assert (await read(sandbox, deaf)).state.ended.signal == signal.SIGTERM
    for refused in (
        sandbox.node.write_process(sandbox.vm_id, deaf.id, b"x", False),
        sandbox.node.signal_process(sandbox.vm_id, deaf.id, signal.SIGTERM),
    ):
        with pytest.raises(ProcessEnded):
            await refused
    with pytest.raises(ProcessNotFound):
        await sandbox.node.signal_process(sandbox.vm_id, "prc_other", signal.SIGTERM)


async def test_a_signal_reaches_the_group_and_a_kill_everything(sandbox):
    """Also what took itself out of the group, and ignores what can be ignored; also after the end of the first."""
    away = "setsid bash -c 'trap \"\" TERM; echo set; sleep 2001'"
    tree = f"trap 'echo got it; exit 5' TERM; {away} & sleep 2002 & wait"
    process = await bash(sandbox, tree)
    await read(sandbox, process, until="more")
    await sandbox.node.signal_process(sandbox.vm_id, process.id, signal.SIGTERM)
    log = await read(sandbox, process)
    assert (text(log), log.state.ended.exit_code) == ("set\ngot it\n", 5)
    assert (await sandbox.bash("pgrep -fx 'sleep 200[12]' | wc -l")).stdout == "1\n"
    await sandbox.node.signal_process(sandbox.vm_id, process.id, signal.SIGKILL)
    with anyio.fail_after(20):
        while (await sandbox.bash("pgrep -fx 'sleep 200[12]' | wc -l")).stdout != "0\n":
            continue
    other = await bash(sandbox, "sleep 2003 & sleep 2004")
    await sandbox.node.signal_process(sandbox.vm_id, other.id, signal.SIGKILL)
    assert ((await read(sandbox, other)).state.ended.exit_code, other.pid > 0) == (137, True)


async def test_a_kill_right_after_the_start_is_not_lost(sandbox):
    for _ in range(10):
        process = await bash(sandbox, "sleep 2005")
        await sandbox.node.signal_process(sandbox.vm_id, process.id, signal.SIGKILL)
        assert (await read(sandbox, process)).state.ended.exit_code == 137


async def test_endless_output_keeps_its_latest_part_and_counts_what_is_lost(sandbox):
    """Nobody reads it: it costs the host nothing, and the agent a bounded part of its memory."""
    process = await bash(sandbox, "head -c 20000000 /dev/zero | tr '\\0' x; echo the end")
    log = await read(sandbox, process)
    assert log.state.log_end == 20_000_008 and text(log).endswith("xxxthe end\n")
    assert log.lost == log.state.log_begin > 20_000_000 - MIB
    assert log.lost + sum(len(data) for _, data in log.pieces) == log.next == log.state.log_end


async def test_many_that_write_share_what_is_kept(sandbox):
    processes = [await bash(sandbox, "head -c 3000000 /dev/zero") for _ in range(12)]
    logs = [await read(sandbox, process, until="end", size=0) for process in processes]
    states = [(await read(sandbox, process, until="now", size=0)).state for process in processes]
    assert all(log.state.ended.exit_code == 0 for log in logs)
    assert sum(state.log_end - state.log_begin for state in states) <= 8 * MIB
    assert all(state.log_end > state.log_begin for state in states)


async def test_there_may_be_so_many_and_the_ended_ones_are_forgotten_in_order(start):
    sandbox = await start()
    running = [await begin(sandbox, "sleep", "1000") for _ in range(64)]
    with pytest.raises(RateLimitError, match="64"):
        await begin(sandbox, "sleep", "1000")
    for process in running:
        await sandbox.node.signal_process(sandbox.vm_id, process.id, signal.SIGKILL)
        await read(sandbox, process)
    await begin(sandbox, "true")
    known = await sandbox.node.processes(sandbox.vm_id)
    assert len(known) == 32 and {one.id for one in running[-31:]} < {one.id for one in known}


async def test_a_kill_does_not_touch_other_calls_and_a_timeout_no_process(sandbox):
    process = await bash(sandbox, "echo on; sleep 1000")
    other = await bash(sandbox, "sleep 1000")
    await sandbox.bash("sleep 100", timeout_s=1)
    await sandbox.python("while True: pass", timeout_s=1)
    await sandbox.node.signal_process(sandbox.vm_id, other.id, signal.SIGKILL)
    assert (await read(sandbox, process, until="now")).state.ended is None
    assert (await sandbox.bash("pgrep -fxc 'sleep 1000'")).stdout == "1\n"


async def test_a_process_that_needs_too_much_memory_says_so(sandbox):
    process = await begin(sandbox, "python3", "-S", "-c", "kept = [b'x' * (16 << 20) for _ in range(99)]")
    end = (await read(sandbox, process, timeout_s=120)).state.ended
    assert (end.exit_code, end.reason) == (137, "oom")
    assert (await sandbox.python("print('next')")).stdout == "next\n"
