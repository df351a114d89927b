"""Jails as a node makes them, with a program of ours in place of QEMU."""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import anyio
import probed
import pytest

from instavm.node.jail import bubblewrap
from instavm.node.jail.jail import Jails, Needs
from instavm.node.vmm.memory import sealed

PYTHON = "/usr/bin/python3.11"
STANDARD_LIBRARY = "/usr/lib/python3.11"


@pytest.fixture
def own(short_folder, settings, request):
    state = short_folder / request.node.name[5:25]
    (state / "machines").mkdir(parents=True, mode=0o700)
    return probed.at(settings, state)


@pytest.fixture
def jails(own):
    with Jails.open(own) as jails:
        yield jails
        assert jails.cgroups is None or not jails.cgroups.machines()


@pytest.fixture
def home(own):
    home = own.state_dir / "machines" / "m1"
    home.mkdir(mode=0o700)
    (home / "disk.qcow2").write_bytes(b"a disk")
    (home / "sandbox.json").write_text("whose it is")
    (home / "sandbox.json").chmod(0o600)
    return home


@pytest.fixture
def run_jailed(jails, home, monkeypatch):
    """Run a Python script in a jail; what it printed, and its exit status. Its interpreter is all that the jail has more."""
    monkeypatch.setattr(bubblewrap, "PROGRAM_FILES", (*bubblewrap.PROGRAM_FILES, STANDARD_LIBRARY))

    async def run_jailed(script: Path, *arguments: str, descriptors=(), meanwhile=lambda jailed: None):
        out, into = os.pipe()
        needs = Needs(home, 1, 256, (home / "disk.qcow2",), tuple(descriptors))
        command = [PYTHON, "-I", "-S", "-c", script.read_text(), *arguments]
        try:
            with anyio.fail_after(60):
                jailed = await jails.start(command, needs, into)
                os.close(into)
                meanwhile(jailed)
                said = await anyio.to_thread.run_sync(_all_of, out)
                status = await anyio.to_thread.run_sync(jailed.parent.wait)
            jailed.cage.remove()
        finally:
            os.close(out)
        return said, status

    return run_jailed


@pytest.fixture
def outside(own, home):
    """What there would be to find, all of it real: files, a process, servers, shared memory; and two given descriptors."""
    server_file = own.state_dir / "control.db"
    server_file.write_text("keys")
    other = own.state_dir / "machines" / "m2"
    other.mkdir(mode=0o700)
    (other / "disk.qcow2").write_text("somebody else's")
    memory = own.state_dir / "memory"
    memory.write_bytes(b"template" * 1024)
    abstract = secrets.token_hex(8)
    libc = ctypes.CDLL(None)
    key = secrets.randbelow(1 << 30) + 1
    segment = libc.shmget(key, 4096, 0o1666)
    assert segment >= 0
    with (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as bystander,
        closing(socket.create_server(("127.0.0.1", 0))) as tcp,
        closing(socket.socket(socket.AF_UNIX)) as unix,
        (other / "disk.qcow2").open("rb") as layer,
    ):
        unix.bind("\0" + abstract)
        unix.listen()
        memory_fd = sealed(memory)
        try:
            yield {
                "home": str(home),
                "note": str(home / "sandbox.json"),
                "server_file": str(server_file),
                "other_disk": str(other / "disk.qcow2"),
                "memory_file": str(memory),
                "host_pid": bystander.pid,
                "host_port": tcp.getsockname()[1],
                "abstract": abstract,
                "shm_key": key,
                "layer_fd": layer.fileno(),
                "memory_fd": memory_fd,
            }
            assert bystander.poll() is None
            assert os.pread(memory_fd, 8, 0) == b"template"
        finally:
            bystander.kill()
            os.close(memory_fd)
            libc.shmctl(segment, 0, None)


def _all_of(fd):
    with os.fdopen(os.dup(fd), "rb") as file:
        return file.read().decode()
