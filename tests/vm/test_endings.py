"""Sandboxes that end: told to, killed from outside, or dying inside. Nothing of them stays."""

import os
import signal

import anyio
import psutil
import pytest

from instavm.contract.sandboxes import EndReason, SandboxSpec
from instavm.errors import BootFailed, GuestProtocolError, OutcomeUnknown, SessionEnded
from instavm.node.agent import Execution
from instavm.node.machines import Prepared
from instavm.node.vmm.qemu import QemuMachine
from instavm_guest import frames

pytestmark = pytest.mark.anyio


async def until_ended(node, vm_id):
    with anyio.fail_after(30):
        while not any(ended.vm_id == vm_id for ended in node.ended):
            await anyio.sleep(0.02)
    return next(ended for ended in node.ended if ended.vm_id == vm_id)


async def test_stop_is_final_and_may_be_repeated(node, start):
    sandbox = await start()
    pid = sandbox.machine.pid
    await sandbox.stop()
    await sandbox.stop()
    assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(SessionEnded):
        await sandbox.python("print(1)")


async def test_a_vmm_that_is_killed_under_a_running_command(node, start):
    """The caller learns at once that nobody knows whether the code ran."""
    sandbox = await start()
    async with anyio.create_task_group() as tasks:

        async def run():
            with pytest.raises(OutcomeUnknown, match="may or may not have run"):
                await sandbox.bash("sleep 100", timeout_s=200)

        tasks.start_soon(run)
        await anyio.sleep(0.3)
        os.kill(sandbox.machine.pid, signal.SIGKILL)
    assert (await until_ended(node, sandbox.vm_id)).reason is EndReason.CRASHED


async def test_a_kernel_that_panics_ends_its_sandbox(node, start):
    sandbox = await start()
    with pytest.raises(OutcomeUnknown):
        await sandbox.bash("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60", timeout_s=90)
    assert (await until_ended(node, sandbox.vm_id)).reason is EndReason.CRASHED


KILL_ALL_BUT_INIT = "echo 1 > /proc/sys/kernel/sysrq; echo i > /proc/sysrq-trigger; sleep 60"
NOTICED_S = 5


async def test_an_agent_that_root_kills_under_a_command_is_noticed(node, start):
    """From inside it is not to be seen, but the kernel kills it for root. Nobody knows whether the command ran."""
    sandbox = await start()
    with anyio.fail_after(NOTICED_S), pytest.raises(OutcomeUnknown, match="was killed"):
        await sandbox.bash(KILL_ALL_BUT_INIT, timeout_s=200)
    ended = await until_ended(node, sandbox.vm_id)
    assert ended.reason is EndReason.CRASHED and "agent was killed" in ended.detail


async def test_an_agent_that_is_killed_while_nothing_runs_is_noticed_too(node, start):
    """Or the sandbox would look alive, and refuse whatever it is asked."""
    sandbox = await start()
    later = "setsid bash -c 'sleep 1; echo i > /proc/sysrq-trigger' >/dev/null 2>&1 </dev/null &"
    await sandbox.bash("echo 1 > /proc/sys/kernel/sysrq; " + later)
    with anyio.fail_after(NOTICED_S):
        assert "agent was killed" in (await until_ended(node, sandbox.vm_id)).detail
    with pytest.raises(SessionEnded):
        await sandbox.python("print(1)")


async def test_a_command_whose_caller_goes_away_is_stopped_inside(sandbox):
    with anyio.move_on_after(1):
        await sandbox.bash("sleep 1234", timeout_s=200)
    with anyio.fail_after(20):
        while "sleep" in (await sandbox.bash("pgrep -a sleep || true")).stdout:
            await anyio.sleep(0.05)


async def test_a_start_that_is_cancelled_leaves_nothing(node, start):
    with anyio.move_on_after(0.05):
        await start()
    assert node._live == {}


async def test_a_sandbox_that_is_given_nothing_to_do_does_nothing(start):
    """The rehearsal in which templates are saved ends when a clone has become somebody."""
    sandbox = await start()
    process = psutil.Process(sandbox.machine.pid)
    await anyio.sleep(1)
    before = sum(process.cpu_times()[:2])
    await anyio.sleep(3)
    assert sum(process.cpu_times()[:2]) - before < 1.0


async def test_a_program_whose_end_is_asked_for_before_it_began_does_not_live_on(sandbox):
    agent = sandbox.node._live[sandbox.vm_id].prepared.agent
    payload = frames.execute_payload("bash", 60_000, "sleep 2006", {}, None)
    for _ in range(10):
        async with agent.exchange(Execution(None)) as number:  # the block's end cancels it
            await agent.send(frames.EXECUTE, number, payload)
    with anyio.fail_after(20):
        while (await sandbox.bash("pgrep -fx 'sleep 2006' | wc -l")).stdout != "0\n":
            continue


async def test_a_start_that_fails_tells_what_the_console_said(node, monkeypatch):
    """Its VMM is still there and is asked before it is ended."""
    asked = []

    async def fails(*_):
        raise GuestProtocolError("no answer that makes sense")

    async def console(self):
        asked.append(self.pid)
        return "\x1b[31m[ 1.0] Kernel panic\x1b[0m\r\n"

    monkeypatch.setattr(Prepared, "become", fails)
    monkeypatch.setattr(QemuMachine, "console", console)
    with pytest.raises(BootFailed, match="did not come up") as caught:
        await node.start(SandboxSpec("vm-fails", 2, 512))
    assert caught.value.console == "[ 1.0] Kernel panic"
    assert asked and not os.path.exists(f"/proc/{asked[0]}")
