"""Runs the tools of a build. What a build starts dies with it, mounts included, even when it is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from instavm.errors import DiskFull, HostNotReady
from instavm.node import precedence

Progress = Callable[[str], None]
"""Is told, in one line without its end, what a build does now. Called often, from the building thread."""

STEP_DEADLINE_S: Final = 3600.0
"""One tool may run so long; only a hung download gets there."""
_TAIL_LINES: Final = 12
_SYSTEM_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_PROVIDERS: Final = {
    "apt-cache": "apt",
    "apt-config": "apt",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "lz4": "lz4",
    "mke2fs": "e2fsprogs",
    "mksquashfs": "squashfs-tools",
    "mmdebstrap": "mmdebstrap",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "zstd": "zstd",
}
_UNREACHABLE: Final = (
    "Could not resolve",
    "Temporary failure",
    "Unable to connect",
    "Failed to fetch",
    "Could not connect",
)
_OWN_NAMESPACES: Final = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--")
_DIES_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")


def silent(_: str) -> None:
    """Progress that nobody looks at."""


def check_host() -> None:
    """Can images be built here at all? Asked before a build, so that all that is missing is said at once.

    Raises: HostNotReady.
    """
    if os.geteuid() != 0:
        raise HostNotReady("building images takes root: run this once with sudo, the result is kept in the cache")
    require(*_PROVIDERS)


def require(*tools: str) -> None:
    """Raises: HostNotReady that names the Debian packages of every tool that is missing."""
    missing = [tool for tool in tools if _where(tool) is None]
    if missing:
        wanted = " ".join(sorted({_PROVIDERS.get(tool, tool) for tool in missing}))
        raise HostNotReady(f"missing on this host: {', '.join(missing)}; install with: apt-get install {wanted}")


def _where(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")


@dataclass(frozen=True, slots=True)
class Workshop:
    """What one build needs to run its tools.

    folder: the build's own temporary folder, on the cache's file system.
    lock_fd: held open by every tool too, so that nobody cleans up below one that is still dying.
    """

    folder: Path
    lock_fd: int
    progress: Progress = silent

    def run(self, *argv: str | Path, cwd: Path | None = None, isolated: bool = False, quiet: bool = False) -> str:
        """Run a tool to its end and return what it printed (stdout and stderr, UTF-8).

        The tool sees nothing of our environment but PATH, HOME and the proxies.

        isolated: in mount and pid namespaces of its own, which end, with all that is in them, when the tool
        or this process ends. For tools that mount or chroot.
        quiet: don't report its lines as progress.

        Raises: HostNotReady with the last lines it printed when it is missing, fails or takes longer than
        STEP_DEADLINE_S; DiskFull when that is why.
        """
        command = [str(part) for part in argv]
        require(command[0])
        wrapper = [*_DIES_WITH_US, *(_OWN_NAMESPACES if isolated else ())]
        printed: list[str] = []
        with subprocess.Popen(
            [*wrapper, *command],
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
            text=True,
            errors="replace",
            pass_fds=(self.lock_fd,),
            start_new_session=True,
            umask=0o022,
        ) as process:
            precedence.like_everybody(process.pid)
            watchdog = threading.Timer(STEP_DEADLINE_S, _end, [process])
            watchdog.start()
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    printed.append(line)
                    if not quiet and line.strip():
                        self.progress(line.strip())
                status = process.wait()
            except BaseException:
                _end(process)
                process.stdout.read()  # ends when nobody holds its other end: when all of them are gone
                raise
            finally:
                watchdog.cancel()
        if status != 0:
            raise _failure(command, status, printed)
        return "".join(printed)


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name == "HOME" or name.lower().endswith("_proxy")}
    return {**kept, "LC_ALL": "C.UTF-8", "PATH": f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"}


def _failure(command: Sequence[str], status: int, printed: Sequence[str]) -> Exception:
    text = "".join(printed)
    tail = "".join(deque(printed, _TAIL_LINES)).rstrip()
    if "No space left on device" in text:
        return DiskFull(f"{command[0]} ran out of disk space:\n{tail}")
    why = (
        "the package archive could not be reached" if any(sign in text for sign in _UNREACHABLE) else f"status {status}"
    )
    return HostNotReady(f"{command[0]} failed ({why}); its last lines:\n{tail}")
