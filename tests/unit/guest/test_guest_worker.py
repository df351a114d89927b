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


JOB = "import asyncio\nasync def job(n):\n    await asyncio.sleep(0)\n    return n * 10"


@pytest.mark.parametrize(
    ("cell", "stdout"),
    [
        ("tasks = [asyncio.create_task(job(n)) for n in range(3)]\nawait asyncio.gather(*tasks)", "[0, 10, 20]\n"),
        ("one = asyncio.create_task(job(4))\nawait one", "40\n"),
        ("loop = asyncio.get_running_loop()\nawait job(5)", "50\n"),
        ("later = asyncio.create_task(job(6));", ""),
        ("asyncio.run(job(7))", "70\n"),
        ("asyncio.get_event_loop().run_until_complete(job(8))", "80\n"),
        ("future = asyncio.Future()\nfuture.set_result(9)\nawait future", "9\n"),
        ("async with asyncio.Lock():\n    print('held')", "held\n"),
        ("[n async for n in numbers()]", "[1, 2]\n"),
        ("%%time\nasyncio.get_running_loop() is not None", None),
    ],
)
def test_a_cell_as_a_whole_has_one_event_loop(worker, cell, stdout):
    worker.run(JOB + "\nasync def numbers():\n    yield 1\n    yield 2")
    answer = worker.run(cell)
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert stdout is None or answer.stdout == stdout


def test_tasks_go_on_between_two_cells(worker):
    worker.run("import asyncio, os\nasync def f():\n    await asyncio.sleep(0)\n    os.write(1, b'on')")
    printed = worker.run("task = asyncio.create_task(f())").stdout
    while "on" not in printed:
        printed += worker.printed(worker._out[0])
    assert worker.run("task.done()").stdout == "True\n"


def test_a_task_that_fails_is_told_of(worker):
    worker.run("import asyncio, gc\nasync def f(): raise KeyError('in a task')\ntask = asyncio.create_task(f())")
    assert "KeyError: 'in a task'" in worker.run("await asyncio.sleep(0)\ndel task\ngc.collect();").stderr


def test_a_cell_that_a_task_does_not_let_begin_can_be_interrupted(worker):
    worker.run("import asyncio, os, time\nx = 5\nasync def f():\n    os.write(1, b'on')\n    while True: time.sleep(0.01)")
    printed = worker.run("task = asyncio.create_task(f())").stdout
    while "on" not in printed:
        printed += worker.printed(worker._out[0])
    worker.ask("print('ran')")
    worker.process.send_signal(signal.SIGINT)
    answer = worker.answer()
    assert (answer.exit_code, answer.stdout) == (130, "")
    assert worker.run("x").stdout == "5\n"


def test_context_variables_of_one_cell_are_there_in_the_next(worker):
    worker.run("import asyncio, contextvars\nv = contextvars.ContextVar('v')\na = v.set(1)")
    assert worker.run("await asyncio.sleep(0)\nprint(v.get())\nb = v.set(2)").stdout == "1\n"
    assert worker.run("print(v.get())\nv.reset(b)\nprint(v.get())\nv.reset(a)").stdout == "2\n1\n"


REPLACED = {
    "a stream without .closed": "import sys\nclass Out:\n    def write(self, text): return len(text)\n    def flush(self): pass\n"
    "sys.stderr = Out()",
    "a flush that raises": "import sys\nclass Out:\n    closed = False\n    def write(self, text): return len(text)\n"
    "    def flush(self): raise TypeError\nsys.stderr = Out()",
    "streams deleted": "import sys\ndel sys.stdout, sys.stderr, sys.stdin",
    "streams detached": "import sys\nsys.stdout.detach();",
    "descriptors closed": "import os\nfor n in (0, 1, 2): os.close(n)",
    "descriptors replaced": "import os\nos.dup2(os.open('/dev/null', os.O_RDWR), 1);",
    "clocks": "import time\ntime.perf_counter = time.process_time = lambda: float('nan')",
    "os": "import os\nos.getpid = os.write = os.read = os.dup2 = os._exit = None",
    "builtins": "import builtins\nbuiltins.len = builtins.isinstance = builtins.getattr = builtins.setattr = None",
    "no builtins": "del __builtins__",
    "modules": "import sys\nsys.modules.clear()",
    "the import system": "import sys\nsys.meta_path.clear()\nsys.path.clear()",
    "a tracer that raises": "import sys\ndef trace(*_): raise ValueError\nsys.settrace(trace)",
    "a profiler that raises": "import sys\ndef trace(*_): raise ValueError\nsys.setprofile(trace)",
    "the limit of recursion": "import sys\nsys.setrecursionlimit(60)",
    "linecache": "import linecache\nlinecache.cache = None",
    "traceback": "import traceback\ntraceback.TracebackException = traceback.StackSummary = None",
    "json": "import json\njson.loads = json.dumps = None",
    "the display hook": "import sys\ndel sys.displayhook",
    "SIGINT": "import signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)",
    "an alarm that rings later": "import signal\ndef ring(*_): raise TimeoutError\nsignal.signal(signal.SIGALRM, ring)\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.001);",
}


@pytest.mark.parametrize("code", REPLACED.values(), ids=REPLACED)
def test_nothing_that_a_cell_replaces_costs_the_variables(worker, code):
    worker.run("kept = 41")
    worker.run(code)
    worker.run("0")  # an alarm may ring here
    assert worker.run("kept + 1").stdout == "42\n"
    failed = worker.run("1 / 0")
    assert (failed.exit_code, "ZeroDivisionError" in failed.stderr) == (1, True)


def test_what_was_printed_before_a_descriptor_was_closed_is_in_its_own_cell(worker):
    assert worker.run("import os\nprint('before', end='')\nos.close(1)").stdout == "before"


