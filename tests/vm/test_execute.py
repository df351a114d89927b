"""Running code in a real sandbox."""

import anyio
import pytest

from instavm.contract.executions import Command
from instavm.contract.sandboxes import SandboxSpec
from instavm.errors import BootFailed, SessionEnded

pytestmark = pytest.mark.anyio


async def test_python_prints(sandbox):
    result = await sandbox.python("print(6 * 7)")
    assert (result.stdout, result.stderr, result.exit_code, result.reason) == ("42\n", "", 0, None)


async def test_a_command_waits_for_a_sandbox_that_is_coming_up(node):
    told = []

    async def run():
        told.append((await node.execute("vm-early", Command("print(1)", "python", 60))).stdout)

    with pytest.raises(SessionEnded):
        await node.execute("vm-early", Command("print(0)", "python", 60))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(node.start, SandboxSpec("vm-early", 2, 512))
        await anyio.lowlevel.checkpoint()
        assert "vm-early" not in node._live
        tasks.start_soon(run)
    await node.stop("vm-early")
    assert told == ["1\n"]


async def test_a_command_for_a_sandbox_that_does_not_come_up_is_told_so(node, monkeypatch):
    async def fails(spec, copy):
        await anyio.lowlevel.checkpoint()
        raise BootFailed("for this test")

    async def run():
        with pytest.raises(SessionEnded):
            await node.execute("vm-never", Command("print(1)", "python", 60))

    monkeypatch.setattr(node._starts, "bring_up", fails)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        with pytest.raises(BootFailed, match="for this test"):
            await node.start(SandboxSpec("vm-never", 2, 512))


async def test_variables_live_on_between_two_executions(sandbox):
    """What one execute() sets is there in the next: that is what a session is."""
    await sandbox.python("x = 20 + 1")
    assert (await sandbox.python("print(x * 2)")).stdout == "42\n"


async def test_a_last_expression_shows_its_value(sandbox):
    assert (await sandbox.python("y = 5\ny + 1")).stdout == "6\n"
    assert (await sandbox.python("'a' * 3")).stdout == "'aaa'\n"
    assert (await sandbox.python("None")).stdout == ""


async def test_a_failing_cell_is_a_result_with_a_traceback_of_the_users_lines_only(sandbox):
    result = await sandbox.python("def f():\n    return 1 / 0\nf()")
    assert result.exit_code == 1
    assert result.stderr.startswith('Traceback (most recent call last):\n  File "<cell ')
    assert "return 1 / 0" in result.stderr and "ZeroDivisionError: division by zero" in result.stderr
    assert "instavm" not in result.stderr
    assert (await sandbox.python("print('still here')")).stdout == "still here\n"


async def test_a_syntax_error_names_the_line(sandbox):
    result = await sandbox.python("x = 1\ny = = 2")
    assert result.exit_code == 1
    assert "line 2" in result.stderr and "SyntaxError" in result.stderr
    assert "instavm" not in result.stderr


@pytest.mark.parametrize(("code", "exit_code"), [("sys.exit()", 0), ("sys.exit(7)", 7), ("sys.exit('bye')", 1)])
async def test_sys_exit_ends_the_cell_and_not_the_interpreter(sandbox, code, exit_code):
    await sandbox.python("import sys; kept = 1")
    assert (await sandbox.python(code)).exit_code == exit_code
    assert (await sandbox.python("print(kept)")).stdout == "1\n"


async def test_os_exit_is_told_and_the_next_cell_gets_a_new_interpreter(sandbox):
    await sandbox.python("x = 1")
    lost = await sandbox.python("import os; os._exit(3)")
    assert (lost.exit_code, lost.reason) == (3, "interpreter_crashed")
    assert "variables are gone" in lost.stderr
    assert "NameError" in (await sandbox.python("x")).stderr


