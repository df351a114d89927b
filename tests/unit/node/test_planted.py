"""Links that a hostile VMM, or anybody else, has planted where the server works: refused, and nothing is written beyond them."""

import os
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from instavm.errors import BootFailed, CorruptSnapshot, HostNotReady
from instavm.node import planted
from instavm.node.jail import jailer
from instavm.node.jail.jailer import Cell
from instavm.node.layers import Layers
from instavm.settings import Settings


@pytest.fixture
def host(tmp_path):
    """A file and a folder of the host's that must stay as they are."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("the host's")
    (outside / "secret").chmod(0o644)
    before = state(outside)
    yield outside
    assert state(outside) == before


def state(folder):
    return {path: (path.lstat().st_mode, path.lstat().st_mtime_ns) for path in (folder, *folder.iterdir())}


@pytest.fixture
def cell(tmp_path):
    home = tmp_path / "m1"
    home.mkdir()
    shown = ((Path("/t/memory"), "memory"), (Path("/t/state"), "state"))
    return Cell(Path("/bin/firecracker"), Path("/bin/jailer"), home, 7, 99, shown, None)


@pytest.mark.parametrize("place", ["firecracker", "firecracker/m", "firecracker/m/root"])
@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_in_place_of_a_folder_of_the_jail_is_refused(cell, host, place, dangling):
    link = cell.home / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(host / "none" if dangling else host)
    with pytest.raises(HostNotReady, match="a jail can't be made"):
        jailer._furnish(cell, os.geteuid())


def test_a_link_in_place_of_the_machines_own_folder_is_refused(cell, host, tmp_path):
    (tmp_path / "m2").symlink_to(host)
    with pytest.raises(HostNotReady, match="a jail can't be made"):
        jailer._furnish(replace(cell, home=tmp_path / "m2"), os.geteuid())


def test_a_jail_is_made_where_nothing_lies(cell):
    jailer._furnish(cell, os.geteuid())
    assert sorted(path.name for path in cell.root.iterdir()) == ["disk", "memory", "metrics", "state"]


@pytest.mark.parametrize("name", ["disk", "memory", "api.sock"])
def test_a_link_in_place_of_a_file_is_refused(tmp_path, host, name):
    (tmp_path / name).symlink_to(host / "secret")
    with pytest.raises(FileExistsError):
        planted.make_empty(tmp_path / name)


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe", "folder"])
def test_what_a_vmm_has_not_made_as_a_file_is_not_taken(tmp_path, host, kind):
    made = tmp_path / "made-state"
    match kind:
        case "link":
            made.symlink_to(host / "secret")
        case "dangling":
            made.symlink_to(host / "none")
        case "hard link":
            (tmp_path / "other").write_text("another's")
            made.hardlink_to(tmp_path / "other")
        case "pipe":
            os.mkfifo(made)
        case "folder":
            made.mkdir()
    with pytest.raises((BootFailed, OSError)):
        planted.take(made, tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_a_file_that_is_changed_for_a_link_while_it_is_taken_is_not_taken_either(tmp_path, host, monkeypatch):
    made = tmp_path / "made-state"
    made.write_text("a state")

    def chown(fd, uid, gid):
        made.unlink()
        made.symlink_to(host / "secret")

    monkeypatch.setattr(os, "fchown", chown)
    with pytest.raises(BootFailed, match="in its place"):
        planted.take(made, tmp_path / "final")
    assert not (tmp_path / "final").is_symlink()


def test_a_file_that_a_vmm_made_is_the_servers_afterwards(tmp_path):
    made = tmp_path / "made-state"
    made.write_text("a state")
    made.chmod(0o666)
    planted.take(made, tmp_path / "final")
    assert (tmp_path / "final").read_text() == "a state"
    assert (tmp_path / "final").stat().st_mode & 0o777 == 0o600


def test_a_link_to_anothers_socket_is_not_followed(tmp_path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other.sock"))
        other.listen()
        (tmp_path / "agent.sock").symlink_to(tmp_path / "other.sock")
        with pytest.raises(OSError, match="is no socket"), planted.socket_at(tmp_path / "agent.sock"):
            pass


def test_a_socket_stays_the_same_when_its_name_becomes_anothers(tmp_path):
    with (
        socket.socket(socket.AF_UNIX) as own,
        socket.socket(socket.AF_UNIX) as other,
        socket.socket(socket.AF_UNIX) as end,
    ):
        for one, name in ((own, "api.sock"), (other, "other.sock")):
            one.bind(str(tmp_path / name))
            one.listen()
        heard = threading.Thread(target=lambda: own.accept()[0].sendall(b"own"))
        heard.start()
        with planted.socket_at(tmp_path / "api.sock") as place:
            (tmp_path / "api.sock").unlink()
            (tmp_path / "api.sock").symlink_to(tmp_path / "other.sock")
            end.connect(place)
        assert end.recv(10) == b"own"
        heard.join()


def test_a_link_in_place_of_a_disk_becomes_no_layer(tmp_path, host):
    home = tmp_path / "m1"
    home.mkdir()
    (home / "disk.qcow2").symlink_to(host / "secret")
    layers = Layers(Settings(state_dir=tmp_path / "state", cache_dir=tmp_path / "cache"))
    (tmp_path / "state").mkdir()
    with pytest.raises(CorruptSnapshot, match="no file"):
        layers.link(home / "disk.qcow2", "a.qcow2", home)
    assert not layers.path("a.qcow2").exists()
