"""What `instavm exec` runs, in which language, and what it refuses to take for code."""

import io
import os
import sys
import threading

import pytest
import typer

from instavm.cli.source import source

REFUSED = typer.BadParameter


def written(tmp_path, name, raw):
    file = tmp_path / name
    file.write_bytes(raw)
    return str(file)


@pytest.mark.parametrize(
    ("name", "raw", "text", "language"),
    [
        ("marked.py", b"\xef\xbb\xbfprint(1)\n", "print(1)\n", "python"),
        ("windows.sh", b"echo 1\r\necho 2\r\n", "echo 1\necho 2\n", "bash"),
        ("UPPER.PY", b"1", "1", "python"),
        ("module.mjs", b"1", "1", "javascript"),
        ("script", b"#!/bin/bash\necho", "#!/bin/bash\necho", "bash"),
        ("script", b"#!/usr/bin/env -S python3.11 -u\n1", "#!/usr/bin/env -S python3.11 -u\n1", "python"),
        ("script", b"\xef\xbb\xbf#! /usr/bin/env node\r\n1", "#! /usr/bin/env node\n1", "javascript"),
        ("script.txt", b"#!/bin/sh -e\n", "#!/bin/sh -e\n", "sh"),
        ("plain", b"print(1)", "print(1)", "python"),
        ("name.py", b"#!/bin/bash\n", "#!/bin/bash\n", "python"),
        ("latin.py", b"# coding: latin-1\nprint('\xe9')", "# coding: latin-1\nprint('é')", "python"),
    ],
)
def test_a_file_tells_its_language_and_is_read_as_python_or_a_shell_would(tmp_path, name, raw, text, language):
    assert source(written(tmp_path, name, raw), None) == (text, language)


def test_a_language_that_is_given_is_taken(tmp_path):
    assert source(written(tmp_path, "x.py", b"#!/bin/perl"), "sh")[1] == "sh"


@pytest.mark.parametrize("raw", [b"caf\xe9", b"\xff\xfe1\0", b"# coding: nonsense\n1"])
def test_what_is_no_text_is_refused_by_its_name(tmp_path, raw):
    with pytest.raises(REFUSED, match=r"x\.py cannot be read as text in UTF-8"):
        source(written(tmp_path, "x.py", raw), None)


def test_a_program_that_is_not_here_is_refused(tmp_path):
    with pytest.raises(REFUSED, match=r"/usr/bin/perl.*--language is one of python"):
        source(written(tmp_path, "script", b"#!/usr/bin/perl\n"), None)


@pytest.mark.parametrize("name", ["absent.py", "my script.sh", "./absent", "../x", "/no/such/file", "~/x", "a-b.js"])
def test_a_file_that_is_not_there_is_not_run_as_code(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(REFUSED, match="there is no such file"):
        source(name, None)


@pytest.mark.parametrize("code", ["1/0", "import os.path", "x = 'a.py'", "print(open('a.py'))", "a.b", "\n", "x\0y"])
def test_code_is_run_as_code(code):
    assert source(code, None) == (code, "python")


def test_a_path_is_a_command_of_a_shell():
    assert source("/no/such/command", "bash") == ("/no/such/command", "bash")


def test_a_directory_is_refused_by_its_name(tmp_path):
    with pytest.raises(REFUSED, match="is a directory"):
        source(str(tmp_path), None)


def test_a_file_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(REFUSED, match="too long"):
        source("/dev/zero", None)


def test_a_pipe_is_read(tmp_path):
    """As a shell makes one for `instavm exec <(…)`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"print(1)",))
    writer.start()
    assert source(str(pipe), None) == ("print(1)", "python")
    writer.join()


def test_stdin_tells_its_language_too(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf#!/bin/sh\r\necho")))
    assert source("-", None) == ("#!/bin/sh\necho", "sh")


def test_code_on_a_command_line_that_was_read_as_ascii_is_utf_8():
    argument = "print('é漢')".encode().decode("ascii", "surrogateescape")
    assert source(argument, None) == ("print('é漢')", "python")
