"""`instavm exec` against a real server."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from instavm.cli.app import run


@pytest.fixture(autouse=True)
def environment(server, monkeypatch):
    monkeypatch.setenv("INSTAVM_API_KEY", server.key)
    monkeypatch.setenv("INSTAVM_BASE_URL", server.url)


def test_exec_prints_what_the_code_prints_where_it_prints_it(capsys):
    assert run(["exec", "import sys; print('out'); print('err', file=sys.stderr)"]) == 0
    assert capsys.readouterr() == ("out\n", "err\n")


def test_exec_passes_the_exit_code_on(capsys):
    assert run(["exec", "exit 7", "--language", "bash"]) == 7
    assert run(["exec", "1/0"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_exec_takes_a_file_and_its_language_from_the_name(tmp_path, capsys):
    script = tmp_path / "a.sh"
    script.write_text("echo from bash: $WHO\n")
    assert run(["exec", str(script), "-e", "WHO=me"]) == 0
    assert capsys.readouterr().out == "from bash: me\n"


@pytest.mark.parametrize("arguments", [["-"], []])
def test_exec_takes_stdin(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("print('from stdin')"))
    assert run(["exec", *arguments]) == 0
    assert capsys.readouterr().out == "from stdin\n"


def test_exec_as_json(capsys):
    assert run(["exec", "print(1)", "--json", "--cpu", "1", "--memory", "256", "--timeout", "30"]) == 0
    assert json.loads(capsys.readouterr().out)["stdout"] == "1\n"


def test_a_wrong_key_is_one_line_on_stderr(capsys):
    assert run(["exec", "1", "--api-key", "wrong"]) == 1
    assert capsys.readouterr().err.startswith("Error: ")


def test_a_server_that_is_not_there_is_one_line_on_stderr(capsys):
    assert run(["exec", "1", "--base-url", "http://127.0.0.1:9"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def started(*arguments, **more):
    """The command as a process of its own, in a session of its own."""
    program = [sys.executable, "-c", "from instavm.cli import main; main()", *arguments]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **more)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_exec_that_is_told_to_end_ends_its_sandbox(server, number):
    """That none is left is checked after each test."""
    program = started(
        "exec", "echo up; sleep 60", "-l", "bash", preexec_fn=lambda: signal.signal(number, signal.default_int_handler)
    )
    assert program.stdout.readline() == b"up\n"
    assert len(server.node.places) == 1
    program.send_signal(number)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err) == (128 + number, b"", b"")


def test_exec_ends_quietly_when_nobody_reads_any_more():
    program = started("exec", "while echo more; do sleep 0.01; done", "-l", "bash")
    program.stdout.readline()
    program.stdout.close()
    assert (program.wait(60), program.stderr.read()) == (141, b"")
    program.stderr.close()


def test_a_terminal_shows_what_it_lacks_as_an_escape():
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    out, _ = started("exec", "print('é \\u65e5\\0 after')", env=environment).communicate(timeout=60)
    assert out == b"\xe9 \\u65e5\0 after\n"


@pytest.mark.parametrize("closed", ["0", "1", "2"])
def test_exec_runs_with_a_closed_stream(closed, tmp_path):
    script = f"""{sys.executable} -c 'from instavm.cli import main; main()' exec 'exit 7' -l bash {closed}>&-"""
    assert subprocess.run(["bash", "-c", script], timeout=60).returncode == 7


def test_a_file_that_is_not_there_is_named(capsys):
    assert run(["exec", "absent.py"]) == 2
    assert "there is no such file" in capsys.readouterr().err
