"""A VMM that was broken into finds no way out of its jail: not one of the ways in hostile_vmm.py."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.anyio
PROGRAM = Path(__file__).parent / "hostile_vmm.py"
HARMLESS = (
    *("the_hosts_passwords", "the_servers_files", "another_sandboxes_disk", "the_templates_memory_on_disk"),
    *("a_server_of_the_host", "an_abstract_socket_of_the_host", "seeing_other_processes", "any_capability"),
    *("opening_a_read_only_layer_for_writing", "another_file_in_the_own_folder", "raw_packets", "sysv_memory"),
    *("more_threads_than_a_machine_needs", "sysfs", "devices_of_the_host", "interfaces_of_the_host", "pidfd_open"),
    *("a_disk_without_an_end", "the_note_that_says_whose_machine_this_is", "being_in_the_group_of_root", "perf"),
)


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


async def test_without_root_it_stays_inside_too(outside):
    """Weaker, and only where the documents say so: no uid of its own, so what it may do is done in its own folder."""
    with tempfile.TemporaryDirectory(prefix="ivmt-") as place:
        os.chown(place, 65534, 65534)
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
