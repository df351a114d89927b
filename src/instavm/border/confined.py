"""What stands around control's process: it reads what strangers send, so it is taken to be broken into one day.

The walls are those of VMMs (`node/jail/`), around other files: Python, this package, and the one folder that control writes to.
It has a uid of its own, which owns that folder; of the server's descriptors it holds its listener, its link to the node and
its log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import instavm
from instavm.errors import HostNotReady
from instavm.node.jail import bubblewrap, gate, seccomp
from instavm.node.jail.bubblewrap import Walls
from instavm.node.jail.jail import UID_LOCKS, end, readable, require
from instavm.node.jail.uids import Uids
from instavm.settings import Settings

log = logging.getLogger(__name__)

LIMITS: Final = {resource.RLIMIT_CORE: 0, resource.RLIMIT_MSGQUEUE: 0, resource.RLIMIT_NPROC: 128}
LIBRARIES: Final = ("/etc/ld.so.cache", "/usr/lib/x86_64-linux-gnu", "/usr/lib64")


@dataclass(frozen=True, slots=True)
class Confinement:
    uid: int
    settings: Settings

    def start(self, command: Sequence[str], descriptors: Sequence[int] = ()) -> tuple[subprocess.Popen[bytes], int]:
        """Run a program in here; what we have to reap, and the program's own number.

        command: a Python and its arguments; files that they name can be read. Raises HostNotReady.
        """
        with gate.pipe() as go, gate.pipe(never_breaks=True) as says:
            with readable(seccomp.program(seccomp.API)) as filter_fd:
                arguments = bubblewrap.arguments(self._walls(command), says=says.writes, seccomp=filter_fd)
                given = (*descriptors, says.writes, filter_fd)
                process = spawned(gate.held([*arguments, *command]), given, stdin=go.reads)
            go.close_reads()
            says.close_writes()
            try:
                for limit, value in LIMITS.items():
                    resource.prlimit(process.pid, limit, (value, value))
            except OSError as exc:
                end(process)
                raise HostNotReady(f"the API's process can't be confined: {exc}") from exc
            os.write(go.writes, gate.GO)
            with os.fdopen(os.dup(says.reads), "rb") as hears:
                said = hears.read()
        if not said:
            process.wait()
            raise HostNotReady(f"{bubblewrap.BINARY} could not make a jail for the API")
        return process, bubblewrap.pid_in(said)

    def _walls(self, command: Sequence[str]) -> Walls:
        python, *arguments = command
        named = [word for word in arguments if word.startswith("/") and Path(word).is_file()]
        return Walls(
            python,
            self.settings.control_dir,
            self.uid,
            files=tuple(dict.fromkeys((*LIBRARIES, *python_files(), *named))),
            environment={"PATH": os.defpath, "HOME": "/", **self.settings.environment()},
            hostname="api",
        )


def spawned(
    command: Sequence[str], descriptors: Sequence[int], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """In a session of its own, so that a Ctrl-C at the server's terminal does not reach it."""
    return subprocess.Popen(command, stdin=stdin, pass_fds=descriptors, start_new_session=True)


@contextmanager
def confinement(settings: Settings) -> Iterator[Confinement | None]:
    """For one server's control; None where it runs as the server's own user. Raises HostNotReady."""
    if (why := unconfined(settings)) is not None:
        log.warning("the API's process is not confined: %s", why)
        yield None
        return
    require("the API")
    with contextlib.closing(Uids(settings.jail_uid_first, settings.jail_uid_count, UID_LOCKS)) as uids:
        uid = uids.lease()
        _give(settings.control_dir, uid)
        yield Confinement(uid, settings)


def unconfined(settings: Settings) -> str | None:
    """Why control runs with the rights of the server's own user; None: it does not."""
    if settings.jail == "off":
        return "INSTAVM_JAIL=off: it has all the rights of this server"
    if os.geteuid() != 0:
        return "not root: it can read and write what this user can"
    return None


def python_files() -> list[str]:
    """What this Python needs to run this package, and nothing else of it."""
    paths = sysconfig.get_paths()
    inside = Path(sys.prefix) / "pyvenv.cfg"
    found = [paths["stdlib"], paths["platstdlib"], *site.getsitepackages(), str(Path(instavm.__file__).parents[1])]
    if sys.base_prefix != "/usr":
        found.append(sys.base_prefix)
    return [path for path in (*found, str(inside)) if Path(path).exists()]


def _give(folder: Path, uid: int) -> None:
    """Have control own what it writes; an earlier one had another uid. Links are not followed: it may have made them."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (folder, *folder.iterdir()):
        os.chown(path, uid, uid, follow_symlinks=False)
    folder.chmod(0o700)
