"""A server without root, as a program: it gives up root, makes a jail and runs a hostile VMM in it. Prints what that printed."""

import json
import os
import sys
from pathlib import Path

os.setgroups([])
os.setgid(65534)
os.setuid(65534)

import anyio  # noqa: E402

from instavm.node.jail import bubblewrap  # noqa: E402
from instavm.node.jail.jail import Jails, Needs  # noqa: E402
from instavm.settings import Settings  # noqa: E402


async def main(place: Path, program: str, known: dict) -> None:
    bubblewrap.PROGRAM_FILES = (*bubblewrap.PROGRAM_FILES, "/usr/lib/python3.11")
    home = place / "machines" / "m1"
    home.mkdir(parents=True)
    (home / "disk.qcow2").write_text("a disk")
    (home / "sandbox.json").write_text("whose it is")
    given = (known["layer_fd"], known["memory_fd"])
    known |= {"home": str(home), "note": str(home / "sandbox.json")}
    with Jails.open(Settings(state_dir=place, runtime_dir=place)) as jails:
        needs = Needs(home, 1, 256, (home / "disk.qcow2",), given)
        command = ["/usr/bin/python3.11", "-I", "-S", "-c", program, json.dumps(known)]
        jailed = await jails.start(command, needs, 1)
        jailed.parent.wait()
        jailed.cage.remove()


anyio.run(main, Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
