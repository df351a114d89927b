"""Output while it comes, from a real sandbox."""

import anyio
import pytest

from instavm.contract.executions import Command

pytestmark = pytest.mark.anyio


async def test_output_is_heard_while_the_code_runs(sandbox):
    """The code waits for a file that is made only when its first output, without a newline, has been heard."""
    heard = anyio.Event()
    code = "import os, time\nprint('half', end='')\nwhile not os.path.exists('/go'): time.sleep(0.01)\nprint(' whole')"
    pieces = []

    def sink(stream, data):
        pieces.append((stream, data))
        heard.set()

    async with anyio.create_task_group() as tasks:

        async def reader():
            await heard.wait()
            await sandbox.bash("touch /go")

        tasks.start_soon(reader)
        result = await sandbox.node.execute(sandbox.vm_id, Command(code, "python", 60), sink)
    assert pieces == [("stdout", b"half"), ("stdout", b" whole\n")]
    assert result.stdout == "half whole\n"


async def test_outputs_are_heard_after_what_was_printed_before_them(sandbox):
    rich = "class T:\n    def __repr__(self): return 'text'\n    def _repr_html_(self): return '<i/>'\n"
    code = rich + "print('a')\ndisplay(T())\nprint('b')"
    pieces = []
    await sandbox.node.execute(sandbox.vm_id, Command(code, "python", 60), lambda *piece: pieces.append(piece))
    before = [data for _, data in pieces[: [stream for stream, _ in pieces].index("output")]]
    assert b"".join(before).startswith(b"a\ntext\n")
    assert b"".join(data for stream, data in pieces if stream == "stdout") == b"a\ntext\nb\n"


async def test_a_command_that_nobody_waits_for_is_stopped(sandbox):
    with anyio.CancelScope() as scope:
        await sandbox.node.execute(
            sandbox.vm_id, Command("x = 1\nprint('on')\nwhile True: pass", "python", 60), lambda *_: scope.cancel()
        )
    assert (await sandbox.python("print(x)")).stdout == "1\n"
