"""A server that is killed at one point of starting a confined process: `mortal_server.py WHAT POINT FOLDER`."""

import os
import resource
import signal
import sys
from pathlib import Path

import anyio

from instavm.border.confined import Confinement
from instavm.node.jail import bubblewrap, gate
from instavm.node.jail.jail import Jails, Needs
from instavm.settings import Settings


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(fd: int, data: bytes, write=os.write) -> int:
    write(fd, data)
    if data == gate.GO:
        die()
    return len(data)


async def start_vmm(settings: Settings, program: tuple[str, ...]) -> None:
    home = settings.state_dir / "machines" / "m1"
    home.mkdir(parents=True)
    with Jails.open(settings) as jails:
        await jails.start(program, Needs(home, 1, 256), os.open(os.devnull, os.O_WRONLY))


def main(what: str, point: str, place: Path) -> None:
    settings = Settings(state_dir=place, runtime_dir=place)
    settings.control_dir.mkdir(parents=True)
    program = (bubblewrap.SETPRIV, "--version")
    if point == "held" and what == "vmm":
        Jails.confine = die
    elif point == "held":
        resource.prlimit = die
    else:
        os.write = write_and_die
    if what == "vmm":
        anyio.run(start_vmm, settings, program)
    else:
        Confinement(settings.jail_uid_first, settings).start(program)


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
