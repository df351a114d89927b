"""A namespace with the guest's end of a sandbox's wire: the real kernel rules, the real filter, and programs instead of a VM.

What runs in it is what a guest can do at its worst, at the host's speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instavm.bench.egress import ip, namespaces, replace_tap
from instavm.node.network.addresses import GATEWAY
from instavm.node.network.space import Space

RUN_S = 60


class Guest:
    def __init__(self, name: str) -> None:
        self.name = name

    def command(self, code: str, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, sys.executable, "-c", code, *words]

    def python(self, code: str, *words: str) -> str:
        """What it prints; what it raises is printed, too."""
        done = subprocess.run(self.command(code, *words), capture_output=True, text=True, timeout=RUN_S)
        return done.stdout + done.stderr

    def start(self, code: str, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(code, *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def wired(space: Space, name: str = f"ivmg{os.getpid()}") -> Iterator[Guest]:
    """With the sandbox's DNS as its resolver, as in a guest."""
    folder = Path("/etc/netns") / name
    with namespaces(name):
        folder.mkdir(parents=True)
        try:
            (folder / "resolv.conf").write_text(f"nameserver {GATEWAY}\n")
            (folder / "nsswitch.conf").write_text("hosts: dns\n")
            replace_tap(space, name)
            ip("-n", name, "route", "add", "default", "via", GATEWAY)
            yield Guest(name)
        finally:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
