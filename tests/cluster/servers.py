"""Servers that follow one another on one state directory."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import probed

from instavm import InstaVM
from instavm.node import inventory

PROGRAM = Path(sys.executable).with_name("instavm")
NOTHING = inventory.Inventory(frozenset(), frozenset())


class Servers:
    """One server after another on the same state directory and port."""

    def __init__(self, settings, folder, *, host="127.0.0.1", **more) -> None:
        """host: where to listen. more: settings of all of them."""
        self.state = folder
        probed.tell(settings, folder)
        self.host = host
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.port = probe.getsockname()[1]
        chosen = {"STATE_DIR": folder, "RUNTIME_DIR": folder, "CACHE_DIR": settings.cache_dir}
        chosen |= {"SPARE_MACHINES": 1, "SPARE_MACHINES_MAX": 1}
        self.env = {**os.environ, **_variables({**chosen, **more})}
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = self.run("key", "create", "restart")
        self.env |= {"INSTAVM_BASE_URL": self.url, "INSTAVM_API_KEY": self.key}
        self.process = None

    def run(self, *arguments) -> str:
        """What `instavm` with these arguments prints."""
        done = subprocess.run([PROGRAM, *arguments], env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start(self, *program, **settings) -> None:
        """`program`: what to run instead of the `instavm` that is installed."""
        command = [*(program or [PROGRAM]), "serve", "--host", self.host, "--port", str(self.port)]
        self.process = subprocess.Popen(command, env={**self.env, **_variables(settings)}, stdout=subprocess.PIPE)
        assert self.process.stdout.readline().startswith(b"InstaVM on")

    def end(self, signum=signal.SIGTERM) -> None:
        self.process.send_signal(signum)
        self.process.wait(60)
        self.process.stdout.close()

    def client(self, **more) -> InstaVM:
        return InstaVM(self.key, self.url, timeout=600, **more)


def _variables(settings):
    return {f"INSTAVM_{name}": str(value) for name, value in settings.items()}


@contextmanager
def tidy(settings, short_folder, **more):
    """Servers that have a folder of their own, of which nothing is left when the last of them has ended."""
    folder = Path(tempfile.mkdtemp(dir=short_folder))
    servers = Servers(settings, folder, **more)
    yield servers
    servers.end()
    left = inventory.take(folder)
    assert left == NOTHING, left
