"""What ./scripts/start and ./scripts/test share: Debian packages, the virtual environment, the images.

Runs on nothing but Debian's own Python and its standard library. Every step looks first and does only what is
missing; none asks a question.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

ROOT: Final = Path(__file__).resolve().parent.parent
VENV: Final = ROOT / ".venv"
PACKAGE_LIST: Final = ROOT / "scripts" / "debian-packages.txt"
OLDEST_PYTHON: Final = (3, 11)
APT_LOCK_DEADLINE_S: Final = 600
"""How long to wait for another apt, such as the one that runs by itself after a boot."""
_UNREACHABLE: Final = (
    "Could not resolve",
    "Could not connect",
    "Failed to establish a new connection",
    "Failed to fetch",
    "Name or service not known",
    "No matching distribution found",
    "Temporary failure",
    "Unable to connect",
)
_BORING: Final = ("(Reading database", "Looking in ", "Requirement already satisfied")
_TAIL_LINES: Final = 15


def become_root() -> None:
    """Go on as root if sudo lets us without a password; sandboxes need it (namespaces, mounts, /dev/kvm)."""
    if os.geteuid() == 0:
        return
    if shutil.which("sudo") and _status("sudo", "--non-interactive", "true") == 0:
        script = Path(sys.argv[0]).resolve()
        kept = "--preserve-env=" + ",".join(sorted(name for name in os.environ if _kept_for_root(name)))
        say("continuing as root, through sudo")
        os.execvp("sudo", ["sudo", "--non-interactive", kept, str(script), *sys.argv[1:]])
    fail(
        "This needs root: it installs packages, builds disk images and starts virtual machines.\n"
        f"Run: sudo {' '.join([sys.argv[0], *sys.argv[1:]])}"
    )


def everything(extra: str) -> None:
    """Packages, virtual environment with the project's `extra`, images. Ends the program if it can't."""
    if sys.version_info < OLDEST_PYTHON:
        oldest, here = ".".join(map(str, OLDEST_PYTHON)), sys.version.split()[0]
        fail(f"Python {oldest} or newer is needed; {sys.executable} is {here}.")
    os.chdir(ROOT)
    with (ROOT / "pyproject.toml").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another ./scripts/start or ./scripts/test to prepare this machine")
            fcntl.flock(lock, fcntl.LOCK_EX)
        debian_packages()
        virtual_environment(extra)
        images()


def debian_packages() -> None:
    """Install what is missing of PACKAGE_LIST."""
    wanted = [name for line in PACKAGE_LIST.read_text().splitlines() if (name := line.partition("#")[0].strip())]
    if not shutil.which("dpkg-query"):
        fail(f"This is not a Debian system. It needs the equivalents of: {' '.join(wanted)}")
    missing = [name for name in wanted if name not in _installed(wanted)]
    if not missing:
        done("Debian packages")
        return
    say(f"installing {len(missing)} Debian packages: {' '.join(missing)}")
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    by_hand = f"apt-get update && {' '.join(install)}"
    if os.geteuid() != 0:
        fail(f"Missing Debian packages: {' '.join(missing)}\nInstall them as root: {by_hand}")
    options = ["-o", f"DPkg::Lock::Timeout={APT_LOCK_DEADLINE_S}", "-o", "Acquire::Retries=3"]
    updated = _apt(["apt-get", *options, "update"], by_hand)
    _apt([install[0], *options, *install[1:]], by_hand, updated)
    if left := [name for name in missing if name not in _installed(missing)]:
        fail(f"apt-get ended well, but these are still missing: {' '.join(left)}\nTry: {by_hand}")
    done("Debian packages")


def virtual_environment(extra: str) -> None:
    """Make .venv and install the project in it, unless that was done for this pyproject.toml."""
    python = VENV / "bin" / "python"
    if _status(str(python), "-c", f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})") != 0:
        say(f"making {VENV.name}")
        _run([sys.executable, "-m", "venv", "--clear", str(VENV)], "Is python3-venv installed?")
    stamp = VENV / "instavm-installed.json"
    state = {"pyproject": hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(), "at": str(ROOT)}
    known = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if known in ({**state, "extra": extra}, {**state, "extra": "dev"}):
        done("Python packages")
        return
    say(f"installing Python packages ({extra})")
    stamp.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--retries", "3"]
    _run([*pip, "--editable", f".[{extra}]"], f"Try again: {' '.join(pip)} --editable '.[{extra}]'")
    stamp.write_text(json.dumps({**state, "extra": extra}))
    done("Python packages")


def images() -> None:
    """Kernel, guest base and default image; minutes the first time, then nothing."""
    if status := run_in_venv("python", "-m", "instavm.node.images"):
        sys.exit(status)


def run_in_venv(program: str, *arguments: str) -> int:
    """Run a program of the virtual environment here; its exit status (128 + n after signal n)."""
    path = f"{VENV / 'bin'}:{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(VENV)}
    with subprocess.Popen([str(VENV / "bin" / program), *arguments], cwd=ROOT, env=environment) as process:
        while True:
            try:
                status = process.wait()
                return status if status >= 0 else 128 - status
            except KeyboardInterrupt:
                continue  # it got the Ctrl-C too, and knows best what to clean up


def say(text: str) -> None:
    """Announce a step."""
    print(f"==> {text}", file=sys.stderr, flush=True)


def done(text: str) -> None:
    """A step is done, or wasn't needed."""
    print(f"✓ {text}", file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """Say what went wrong."""
    print(f"✗ {text}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    """Say what went wrong and end with status 1."""
    complain(text)
    sys.exit(1)


def _kept_for_root(name: str) -> bool:
    return name.startswith(("INSTAVM_", "PIP_", "SSL_CERT_")) or name.lower().endswith("_proxy")


def _installed(names: Sequence[str]) -> set[str]:
    shown = "${Package} ${db:Status-Status}\n"
    query = ["dpkg-query", "--show", "--showformat", shown, *names]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return {name for name, _, status in (line.partition(" ") for line in answer.splitlines()) if status == "installed"}


def _apt(command: Sequence[str], by_hand: str, before: Sequence[str] = ()) -> list[str]:
    """Run apt-get; what it printed. It waits for dpkg's lock by itself, but not for that of the package lists.

    before: what `update` printed. A source that can't be read is only a warning there, since it may be one that
    isn't needed.
    """
    deadline = time.monotonic() + APT_LOCK_DEADLINE_S
    while True:
        status, printed = _show(command)
        if status == 0:
            return printed
        if "Could not get lock" not in "".join(printed) or time.monotonic() > deadline:
            _explain(command, status, [*before, *printed], f"Try as root: {by_hand}")
        say("waiting for another apt to finish")
        time.sleep(2)


def _run(command: Sequence[str], advice: str) -> None:
    status, printed = _show(command)
    if status:
        _explain(command, status, printed, advice)


def _explain(command: Sequence[str], status: int, printed: Sequence[str], advice: str) -> NoReturn:
    tail = "".join(deque(printed, _TAIL_LINES)).rstrip()
    network = any(sign in line for line in printed for sign in _UNREACHABLE)
    why = "The package archive can't be reached: is this machine online?" if network else advice
    fail(f"{' '.join(command[:4])} … ended with status {status}. Its last lines:\n{tail}\n{why}")


def _show(command: Sequence[str]) -> tuple[int, list[str]]:
    """Run a program and show what it prints, on a terminal only the last line; status and output."""
    environment = {
        **os.environ,
        "DEBIAN_FRONTEND": "noninteractive",
        "NEEDRESTART_MODE": "a",
        "LC_ALL": "C.UTF-8",
    }
    printed: list[str] = []
    terminal = sys.stderr.isatty()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if line.lstrip().startswith(_BORING):
                continue
            width = shutil.get_terminal_size().columns - 5
            text = f"\r\033[K    {line.strip()[:width]}" if terminal else f"    {line.rstrip()}\n"
            print(text, end="", file=sys.stderr, flush=True)
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return process.returncode, printed


def _status(*command: str) -> int:
    try:
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode
    except OSError:
        return 127