async def test_standard_output_and_error_stay_apart_and_whole(sandbox):
    code = "import sys\nfor i in range(500):\n    print('o' * 999)\n    print('e' * 99, file=sys.stderr)"
    result = await sandbox.python(code)
    assert result.stdout == ("o" * 999 + "\n") * 500
    assert result.stderr == ("e" * 99 + "\n") * 500


async def test_output_of_programs_started_from_python_is_there_in_order(sandbox):
    result = await sandbox.python("import os\nprint('before', flush=True)\nos.system('echo inside')\nprint('after')")
    assert result.stdout == "before\ninside\nafter\n"


async def test_bash_runs_each_command_as_a_process_of_its_own(sandbox):
    assert (await sandbox.bash("x=1; cd /tmp; echo $x")).stdout == "1\n"
    assert (await sandbox.bash('echo "[$x]"; pwd')).stdout == "[]\n/app\n"
    assert (await sandbox.bash("exit 7")).exit_code == 7
    assert (await sandbox.bash("kill -9 $$")).exit_code == 137


async def test_python_and_bash_start_in_app_and_see_the_environment(start):
    sandbox = await start(DATABASE_URL="postgres://x", EMPTY="")
    assert (
        await sandbox.python("import os; print(os.getcwd(), os.getenv('DATABASE_URL'))")
    ).stdout == "/app postgres://x\n"
    assert (await sandbox.bash("pwd; echo $DATABASE_URL; echo ${EMPTY-unset}")).stdout == "/app\npostgres://x\n\n"
    assert (await sandbox.python("import subprocess; print(subprocess.getoutput('echo $DATABASE_URL'))")).stdout == (
        "postgres://x\n"
    )


async def test_background_processes_outlive_the_call_that_started_them(sandbox):
    result = await sandbox.bash("sleep 300 & echo $! > /tmp/pid; echo started")
    assert result.stdout == "started\n"
    assert (await sandbox.bash("kill -0 $(cat /tmp/pid) && echo alive")).stdout == "alive\n"


async def test_a_long_script_passes_unharmed(sandbox):
    """The kernel takes at most 128 KiB as one argument; longer scripts take another way in."""
    script = f"x='{'a' * 300_000}'\necho ${{#x}}"
    assert (await sandbox.bash(script)).stdout == "300000\n"


async def test_a_command_that_runs_too_long_is_stopped_with_its_children(sandbox):
    result = await sandbox.bash("echo begun; trap '' TERM; (trap '' TERM; setsid sleep 1000) & sleep 1000", timeout_s=3)
    assert (result.exit_code, result.reason, result.timed_out) == (124, "timeout", True)
    assert result.stdout == "begun\n"
    assert "timed out" in result.stderr
    assert (await sandbox.bash("pgrep -c sleep")).stdout == "0\n"


async def test_a_cell_that_runs_too_long_is_interrupted_and_its_variables_are_kept(sandbox):
    await sandbox.python("x = 1")
    result = await sandbox.python("print('begun')\nwhile True: pass", timeout_s=1)
    assert (result.exit_code, result.reason, result.stdout) == (124, "timeout", "begun\n")
    assert (await sandbox.python("print(x)")).stdout == "1\n"


async def test_a_cell_that_will_not_be_interrupted_loses_its_interpreter(sandbox):
    stubborn = "while True:\n    try:\n        while True: pass\n    except KeyboardInterrupt: pass"
    result = await sandbox.python(stubborn, timeout_s=1)
    assert (result.exit_code, result.reason) == (124, "timeout")
    assert (await sandbox.python("print('ok')")).stdout == "ok\n"


async def test_undecodable_output_is_replaced_and_not_lost(sandbox):
    assert (await sandbox.bash(r"printf 'a\xff\xfeb'")).stdout == "a\ufffd\ufffdb"


async def test_a_fork_that_runs_off_the_end_of_a_cell_does_not_answer_for_it(sandbox):
    assert (await sandbox.python("import os\npid = os.fork()\nif pid: os.wait(); print('parent')")).stdout == "parent\n"
    assert (await sandbox.python("print('next')")).stdout == "next\n"