def test_a_stand_in_for_stdout_stays_from_cell_to_cell(worker):
    worker.run("import sys, io\nlog = io.StringIO()\nsys.stdout = log")
    worker.run("print('into the log')")
    assert worker.run("sys.stdout = sys.__stdout__\nlog.getvalue()").stdout == "'into the log\\n'\n"


def test_what_c_code_prints_is_in_its_own_cell_and_in_its_place(worker):
    code = "import ctypes\nprint('a')\nctypes.CDLL(None).puts(b'from C')\nprint('b')"
    assert worker.run(code).stdout == "a\nfrom C\nb\n"


@pytest.mark.parametrize("code", ["5; # quiet", "(5\n # why\n);", "'é'  ;", "x = 1\nx;  # a; b"])
def test_a_semicolon_behind_the_last_expression_keeps_it_quiet(worker, code):
    assert worker.run(code).stdout == ""


@pytest.mark.parametrize("code", ["'a;b' # c;", "'a'\n# c;"])
def test_a_semicolon_anywhere_else_does_not(worker, code):
    assert worker.run(code).stdout.startswith("'a")


@pytest.mark.parametrize("code", ["print('\0')", "'\ud800'", "x = '\udce9' +", "\ufeff1", "\u2028", "%%bash\n\0", "!\ud800"])
def test_code_with_odd_characters_is_answered(worker, code):
    assert worker.run(code).exit_code in (0, 1)
    assert worker.run("1").stdout == "1\n"


def test_the_search_path_begins_with_the_working_folder_once(worker):
    assert worker.run("import sys\nsys.path.count('')").stdout == "1\n"


@pytest.mark.parametrize(
    ("env", "code", "stdout"),
    [
        ({"TZ": "Asia/Tokyo"}, "import time\ntime.tzname[0], time.localtime(0).tm_hour", "('JST', 9)\n"),
        ({"PYTHONPATH": "/a:/b"}, "import sys\nsys.path[:3]", "['', '/a', '/b']\n"),
        ({"PYTHONWARNINGS": "error"}, "import sys\nsys.warnoptions", "['error']\n"),
        ({"PYTHONDONTWRITEBYTECODE": "1"}, "import sys\nsys.dont_write_bytecode", "True\n"),
        ({"PYTHONPYCACHEPREFIX": "/c"}, "import sys\nsys.pycache_prefix", "'/c'\n"),
        ({"PYTHONIOENCODING": "latin-1:replace"}, "import sys\nsys.stdout.encoding", "'latin-1'\n"),
    ],
)
def test_variables_that_come_later_hold_in_a_running_interpreter(worker, env, code, stdout):
    assert worker.run(code, **env).stdout == stdout


def test_another_value_of_a_variable_takes_the_place_of_the_first(worker):
    worker.run("import sys", PYTHONPATH="/a", PYTHONWARNINGS="error")
    assert worker.run("sys.path[:2], sys.warnoptions", PYTHONPATH="/b", PYTHONWARNINGS="ignore").stdout == (
        "(['', '/b'], ['ignore'])\n"
    )


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("%%bash --out x\necho hi", ""),
        ("%%bash --no-raise-error\nexit 3", ""),
        ("%%bash -s a b\necho $2 $1", "b a\n"),
        ("%%bash -euo pipefail\ntrue\necho on", "on\n"),
        ("%%script cat\nthe cell", "the cell\n"),
        ("%%python3\nprint(6 * 7)", "42\n"),
    ],
)
def test_options_of_scripts_are_heeded(worker, code, stdout):
    answer = worker.run(code)
    assert (answer.exit_code, answer.stdout) == (0, stdout)


def test_what_a_script_printed_can_be_kept(worker):
    worker.run("%%bash --out out --err err --no-raise-error\necho a\necho b >&2\nexit 3")
    assert worker.run("out, err").stdout == "('a\\n', 'b\\n')\n"


@pytest.mark.parametrize("code", ["%%bash --out\nx", "%%bash --out 1x\nx", "%%script\nx", "%%script nosuchprogram\nx"])
def test_a_script_that_can_not_be_run_is_an_error(worker, code):
    answer = worker.run(code)
    assert (answer.exit_code, bool(answer.stderr)) == (1, True)


def test_code_may_begin_with_a_byte_order_mark(worker):
    assert worker.run("\ufeffprint(1)\nprint(2)").stdout == "1\n2\n"


@pytest.mark.parametrize(("code", "status"), [(10**30, 255), (-(10**30), 255), (2**40 + 3, 3), (256, 0), (-1, 255)])
def test_exit_codes_are_those_of_a_program(worker, code, status):
    assert worker.run(f"import sys; sys.exit({code})").exit_code == status


def test_a_breakpoint_says_that_nobody_can_answer(worker):
    assert "nobody is at the keyboard" in worker.run("breakpoint()").stderr
    assert worker.run("import os; os.environ['PYTHONBREAKPOINT'] = '0'; breakpoint()").exit_code == 0


def test_commands_run_below_a_stream_that_only_writes(worker):
    worker.run("import sys\nclass Own:\n    def write(self, text): sys.__stdout__.write(text)\nsys.stdout = Own()")
    assert worker.run("!echo one\nx = !echo two\nprint(x)").stdout == "one\n['two']\n"
    assert worker.run("sys.stdout = None\n!echo three").stdout == "three\n"


def test_a_cell_that_stops_its_loop_leaves_nothing_for_the_next(worker):
    stopped = worker.run("import asyncio\nasyncio.get_running_loop().stop()\nawait asyncio.sleep(9)")
    assert "Event loop stopped" in stopped.stderr
    assert worker.run("len(asyncio.all_tasks(asyncio.get_running_loop()))").stdout == "0\n"
