"""Disks on layers: names in headers, and who stands on what as the file system counts it."""

import shutil
import subprocess

import pytest

from instavm.errors import CorruptSnapshot
from instavm.node.layers import Layers, held, overlay
from instavm.settings import Settings


@pytest.fixture
def layers(tmp_path):
    return Layers(Settings(state_dir=tmp_path / "state", cache_dir=tmp_path / "cache"))


def qcow2(path, *how):
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *how, path, "1G"], check=True)
    return path


@pytest.mark.parametrize("name", ["b", "a-name-that-is-much-longer-than-the-one-that-was-there-before", "ünïcode"])
def test_an_overlay_is_one_that_qemu_reads(tmp_path, name):
    base, other = qcow2(tmp_path / "base.qcow2"), qcow2(tmp_path / f"{name}.qcow2")
    blank = qcow2(tmp_path / "blank.qcow2", "-b", base, "-F", "qcow2")
    overlay(blank, other, tmp_path / "new.qcow2")
    told = subprocess.run(
        ["qemu-img", "info", tmp_path / "new.qcow2"], capture_output=True, text=True, check=True
    ).stdout
    assert f"backing file: {other}\n" in told and "backing file format: qcow2" in told and "1 GiB" in told
    subprocess.run(["qemu-img", "check", "-q", tmp_path / "new.qcow2"], check=True)


def test_a_path_too_long_for_a_header_is_refused(tmp_path):
    blank = qcow2(tmp_path / "blank.qcow2", "-b", qcow2(tmp_path / "base.qcow2"), "-F", "qcow2")
    with pytest.raises(OSError, match="too long"):
        overlay(blank, tmp_path / ("x" * 1100), tmp_path / "new.qcow2")


def test_a_layer_stays_for_as_long_as_somebody_stands_on_it(tmp_path, layers):
    first, second = tmp_path / "state" / "first", tmp_path / "state" / "second"
    disk = qcow2(first / "disk.qcow2")
    layers.link(disk, "one.qcow2", first)
    disk.unlink()
    second.mkdir()
    layers.share(first, second)
    assert held(first) == held(second) == {"one.qcow2"}
    shutil.rmtree(first)
    assert layers.unheld() == layers.sweep() == []
    shutil.rmtree(second)
    assert layers.unheld() == ["one.qcow2"]
    assert layers.sweep() == ["one.qcow2"] and layers.sweep() == []
    assert not layers.shared("one.qcow2", tmp_path / "third")


def test_nothing_is_held_where_nothing_is(tmp_path, layers):
    assert held(tmp_path / "none") == frozenset() and layers.sweep() == layers.unheld() == []


def chain(tmp_path, layers, home):
    """A disk in `home` on a layer of its own, on a template's disk, on an image; as files, nearest first."""
    image = tmp_path / "cache" / "images" / "one" / "rootfs"
    image.parent.mkdir(parents=True)
    image.write_bytes(bytes(1 << 20))
    template = qcow2(tmp_path / "cache" / "templates" / "key" / "disk.qcow2", "-b", image, "-F", "raw")
    home.mkdir()
    below = qcow2(home / "old.qcow2", "-b", template, "-F", "qcow2")
    layers.folder.mkdir(parents=True, exist_ok=True)
    layers.link(below, "layer.qcow2", home)
    qcow2(home / "disk.qcow2", "-b", layers.path("layer.qcow2"), "-F", "qcow2")
    return layers.path("layer.qcow2"), template, image


def test_what_a_disk_stands_on_is_read_from_headers(tmp_path, layers):
    home = tmp_path / "home"
    assert chain(tmp_path, layers, home) == layers.under(home / "disk.qcow2", home)


@pytest.mark.parametrize("lie", ["/etc/shadow", "layers/foreign.qcow2", "cache/images/../../secret"])
def test_a_header_that_names_what_is_not_its_own_is_refused(tmp_path, layers, lie):
    """A VMM writes its disk's header; the server, which may read everything, must not open what it says."""
    home = tmp_path / "home"
    chain(tmp_path, layers, home)
    qcow2(tmp_path / "secret")
    qcow2(layers.path("foreign.qcow2"))
    where = layers.path("foreign.qcow2") if "foreign" in lie else f"{tmp_path}/{lie}" if lie[0] != "/" else lie
    qcow2(tmp_path / "made" / "disk.qcow2", "-u", "-b", where, "-F", "raw")
    shutil.copyfile(tmp_path / "made" / "disk.qcow2", home / "disk.qcow2")
    with pytest.raises(CorruptSnapshot, match="may not stand on"):
        layers.under(home / "disk.qcow2", home)


def test_layers_that_stand_on_each_other_end(tmp_path, layers):
    home = tmp_path / "home"
    chain(tmp_path, layers, home)
    shutil.copyfile(home / "disk.qcow2", layers.path("layer.qcow2"))
    with pytest.raises(CorruptSnapshot):
        layers.under(home / "disk.qcow2", home)
