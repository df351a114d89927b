"""A server that is killed while it starts something leaves nothing that waits for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from instavm.node.jail import bubblewrap, gate
from instavm.node.jail.bubblewrap import Walls
from instavm.node.jail.jail import end, readable, spawn
from instavm.node.jail.seccomp import program

SERVER = Path(__file__).parent / "mortal_server.py"


@pytest.mark.parametrize("point", ["held", "let_go"])
@pytest.mark.parametrize("what", ["vmm", "api"])
def test_nothing_is_left_of_a_start_whose_server_is_killed(short_folder, what, point):
    place = short_folder / f"{what}-{point}"
    done = subprocess.run([sys.executable, SERVER, what, point, place], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert left_of(place) == []


def test_a_jail_is_finished_even_when_nobody_hears_its_number():
    """bubblewrap that can't tell it ends, and its child would wait for it for ever."""
    with readable(program()) as filter_fd, gate.pipe(never_breaks=True) as says:
        walls = Walls(bubblewrap.SETPRIV, None, os.getuid() or 1_949_999_999)
        arguments = bubblewrap.arguments(walls, says=says.writes, seccomp=filter_fd)
        says.close_reads()
        done = subprocess.run(
            [*arguments, bubblewrap.SETPRIV, "--version"],
            pass_fds=(says.writes, filter_fd),
            capture_output=True,
            timeout=30,
        )
    assert done.returncode == 0, done.stderr


def test_a_start_that_is_given_up_ends_with_all_that_it_started():
    """Also what is a process namespace's first, which takes no signal from inside and no SIGTERM from outside."""
    null = os.open(os.devnull, os.O_RDWR)
    popen = spawn(["unshare", "--pid", "--fork", "sh", "-c", "trap '' TERM; sleep 600; :"], (), null)
    try:
        started = []
        while len(started) < 2:
            started = psutil.Process(popen.pid).children(recursive=True)
        end(popen)
        assert psutil.wait_procs(started, timeout=10)[1] == []
    finally:
        os.close(null)


def left_of(place: Path) -> list[str]:
    """Command lines of what still runs for this folder after 10 s."""
    deadline = time.monotonic() + 10
    while left := [" ".join(one.info["cmdline"] or ()) for one in processes() if names(one, place)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left


def processes():
    return psutil.process_iter(["cmdline"])


def names(process, place: Path) -> bool:
    return any(str(place) in word for word in process.info["cmdline"] or ())
