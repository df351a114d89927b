"""A VMM that was broken into finds no way out of its jail: not one of the ways in hostile_vmm.py."""

import ctypes
import json
import os
import secrets
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from instavm.node.vmm.memory import sealed

pytestmark = pytest.mark.anyio
PROGRAM = Path(__file__).parent / "hostile_vmm.py"
HARMLESS = (
    *("the_hosts_passwords", "the_servers_files", "another_sandboxes_disk", "the_templates_memory_on_disk"),
    *("a_server_of_the_host", "an_abstract_socket_of_the_host", "seeing_other_processes", "any_capability"),
    *("opening_a_read_only_layer_for_writing", "another_file_in_the_own_folder", "raw_packets", "sysv_memory"),
    *("more_threads_than_a_machine_needs", "sysfs", "devices_of_the_host", "interfaces_of_the_host", "pidfd_open"),
    *("a_disk_without_an_end", "the_note_that_says_whose_machine_this_is", "being_in_the_group_of_root", "perf"),
)


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


async def test_a_vmm_that_was_broken_into_stays_in_its_jail(run_jailed, outside, home):
    given = (outside["layer_fd"], outside["memory_fd"])
    said, status = await run_jailed(PROGRAM, json.dumps(outside), descriptors=given)
    assert status == 0, said
    got = json.loads(said.splitlines()[-1])
    assert len(got) > 80
    assert {name: what for name, what in got.items() if what is not None} == {}
    assert {path.name for path in home.iterdir()} == {"disk.qcow2", "sandbox.json"}
    assert (home / "disk.qcow2").stat().st_size == 6


async def test_the_same_attempts_succeed_without_a_jail(outside):
    """So that the test above can fail: the program does find what is there. (What would hurt this machine is left out.)"""
    done = subprocess.run(
        ["/usr/bin/python3.11", "-I", "-S", PROGRAM, json.dumps(outside), *HARMLESS],
        pass_fds=(outside["layer_fd"], outside["memory_fd"]),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    got = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, what in got.items() if what is None} == set()


async def test_without_root_it_stays_inside_too(outside, tmp_path_factory):
    """Weaker, and only where the documents say so: no uid of its own, so what it may do is done in its own folder."""
    place = tmp_path_factory.mktemp("rootless")
    os.chown(place, 65534, 65534)
    for above in (place.parent, place.parent.parent):
        above.chmod(0o755)
    done = subprocess.run(
        [sys.executable, PROGRAM.with_name("without_root.py"), place, PROGRAM.read_text(), json.dumps(outside)],
        pass_fds=(outside["layer_fd"], outside["memory_fd"]),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    got = {name for name, what in json.loads(done.stdout.splitlines()[-1]).items() if what is not None}
    assert got <= {
        *("the_note_that_says_whose_machine_this_is", "a_note_of_our_own", "another_file_in_the_own_folder"),
        *("a_list_of_the_own_folder", "the_own_disk_under_another_name", "more_threads_than_a_machine_needs"),
    }
