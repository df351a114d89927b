"""The command line, against a real server where it needs one (tests/api has the rest)."""

import errno
import json
import os

import pytest

from instavm import __version__
from instavm.cli.app import run
from instavm.cli.options import environment
from instavm.errors import InvalidInput


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"INSTAVM_{name}_DIR", str(tmp_path / name.lower()))


@pytest.mark.parametrize("asked", ["version", "--version"])
def test_version(capsys, asked):
    assert run([asked]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_keys_are_made_listed_and_revoked(capsys):
    assert run(["key", "create", "for tests", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["key"].startswith("instavm_sk_")
    assert run(["key", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(one["id"], one["description"], one["revoked_at"]) for one in listed] == [(made["id"], "for tests", None)]
    assert made["key"] not in json.dumps(listed)
    assert run(["key", "revoke", str(made["id"])]) == 0
    capsys.readouterr()
    assert run(["key", "revoke", str(made["id"])]) == 1
    assert capsys.readouterr().err.startswith("Error: there is no API key")


def test_an_error_is_one_line_on_stderr(capsys):
    assert run(["exec", "--cpu", "9", "print(1)"]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (
        "",
        "Error: cpu_count: 9 is not allowed; allowed: a whole number from 1 to 8\n",
    )


def test_a_command_line_that_cannot_be_read(capsys):
    assert run(["no-such-command"]) == 2
    assert "no-such-command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "file", "allowed"),
    [("json", ".", "a file, not a folder"), ("plot", "p.jpg", "a name that ends in .png or .svg")],
)
def test_where_results_cannot_go_is_told_before_anything_is_measured(capsys, option, file, allowed):
    assert run(["bench", f"--{option}", file]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"Error: {option}: {file!r} is not allowed; allowed: {allowed}\n")


def test_doctor_says_what_is_missing_and_what_to_do(capsys):
    status = run(["doctor", "--json"])
    checks = json.loads(capsys.readouterr().out)
    assert {"python", "server libraries"} <= {check["name"] for check in checks}
    assert status == (0 if all(check["ok"] for check in checks) else 1)
    assert all(check["remedy"] for check in checks if not check["ok"])


def test_the_environment_is_given_as_pairs():
    assert environment(["A=1", "B=x=y", "C="]) == {"A": "1", "B": "x=y", "C": ""}
    with pytest.raises(InvalidInput, match="NAME=VALUE"):
        environment(["A"])


@pytest.mark.parametrize(("name", "value"), [("DRIVER", "foo"), ("WARM_MACHINES", "x"), ("EGRESS_DNS", "no list")])
def test_a_setting_that_cannot_be_read_is_one_line_with_its_name(capsys, monkeypatch, name, value):
    monkeypatch.setenv(f"INSTAVM_{name}", value)
    assert run(["key", "list"]) == 1
    said = capsys.readouterr().err
    assert name in said.upper() and said.startswith("Error: ") and "Traceback" not in said


def test_a_setting_with_a_password_is_refused_without_its_value(capsys, monkeypatch):
    monkeypatch.setenv("INSTAVM_EGRESS_PROXY", "ftp://me:secret@proxy")
    assert run(["key", "list"]) == 1
    said = capsys.readouterr().err
    assert "INSTAVM_EGRESS_PROXY" in said and "secret" not in said


def test_a_full_disk_below_the_output_is_one_line(capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("instavm.cli.app._status", full)
    monkeypatch.setattr("instavm.cli.terminal.give_up_output", lambda: None)
    assert run(["version"]) == 1
    assert capsys.readouterr().err == "Error: [Errno 28] No space left on device\n"
