"""Running out of time: what was printed is told, what was started is gone, what was there before stays."""

import anyio
import pytest

from instavm.contract.executions import Command

pytestmark = pytest.mark.anyio


async def test_children_of_the_cell_end_with_it_and_older_ones_stay(sandbox):
    older = "import subprocess\nolder = subprocess.Popen(['sleep', '1001'])"
    await sandbox.python(older)
    stubborn = "subprocess.run('trap \"\" TERM INT; sleep 1002 & sleep 1003', shell=True)"
    code = "x = 5\nprint('begun')\nprint('half', end='')\n" + stubborn
    result = await sandbox.python(code, timeout_s=2)
    assert (result.exit_code, result.reason, result.timed_out, result.stdout) == (124, "timeout", True, "begun\nhalf")
    assert (await sandbox.bash("pgrep -fx 'sleep 100[23]'")).stdout == ""
    assert (await sandbox.python("print(x, older.poll())")).stdout == "5 None\n"


@pytest.mark.parametrize("loop", ["sum(range(10**12))", "import re; re.match('(a+)+$', 'a' * 64 + 'b')"])
async def test_a_loop_in_c_is_stopped_one_way_or_the_other(sandbox, loop):
    result = await sandbox.python("print('begun')\n" + loop, timeout_s=1)
    assert (result.exit_code, result.reason, result.stdout) == (124, "timeout", "begun\n")
    assert (await sandbox.python("print('next')")).stdout == "next\n"


async def test_a_result_says_when_the_interpreter_was_lost_to_the_timeout(sandbox):
    result = await sandbox.python("sum(range(10**12))", timeout_s=1)
    assert "variables are gone" in result.stderr
    await sandbox.python("'a new interpreter is up'")
    assert (await sandbox.python("while True: pass", timeout_s=1)).stderr.count("variables are gone") == 0


@pytest.mark.parametrize(
    ("language", "nap", "next_cell"),
    [
        ("python", "import time; time.sleep({s})", "for _ in range(20_000): pass\nprint('whole')"),
        (
            "javascript",
            "await new Promise(r => setTimeout(r, {ms}))",
            "for (let i = 0; i < 3e5; i++); console.log('whole')",
        ),
    ],
)
async def test_a_cell_that_ends_as_its_time_runs_out_leaves_the_next_one_alone(sandbox, language, nap, next_cell):
    """The interrupt may come when the cell has ended. The one behind it, which waits in the guest already, is whole."""
    answers = []
    for number in range(30):
        code = nap.format(s=0.05 + number % 20 / 2000, ms=50 + number % 20 / 2)

        async def run(code, timeout_s):
            outcome = await sandbox.node.execute(sandbox.vm_id, Command(code, language, timeout_s))
            answers.append((outcome.timed_out, outcome.stdout))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, code, 0.06)
            await anyio.sleep(0)
            tasks.start_soon(run, next_cell, 60)
    assert answers.count((False, "whole\n")) == 30
    assert any(late for late, _ in answers)


@pytest.mark.parametrize("language", ["javascript", "python"])
async def test_an_interrupt_that_hits_an_interpreter_which_is_just_starting_costs_nothing_else(start, language):
    """At whatever moment of its start: the cell has timed out, and the next one works in the same sandbox."""
    sandbox = await start()
    dying = {"javascript": "process.kill(process.pid, 9)", "python": "import os; os._exit(1)"}[language]
    for number in range(6):
        for code, timeout_s in ((dying, 60), ("1", 0.001 + number / 40)):
            await sandbox.node.execute(sandbox.vm_id, Command(code, language, timeout_s))
    outcome = await sandbox.node.execute(sandbox.vm_id, Command("40 + 2", language, 60))
    assert outcome.stdout == "42\n"
