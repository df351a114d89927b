"""The SDK where there is no Linux: what other systems lack is hidden, and a real server is called."""

import subprocess
import sys
import textwrap

import pytest

HIDDEN = """
import builtins, os, signal, sys
# the standard library and the libraries of others know where they are
import anyio, asyncio, email.utils, ssl, subprocess, tempfile, threading, urllib.request, uuid
import anyio._backends._asyncio, httpcore, httpx, httpx_sse, pydantic, rich.console, rich.progress, rich.table, typer
import typer.core, typer.rich_utils
lacks = {"fcntl", "pwd", "grp", "resource", "termios", "tty", "pty", "posix_ipc", "syslog"}
for name in lacks:
    sys.modules[name] = None
missing = {os: ["pidfd_open"], signal: ["pidfd_send_signal"]}
if PLATFORM == "win32":
    missing[os] += ["register_at_fork", "fork", "geteuid", "getuid", "chown", "mkfifo", "umask"]
    missing[signal] += ["SIGHUP", "SIGPIPE", "SIGKILL"]
for module, names in missing.items():
    for name in names:
        delattr(module, name)
os.supports_effective_ids = set()
first = os.stat, os.open
def at_home(call):
    def checked(path, *more, **named):
        assert not str(path).startswith("/proc"), path
        return call(path, *more, **named)
    return checked
os.stat, os.open = map(at_home, first)
real_open = builtins.open
builtins.open = at_home(real_open)
sys.platform = PLATFORM
"""

CALLS = """
import asyncio, pathlib, tempfile
from instavm import AsyncInstaVM, InstaVM, HostNotReady
with tempfile.TemporaryDirectory() as folder, InstaVM(KEY, URL) as vm:
    print(vm.execute("print(6 * 7)").stdout, end="")
    local = pathlib.Path(folder, "x.txt")
    local.write_text("content")
    vm.upload_file(local, "in/")
    vm.download_file("in/x.txt", pathlib.Path(folder, "back"))
    vm.download_file("in/x.txt", pathlib.Path(folder, "back"))
    print(pathlib.Path(folder, "back").read_text())
    print("".join(event.text for event in vm.stream("print('live')") if event.type == "stdout"), end="")
async def main():
    async with AsyncInstaVM(KEY, URL) as vm:
        print((await vm.execute("print('async')")).stdout, end="")
asyncio.run(main())
try:
    InstaVM("any")
except HostNotReady as exc:
    print("base_url" in str(exc))
"""


def elsewhere(platform, server, code):
    given = f"PLATFORM, KEY, URL = {(platform, server.key, server.url)!r}\n"
    command = [sys.executable, "-c", given + HIDDEN + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_every_kind_of_call_works(server, platform):
    assert elsewhere(platform, server, CALLS) == "42\ncontent\nlive\nasync\nTrue\n"


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_the_command_line_works(server, platform):
    code = """
    from instavm.cli.app import run
    sys.exit(run(["exec", "print('ran')", "--api-key", KEY, "--base-url", URL]))
    """
    assert elsewhere(platform, server, code) == "ran\n"
