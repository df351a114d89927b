"""A cell of Python behaves as in a notebook, with nothing but the standard library."""

import os
import select
import signal
import sys

import pytest
import pythons

from instavm_guest.worker import AWAIT, FRESH, REHEARSE


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("1 + 1", "2\n"),
        ("x = 4\nx * 2", "8\n"),
        ("x = 4\nx * 2;", ""),
        ("None", ""),
        ("", ""),
        ("# nothing", ""),
        ("def f():\n    return 3\nf()", "3\n"),
        ("import asyncio\nawait asyncio.sleep(0, 'slept')", "'slept'\n"),
        ("async def f():\n    return 5\nawait f()", "5\n"),
        ("!echo hi", "hi\n"),
        ("lines = !echo a; echo b\nlines", "['a', 'b']\n"),
        ("for word in ('a', 'b'):\n    !echo $((1 + 1))", "2\n2\n"),
        ("%%bash\nx=1\necho $x", "1\n"),
        ("%cd /\n", "/\n"),
        ("%env HOMEWORK=done\nimport os\nos.environ['HOMEWORK']", "'done'\n"),
        ("print(display)\n'no mark at all'", None),
        ("a = 7\nb = a % 4\nb", "3\n"),
        ("a = b'x'\nprint(1 if a != b'y' else 2)", "1\n"),
    ],
)
def test_cells_print_what_a_notebook_prints(worker, code, stdout):
    answer = worker.run(code)
    assert (answer.exit_code, answer.stderr) == (0, "")
    if stdout is not None:
        assert answer.stdout == stdout


def test_state_persists_and_the_environment_of_a_cell_is_there(worker):
    worker.run("import os\nx = 41")
    assert worker.run("print(x + 1, os.environ['NEW'])", NEW="yes").stdout == "42 yes\n"


def test_classes_pickle_because_the_namespace_is_the_main_module(worker):
    code = "import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A"
    assert worker.run(code).stdout == "True\n"


def test_a_cell_does_not_inherit_our_future_statements(worker):
    """Annotations are values in the user's code, as they are in a program of its own."""
    assert worker.run("def f(x: int): pass\nf.__annotations__['x']").stdout == "<class 'int'>\n"


def test_tasks_of_the_event_loop_go_on_in_the_next_cell_that_waits(worker):
    worker.run("import asyncio\ngo = asyncio.Event()\nasync def f():\n    await go.wait()\n    print('done')")
    worker.run("async def begin():\n    global task\n    task = asyncio.ensure_future(f())\nawait begin()")
    assert worker.run("go.set(); await task").stdout.endswith("done\n")


def test_a_traceback_shows_the_users_lines_and_nothing_of_ours(worker):
    answer = worker.run("def f():\n    return 1 / 0\n\nf()")
    assert answer.exit_code == 1
    assert 'File "<cell 1>", line 4, in <module>\n    f()' in answer.stderr
    assert "return 1 / 0" in answer.stderr
    assert "instavm" not in answer.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import asyncio\nasync def f():\n    raise ValueError('inner')\nawait f()",
        "try:\n    1 / 0\nexcept Exception as exc:\n    raise ValueError('outer') from exc",
        "input('name? ')",
        "x = (",
        "%%nosuchmagic\nx",
    ],
)
def test_no_failure_shows_frames_of_ours(worker, code):
    answer = worker.run(code)
    assert answer.exit_code == 1
    assert answer.stderr
    assert "<instavm" not in answer.stderr
    assert "instavm_guest" not in answer.stderr


def test_input_fails_at_once_and_says_why(worker):
    assert "EOFError: input() can't be answered" in worker.run("input()").stderr


@pytest.mark.parametrize(("code", "exit_code"), [("raise SystemExit", 0), ("raise SystemExit(3)", 3), ("exit(4)", 4)])
def test_leaving_ends_the_cell_and_not_the_interpreter(worker, code, exit_code):
    assert worker.run("kept = 1\n" + code).exit_code == exit_code
    assert worker.run("kept").stdout == "1\n"


def test_an_interrupt_ends_the_cell_and_keeps_the_variables(worker):
    worker.ask("x = 5\nprint('begun', flush=True)\nwhile True: pass")
    while not os.stat(worker.folder / "stdout").st_size:
        select.select([], [], [], 0.01)
    worker.process.send_signal(signal.SIGINT)
    answer = worker.answer()
    assert (answer.exit_code, "KeyboardInterrupt" in answer.stderr) == (130, True)
    assert worker.run("x").stdout == "5\n"


