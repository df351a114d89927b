"""The API's process, taken to be broken into: what stands around the real one, and a hostile program in its place."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from servers import tidy

from instavm import InstaVM
from instavm.border import confined
from instavm.node.precedence import NICE

PROGRAM = Path(__file__).parent / "hostile_vmm.py"
NODES = ("isolation.key", "machines", "node.lock", "server.lock")
"""Of the state directory."""


def api_of(server):
    """The process that answers clients."""
    below = psutil.Process(server).children(recursive=True)
    (found,) = [one.pid for one in below if "--control" in one.cmdline() and one.name() != "bwrap"]
    return Path(f"/proc/{found}")


@contextmanager
def served(settings, short_folder):
    with tidy(settings, short_folder) as servers:
        servers.start(SPARE_MACHINES=0)
        yield servers.process.pid, servers.state


@contextmanager
def embedded(settings, short_folder, monkeypatch):
    folder = Path(tempfile.mkdtemp(dir=short_folder))
    for name, value in {"STATE_DIR": folder, "RUNTIME_DIR": folder / "run", "CACHE_DIR": settings.cache_dir}.items():
        monkeypatch.setenv(f"INSTAVM_{name}", str(value))
    monkeypatch.delenv("INSTAVM_BASE_URL", raising=False)
    with InstaVM("any", auto_start_session=False) as client:
        client.get_current_user()
        pid = int((folder / "server.lock").read_text())
        yield pid, folder
    server = psutil.Process(pid)
    server.terminate()
    server.wait(60)


@pytest.fixture(params=["serve", "embedded"])
def server(request, settings, short_folder, monkeypatch):
    more = () if request.param == "serve" else (monkeypatch,)
    with (served if request.param == "serve" else embedded)(settings, short_folder, *more) as about:
        yield about


def test_the_process_that_reads_what_clients_send_has_no_rights(server, settings):
    pid, state = server
    proc = api_of(pid)
    told = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    (uid,) = set(told["Uid"].split())
    assert settings.jail_uid_first <= int(uid) < settings.jail_uid_first + settings.jail_uid_count
    assert told["Gid"].split() == told["Uid"].split() and told["Groups"].split() == []
    assert {told[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (told["NoNewPrivs"], told["Seccomp"], told["NSpid"].split()[-1]) == ("1", "2", "1")
    for name in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
        assert (proc / "ns" / name).readlink() != Path(f"/proc/{pid}/ns/{name}").readlink(), name
    writable = {
        line.split()[4] for line in (proc / "mountinfo").read_text().splitlines() if "rw" in line.split()[5].split(",")
    }
    assert writable == {str(state / "control"), "/proc", "/dev/null"}
    assert (state / "control").stat().st_uid == int(uid) and state.stat().st_uid == os.getuid()
    root = proc / "root"
    for place in (
        *(state / name for name in NODES),
        settings.cache_dir,
        Path("/etc/passwd"),
        Path("/bin/sh"),
        Path("/sys"),
    ):
        assert place.name == "node.lock" or place.exists()
        assert not (root / str(place)[1:]).exists(), place
    files = {str(link.readlink()) for link in (proc / "fd").iterdir()}
    named = {one for one in files if one.startswith("/")}
    assert all(Path(one).is_relative_to(state / "control") or one in OTHERS for one in named - known(state)), named
    sockets = [one for one in files if one.startswith("socket")]
    assert len(sockets) <= 5, "its listener, its link, two ends that wake its own loop, and the client"


def test_the_servers_processes_come_before_what_they_start(server):
    """Calls wait for no sandbox's turn; nobody else may jump the queue with them."""
    pid, _ = server
    api = int(api_of(pid).name)
    assert [os.getpriority(os.PRIO_PROCESS, one) for one in (pid, api)] == [NICE, NICE]
    others = [one for one in psutil.Process(pid).children() if "instavm.node.network.filter" in one.cmdline()]
    assert [one.nice() for one in others] == [0]


OTHERS = {"/dev/null"}


def known(state):
    """What the server itself prints to, and the lock under which the embedded one is started."""
    return {str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in (1, 2)} | {str(state / "run" / "start.lock")}


@pytest.mark.anyio
async def test_an_api_that_was_broken_into_stays_in_its_jail(own, outside, monkeypatch):
    """The program that tries to get out of a VMM's jail, in this one. In its own folder it may do as it likes."""
    folder = own.control_dir
    there = {**outside, "home": str(folder), "note": str(folder / "sandbox.json"), "way": "control"}
    there["roots"] = [Path(path).parts[1] for path in (*confined.python_files(), sys.executable, PROGRAM, folder)]
    given = (outside["layer_fd"], outside["memory_fd"])
    with confined.confinement(own) as around:
        (folder / "disk.qcow2").write_text("its own")
        out, into = os.pipe()

        def spawned(command, descriptors, stdin):
            return subprocess.Popen(command, stdin=stdin, pass_fds=descriptors, stdout=into)

        monkeypatch.setattr(confined, "spawned", spawned)
        process, _ = around.start([sys.executable, "-I", "-S", str(PROGRAM), json.dumps(there)], given)
        os.close(into)
        with os.fdopen(out) as says:
            said = says.read()
        process.wait()
    got = json.loads(said.splitlines()[-1])
    assert len(got) > 80
    assert {name for name, what in got.items() if what is not None} <= {
        *("the_note_that_says_whose_machine_this_is", "a_note_of_our_own", "another_file_in_the_own_folder"),
        *("a_list_of_the_own_folder", "the_own_disk_under_another_name", "more_threads_than_a_machine_needs"),
        "a_disk_without_an_end",
    }, got


def test_without_root_it_runs_as_it_is_and_says_so(own, monkeypatch, caplog):
    for why, change in (("not root", {}), ("INSTAVM_JAIL=off", {"jail": "off"})):
        monkeypatch.setattr(os, "geteuid", lambda change=change: 0 if change else 1000)
        with caplog.at_level(logging.WARNING), confined.confinement(own.model_copy(update=change)) as around:
            assert around is None
        assert f"the API's process is not confined: {why}" in caplog.text
