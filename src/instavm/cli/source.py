"""The code of `instavm exec`: from its argument, a file or stdin, and the language that it says it is in."""

from __future__ import annotations

import ast
import codecs
import io
import os
import re
import shlex
import stat
import sys
import tokenize
from pathlib import Path, PurePath
from typing import BinaryIO, Final

import typer

from instavm import limits

STDIN: Final = "-"
ENDINGS: Final = {
    ".py": "python",
    ".sh": "bash",
    ".bash": "bash",
    ".js": "javascript",
    ".cjs": "javascript",
    ".mjs": "javascript",
}
PROGRAMS: Final = {
    "python": "python",
    "pypy": "python",
    "bash": "bash",
    "sh": "sh",
    "dash": "sh",
    "ash": "sh",
    "node": "javascript",
    "nodejs": "javascript",
}
"""What a file's first line may ask for."""


def source(argument: str | None, language: str | None) -> tuple[str, str]:
    """The code and its language: `language`, else by the file's name, else by its first line (`#!`), else python.

    Raises: typer.BadParameter, for a file that cannot be read or is not there, and for a language that is not here.
    """
    if argument is None or argument == STDIN:
        raw, file = _stdin(), None
    elif (file := _file(argument, language)) is not None:
        raw = _read(file)
    else:
        argument = _unescaped(argument)
        return argument, language or _by_first_line(argument) or "python"
    by_name = None if file is None else ENDINGS.get(file.suffix.lower())
    what = "stdin" if file is None else str(file)
    spoken = language or by_name
    text = _text(raw, spoken, what)
    return text, spoken or _by_first_line(text) or "python"


def _unescaped(argument: str) -> str:
    """UTF-8 of a command line that was read in an encoding with fewer characters, as under LC_ALL=C."""
    try:
        return os.fsencode(argument).decode() if re.search("[\udc80-\udcff]", argument) else argument
    except UnicodeError:
        return argument


def _file(argument: str, language: str | None) -> Path | None:
    """The file that is meant; None when it is code."""
    file = Path(argument)
    shell = language in limits.SHELLS
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as exc:
        if _names_a_file(argument, shell=shell):
            why = "there is no such file" if isinstance(exc, FileNotFoundError) else f"it cannot be read: {exc}"
            raise typer.BadParameter(f"{argument}: {why} (code that looks like a file's name goes through stdin)") from None
        return None
    if "\n" in argument:
        return None
    if stat.S_ISDIR(mode):
        if shell:
            return None
        raise typer.BadParameter(f"{argument} is a directory: name the file in it that is to run")
    return file


def _names_a_file(argument: str, *, shell: bool) -> bool:
    """Whether it can hardly be anything else. In a shell, a bare path is a command."""
    if "\n" in argument or shell:
        return False
    if re.match(r"(\.{1,2}|~)?/\S*$", argument):
        return True
    if PurePath(argument).suffix.lower() not in ENDINGS:
        return False
    return not re.search(r"\s", argument) or not _is_python(argument)


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return _bounded(opened, str(file))
    except OSError as exc:
        raise typer.BadParameter(f"{file} cannot be read: {exc.strerror or exc}") from exc


def _stdin() -> bytes:
    raw = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read().encode("utf-8", "surrogatepass") if raw is None else _bounded(raw, "stdin")


def _bounded(opened: BinaryIO, what: str) -> bytes:
    """As much as may be sent, and what comes before the text."""
    raw = opened.read(limits.COMMAND_BYTES + len(codecs.BOM_UTF8) + 1)
    if len(raw) > limits.COMMAND_BYTES + len(codecs.BOM_UTF8):
        raise typer.BadParameter(f"{what} is too long: at most {limits.COMMAND_BYTES} bytes of code are run")
    return raw


def _text(raw: bytes, language: str | None, what: str) -> str:
    """Without a byte order mark, with the line ends of Linux. Python's own files may name another encoding than UTF-8."""
    encoding = "utf-8-sig"
    try:
        if language in (None, "python") and re.match(rb"[ \t\f]*#", raw):
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding)
    except (UnicodeDecodeError, SyntaxError, LookupError) as exc:
        raise typer.BadParameter(f"{what} cannot be read as text in UTF-8: {exc}") from exc
    return text.replace("\r\n", "\n")


def _by_first_line(text: str) -> str | None:
    """What `#!` asks for. Raises: typer.BadParameter, for a program whose language is not here."""
    first = text.split("\n", 1)[0]
    if not first.startswith("#!"):
        return None
    try:
        words = [word for word in shlex.split(first[2:]) if not word.startswith("-") and "=" not in word]
    except ValueError:
        words = first[2:].split()
    if words and os.path.basename(words[0]) == "env":  # noqa: PTH119 (of a path in Linux's spelling)
        words = words[1:]
    name = re.sub(r"[0-9.]+$", "", words[0].rsplit("/", 1)[-1]) if words else ""
    if name not in PROGRAMS:
        known = ", ".join(limits.LANGUAGES)
        raise typer.BadParameter(f"its first line asks for {first[2:].strip()!r}; --language is one of {known}")
    return PROGRAMS[name]
