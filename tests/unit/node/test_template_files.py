"""A template is used only when every byte of it is what was saved."""

import fcntl
import json

import pytest

from instavm.errors import CorruptTemplate
from instavm.node import templates
from instavm.settings import Settings


@pytest.fixture
def folder(tmp_path):
    with (tmp_path / "memory").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(300_000)
        file.write(b"page")
    (tmp_path / "state").write_bytes(b"devices")
    names = ("memory", "state")
    description = {"sha256": {name: templates.digest(tmp_path / name) for name in names}}
    (tmp_path / "template.json").write_text(json.dumps(description))
    return tmp_path


def test_a_whole_template_passes(folder):
    templates.verify(folder)


def test_one_that_is_not_there_is_told_from_one_that_is_broken(tmp_path):
    with pytest.raises(FileNotFoundError):
        templates.verify(tmp_path / "key")


def test_a_file_that_is_missing_is_found(folder):
    (folder / "state").unlink()
    with pytest.raises(CorruptTemplate, match="missing"):
        templates.verify(folder)


@pytest.mark.parametrize("name", ["memory", "state"])
def test_a_flipped_bit_is_found(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[data.index(b"e")] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CorruptTemplate, match=name):
        templates.verify(folder)


def test_a_truncated_file_is_found(folder):
    with (folder / "memory").open("r+b") as file:
        file.truncate((1 << 20) - 4096)
    with pytest.raises(CorruptTemplate, match="memory"):
        templates.verify(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": 5}', "{}"])
def test_a_broken_description_is_found(folder, text):
    (folder / "template.json").write_text(text)
    with pytest.raises(CorruptTemplate, match="description"):
        templates.verify(folder)


def test_what_a_killed_builder_left_is_gone_after_the_next(tmp_path):
    """A half-built template is never seen under its name, and does not stay."""
    final = tmp_path / "key"
    (tmp_path / ".key-dead").mkdir()
    with templates._building(final) as building:
        (building / "state").write_text("x")
        assert not final.exists()
        assert not (tmp_path / ".key-dead").exists()
    assert (final / "state").read_text() == "x"


def test_a_build_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), templates._building(tmp_path / "key") as building:
        (building / "state").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_starts_removes_what_a_killed_builder_left_in_the_shared_cache(tmp_path):
    """Also when nobody ever builds that template again; one that somebody builds just now is left alone."""
    settings = Settings(cache_dir=tmp_path / "cache", state_dir=tmp_path / "state")
    shared = tmp_path / "cache" / "templates"
    for name in (".dead-x1", ".busy-x2", "whole"):
        (shared / name).mkdir(parents=True)
    with (shared / "busy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        templates.Templates(settings, None, None).clear()
    assert {one.name for one in shared.iterdir() if one.is_dir()} == {".busy-x2", "whole"}
    templates.Templates(settings, None, None).clear()
    assert {one.name for one in shared.iterdir() if one.is_dir()} == {"whole"}
