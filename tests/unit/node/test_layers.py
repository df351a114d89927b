"""Disks on layers: names in headers, and who stands on what as the file system counts it."""

import shutil
import subprocess

import pytest

from instavm.node.layers import Layers, held, overlay


@pytest.fixture
def layers(tmp_path):
    return Layers(tmp_path / "state")


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
