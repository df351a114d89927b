"""`instavm exec` against a real server."""

import io
import json
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
