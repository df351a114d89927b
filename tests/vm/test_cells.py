"""Python as a notebook cell, in a real sandbox: with IPython, which is warm in the template."""

import pytest

pytestmark = pytest.mark.anyio


async def test_a_new_sandbox_starts_clean(sandbox):
    """The template's interpreter has run cells before; nothing of them is there."""
    names = (await sandbox.python("print(*sorted(n for n in globals() if not n.startswith('_')))")).stdout
    assert names == "In get_ipython\n"
    assert 'File "<cell 2>"' in (await sandbox.python("1/0")).stderr


async def test_shell_commands_and_magics_work_as_in_a_notebook(sandbox):
    assert (await sandbox.python("!echo hi")).stdout == "hi\n"
    assert (await sandbox.python("name = 'v'\n!echo {name} $name")).stdout == "v v\n"
    assert (await sandbox.python("lines = !echo a; echo b\nlines")).stdout == "['a', 'b']\n"
    assert (await sandbox.python("%%bash\nx=1\necho $x")).stdout == "1\n"
    assert (await sandbox.python("%cd /tmp\nimport os\nos.getcwd()")).stdout.endswith("'/tmp'\n")
    assert "Wall time" in (await sandbox.python("%time sum(range(10))")).stdout
    assert "name" in (await sandbox.python("%who")).stdout
    assert (await sandbox.python("%%writefile /tmp/f\ntext\n!cat /tmp/f")).exit_code == 0
    assert (await sandbox.bash("head -1 /tmp/f")).stdout == "text\n"


async def test_a_failing_bash_cell_is_an_exception(sandbox):
    result = await sandbox.python("%%bash\nexit 3")
    assert (result.exit_code, "CalledProcessError" in result.stderr) == (1, True)
    assert "IPython" not in result.stderr and "instavm" not in result.stderr


async def test_a_package_can_be_imported_as_soon_as_it_is_installed(sandbox):
    """From a wheel that lies in the sandbox: there is no network here."""
    wheel = (
        "import zipfile, os\n"
        "os.makedirs('/tmp/pack', exist_ok=True)\n"
        "z = zipfile.ZipFile('/tmp/pack/pack-1-py3-none-any.whl', 'w')\n"
        "z.writestr('pack.py', 'ANSWER = 42')\n"
        "z.writestr('pack-1.dist-info/METADATA', 'Metadata-Version: 2.1\\nName: pack\\nVersion: 1\\n')\n"
        "z.writestr('pack-1.dist-info/WHEEL', 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')\n"
        "z.writestr('pack-1.dist-info/RECORD', '')\n"
        "z.close()"
    )
    await sandbox.python(wheel)
    installed = await sandbox.python("pip install --no-index /tmp/pack/pack-1-py3-none-any.whl")
    assert installed.exit_code == 0, installed.stderr
    assert (await sandbox.python("import pack; pack.ANSWER")).stdout == "42\n"


async def test_top_level_await_and_tasks_that_go_on(sandbox):
    await sandbox.python("import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 'done'")
    assert (
        await sandbox.python(
            "task = None\nasync def g():\n    global task\n    task = asyncio.ensure_future(f())\nawait g()"
        )
    ).exit_code == 0
    assert (await sandbox.python("await task")).stdout == "'done'\n"


async def test_input_fails_at_once(sandbox):
    result = await sandbox.python("input('name? ')")
    assert (result.exit_code, "EOFError" in result.stderr) == (1, True)


async def test_a_thread_of_one_cell_works_on_after_it(sandbox):
    await sandbox.python(
        "import threading\nseen, go = [], threading.Event()\n"
        "t = threading.Thread(target=lambda: (go.wait(), seen.append(1)))\nt.start()"
    )
    assert (await sandbox.python("go.set(); t.join(); seen")).stdout == "[1]\n"


async def test_a_result_says_what_it_took(sandbox):
    await sandbox.python("big = None")
    result = await sandbox.python("big = bytearray(100 << 20); sum(range(300000)); del big")
    assert 0 < result.cpu_time_s <= result.execution_time_s * 2
    assert result.peak_memory_bytes > 100 << 20
    assert (await sandbox.python("1")).peak_memory_bytes < 100 << 20
    child = await sandbox.python("import subprocess; subprocess.run(['python3', '-S', '-c', 'sum(range(300000))'])")
    assert child.cpu_time_s > 0.01


async def test_of_ipython_only_what_cells_need_is_loaded(sandbox):
    """The rest is there for who asks."""
    loaded = "import sys\nprint(*(name in sys.modules for name in ('IPython', 'prompt_toolkit', 'jedi')))"
    assert (await sandbox.python(loaded)).stdout == "True False False\n"
    asked = "import IPython, jedi\nprint(IPython.embed.__module__, jedi.__name__)\nIPython.nothing"
    result = await sandbox.python(asked)
    assert result.stdout == "IPython.terminal.embed jedi\n"
    assert result.stderr.endswith("AttributeError: module 'IPython' has no attribute 'nothing'\n")


async def test_the_latest_value_is_kept_also_when_magics_have_been_used(sandbox):
    await sandbox.python("%pwd")
    await sandbox.python("41 + 1")
    assert (await sandbox.python("_")).stdout == "42\n"


async def test_time_awaits_what_it_times(sandbox):
    await sandbox.python("import asyncio\nasync def f(x):\n    await asyncio.sleep(0.01)\n    return x")
    result = await sandbox.python("x = %time await f(5)\nx")
    assert "Wall time" in result.stdout and result.stdout.endswith("\n5\n"), result.stderr
    assert (await sandbox.python("%%time\ny = 1\nawait f(y + 1)")).stdout.endswith("\n2\n")
    assert (await sandbox.python("%%time\nawait f(1)\nexit(3)")).exit_code == 3


async def test_what_a_captured_cell_printed_is_kept_when_it_fails(sandbox):
    result = await sandbox.python("%%capture said\nprint('so far')\n1/0")
    assert (result.exit_code, "ZeroDivisionError" in result.stderr) == (1, True)
    assert (await sandbox.python("%%capture more\nprint('too')\nexit(3)")).exit_code == 3
    assert (await sandbox.python("said.stdout + more.stdout")).stdout == "'so far\\ntoo\\n'\n"


async def test_cells_are_found_again_by_magics(sandbox):
    await sandbox.python("40 + 2")
    assert "42" in (await sandbox.python("%rerun")).stdout
    assert (await sandbox.python("%history -l 2")).stdout == "40 + 2\n%rerun\n"
    assert "40 + 2" in (await sandbox.python("%history -g 40*")).stdout


async def test_a_value_may_say_its_text_in_the_way_of_notebooks(sandbox):
    await sandbox.python("class P:\n    def _repr_pretty_(self, p, cycle): p.text('pretty')")
    assert (await sandbox.python("P()")).stdout == "pretty\n"
    assert (await sandbox.python("display(P())")).stdout == "pretty\n"
    assert "%timeit" in (await sandbox.python("%lsmagic")).stdout
    bad = await sandbox.python("class Q:\n    def _repr_pretty_(self, p, cycle): 1/0\nQ()")
    assert (bad.exit_code, bad.stderr.count("ZeroDivisionError")) == (0, 1)


async def test_commands_run_also_below_a_stream_of_ones_own(sandbox):
    await sandbox.python("import sys\nclass Own:\n    def write(self, text): sys.__stdout__.write(text)\nsys.stdout = Own()")
    assert (await sandbox.python("!echo one\nx = !echo two\nprint(x)")).stdout == "one\n['two']\n"
