"""What a sandbox's network refuses while a command runs comes with its result; what it refuses at other times does not."""

import anyio
import pytest

from instavm.node.network.witness import KEPT

pytestmark = pytest.mark.anyio


def told(done):
    return {(one.name or one.address, one.port, one.protocol, one.rule): one.count for one in done.refused}


async def test_by_filter_and_kernel_and_only_while_it_runs(sandbox, internet):
    done = await sandbox.bash(f"curl -s http://evil.test/; curl -s http://{internet.a}:81/; true")
    assert done.exit_code == 0
    assert {("evil.test", 53, "dns", "no_rule"), (internet.a, 81, "tcp", "no_rule")} <= told(done).keys()
    assert (await sandbox.bash("false")).refused == (), "nothing of the one before"
    await sandbox.bash("(sleep 1; curl -s http://late.test/) >/dev/null 2>&1 &")
    await anyio.sleep(3)
    assert (await sandbox.bash("true")).refused == (), "nor of what happened in between"


async def test_what_is_allowed_and_does_not_answer_is_no_refusal(sandbox, internet):
    internet.names({"good.test": [internet.a]})
    await sandbox.allow(domains=("good.test", "gone.test"))
    done = await sandbox.bash("curl -s http://good.test/; curl -s http://gone.test/; true")
    assert done.refused == ()
    done = await sandbox.bash("curl -s -H 'Host: evil.test' http://good.test/")
    assert told(done) == {("good.test", 80, "tcp", "wrong_name"): 1} and '"wrong_name"' in done.stdout


async def test_commands_at_the_same_time_are_each_told_and_the_list_is_bounded(sandbox, internet):
    code = f"for n in $(seq 100 160); do timeout 5 bash -c '</dev/tcp/{internet.a}/'$n; done 2>/dev/null; true"
    found = []

    async def run(code):
        found.append(await sandbox.bash(code))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, code)
        tasks.start_soon(run, code)
    assert [len(one.refused) for one in found] == [KEPT, KEPT]


async def test_pip_under_a_closed_policy_tries_once_more_and_says_so(sandbox):
    done = await sandbox.bash("pip install iniconfig")
    assert done.exit_code != 0 and done.stderr.count("Retrying") == 1
    assert [one.registry for one in done.refused] == [True]
    assert (await sandbox.python("!echo $PIP_RETRIES")).stdout == "1\n", "also as a line of a notebook"
    assert 'Acquire::Retries "1"' in (await sandbox.bash("apt-config dump Acquire::Retries")).stdout
    assert (await sandbox.bash("echo $PIP_RETRIES $UV_HTTP_RETRIES $npm_config_fetch_retries")).stdout == "1 1 1\n"