def test_an_interrupt_between_cells_does_nothing(worker):
    worker.run("x = 1")
    worker.process.send_signal(signal.SIGINT)
    assert worker.run("x").stdout == "1\n"


def test_an_interrupted_await_is_cancelled_and_the_loop_lives_on(worker):
    worker.ask("import asyncio\nprint('begun', flush=True)\nawait asyncio.sleep(1000)")
    while not os.stat(worker.folder / "stdout").st_size:
        select.select([], [], [], 0.01)
    worker.process.send_signal(signal.SIGINT)
    assert worker.answer().exit_code == 130
    assert worker.run("await asyncio.sleep(0, 'alive')").stdout == "'alive'\n"


def test_text_without_a_newline_goes_out_while_the_cell_runs(worker):
    worker.ask("print('half', end='')\nimport select\nselect.select([], [], [])")
    while not os.stat(worker.folder / "stdout").st_size:
        os.write(worker.pulse, b"\0")
        select.select([], [], [], 0.01)
    worker.process.send_signal(signal.SIGINT)
    assert worker.answer().stdout == "half"


def test_closed_standard_streams_are_there_again_in_the_next_cell(worker):
    worker.run("import sys\nsys.stdout.close()\nsys.stderr.close()")
    assert worker.run("print('back')").stdout == "back\n"


def test_deep_recursion_is_an_exception(worker):
    answer = worker.run("def f(): return f()\nf()")
    assert (answer.exit_code, "RecursionError" in answer.stderr) == (1, True)


def test_a_fork_that_ends_with_the_cell_does_not_answer(worker):
    assert worker.run("import os\nif os.fork(): os.wait(); print('parent')").stdout == "parent\n"
    assert worker.run("2").stdout == "2\n"


def test_what_a_warm_up_left_is_gone_after_the_rehearsal(worker):
    """A new sandbox starts clean, though its interpreter has run cells before."""
    worker.run("leftover = 1\n!true")
    worker.ask("", flags=REHEARSE)
    worker.ask("'leftover' in globals(), callable(get_ipython)", flags=FRESH)
    answer = worker.answer()
    assert answer.stdout == "(False, True)\n"
    assert 'File "<cell 2>"' in worker.run("1/0").stderr


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13"])
def test_it_runs_without_any_package_installed(start_worker, version):
    """Whatever Python an image has."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    executable = sys.executable if version == here else str(pythons.tree(version) / "bin" / "python3")
    worker = start_worker(executable, isolated=True)
    assert worker.run("import sys; print('%d.%d' % sys.version_info[:2])").stdout == f"{version}\n"
    assert worker.run("6 * 7").stdout == "42\n"
    assert worker.run("!echo shell").stdout == "shell\n"
    assert "needs IPython" in worker.run("%timeit 1").stderr
    assert worker.run("import asyncio\nawait asyncio.sleep(0, 3)").stdout == "3\n"
    assert "ZeroDivisionError" in worker.run("1 / 0").stderr


def test_an_interrupt_that_comes_late_does_not_hit_the_next_cell(worker):
    """It was sent while a cell ran, and arrives when that has ended: the next cell waits for it, and is not hurt."""
    for number in range(200):
        worker.run("pass")
        worker.ask(f"for _ in range(2000): pass\n{number}", flags=AWAIT)
        worker.process.send_signal(signal.SIGINT)
        assert worker.answer().stdout == f"{number}\n"


def test_an_interrupt_that_came_in_time_is_not_waited_for(worker):
    worker.ask("import os; os.write(1, b'on')\nwhile True: pass")
    while worker.printed(worker._out[0]) != "on":
        continue
    worker.process.send_signal(signal.SIGINT)
    assert worker.answer().exit_code == 130
    worker.ask("1", flags=AWAIT)
    assert worker.answer().stdout == "1\n"


def test_a_cell_that_took_the_signal_for_itself_keeps_nobody_waiting_for_ever(worker):
    worker.run("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);")
    worker.ask("1", flags=AWAIT)
    assert worker.answer().stdout == "1\n"
