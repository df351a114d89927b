"""Servers, one after another, on one state directory."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from instavm import InstaVM
from instavm.node import inventory

PROGRAM = Path(sys.executable).with_name("instavm")
NOTHING = inventory.Inventory(frozenset(), frozenset())


class Servers:
    """One server after another on the same state directory and port."""

    def __init__(self, settings, folder) -> None:
        self.state = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        chosen = {"STATE_DIR": folder, "RUNTIME_DIR": folder, "CACHE_DIR": settings.cache_dir, "SPARE_MACHINES": 1}
        self.env = {**os.environ, **{f"INSTAVM_{name}": str(value) for name, value in chosen.items()}}
        created = self._run("key", "create", "restart", "--json")
        self.key = next(word for word in created.replace('"', " ").split() if word.startswith("instavm_sk_"))
        self.process = None

    def _run(self, *arguments) -> str:
        done = subprocess.run([PROGRAM, *arguments], env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, **settings) -> None:
        env = {**self.env, **{f"INSTAVM_{name}": str(value) for name, value in settings.items()}}
        self.process = subprocess.Popen([PROGRAM, "serve", "--port", str(self.port)], env=env, stdout=subprocess.PIPE)
        assert self.process.stdout.readline().startswith(b"InstaVM on")

    def end(self, signum=signal.SIGTERM) -> None:
        self.process.send_signal(signum)
        self.process.wait(60)
        self.process.stdout.close()

    def client(self, **more) -> InstaVM:
        return InstaVM(self.key, f"http://127.0.0.1:{self.port}", timeout=600, **more)


@pytest.fixture
def servers(settings, short_folder):
    folder = Path(tempfile.mkdtemp(dir=short_folder))
    servers = Servers(settings, folder)
    yield servers
    servers.end()
    assert inventory.take(folder) == NOTHING
