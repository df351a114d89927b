"""A build is there completely or not at all, whatever happens to its builder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from instavm.errors import DiskFull, HostNotReady
from instavm.node.images.shelf import Shelf, remove_tree
from instavm.node.images.workshop import Workshop

HANGING_BUILDER = """
import sys
from pathlib import Path
from instavm.node.images.shelf import Shelf

def make(work):
    (work.folder / "half").write_text("half")
    if sys.argv[2] == "mounted":
        script = 'mkdir m && mount -t tmpfs none m && echo ready && exec sleep 600'
        work.run("sh", "-c", script, isolated=True)
    work.run("sh", "-c", "echo ready; exec sleep 600")

def tell(line):
    print(line, flush=True)

Shelf(Path(sys.argv[1])).ensure("key", make, needs_bytes=1, progress=tell)
"""


def whole(work: Workshop) -> None:
    (work.folder / "whole").write_text("whole")


def never(work: Workshop) -> None:
    raise AssertionError("built again")


def hanging_builder(folder: Path, kind: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", HANGING_BUILDER, str(folder), kind]
    builder = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    assert builder.stdout.readline() == "ready\n"
    return builder


def kill(builder: subprocess.Popen[str]) -> None:
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert builder.stdout is not None
    builder.stdout.close()


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


def test_what_is_built_once_is_found_after(tmp_path):
    shelf = Shelf(tmp_path)
    built = shelf.ensure("key", whole, needs_bytes=1)
    assert shelf.ensure("key", never, needs_bytes=1) == shelf.find("key") == built
    assert (built / "whole").read_text() == "whole"


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def broken(work: Workshop) -> None:
        (work.folder / "half").mkdir()
        raise HostNotReady("no luck")

    with pytest.raises(HostNotReady, match="no luck"):
        Shelf(tmp_path).ensure("key", broken, needs_bytes=1)
    assert contents(tmp_path) == []


@pytest.mark.parametrize("kind", ["plain", "mounted"])
def test_a_killed_builder_leaves_nothing_that_the_next_one_does_not_clear(tmp_path, kind):
    """kill -9 in mid-build: never visible as finished, tools and mounts gone, the next build succeeds."""
    builder = hanging_builder(tmp_path, kind)
    kill(builder)
    shelf = Shelf(tmp_path)
    assert shelf.find("key") is None
    assert contents(tmp_path)[:2] == [".building-key", ".building-key/half"]
    shelf.ensure("key", whole, needs_bytes=1)
    assert contents(tmp_path) == ["key", "key/whole"]
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if _works_in(pid, tmp_path)]


def _works_in(process: Path, folder: Path) -> bool:
    try:
        return str((process / "cwd").readlink()).startswith(f"{folder}/")
    except OSError:
        return False


def test_a_second_builder_waits_and_finds_the_first_ones_result(tmp_path):
    """While one builds, another waits; it builds only because the first is killed."""
    first = hanging_builder(tmp_path, "plain")
    lines: list[str] = []

    def waiting(line: str) -> None:
        if not lines:
            kill(first)
        lines.append(line)

    Shelf(tmp_path).ensure("key", whole, needs_bytes=1, progress=waiting)
    assert lines[0] == "waiting for another build to finish"


def test_leftover_mounts_are_unmounted_before_anything_is_removed(tmp_path):
    """A mount in a leftover shows other people's files; they must survive its removal."""
    precious, left = tmp_path / "precious", tmp_path / "shelf" / ".building-old"
    (left / "mnt").mkdir(parents=True)
    precious.mkdir()
    (precious / "file").touch()
    subprocess.run(["mount", "--bind", precious, left / "mnt"], check=True)
    Shelf(tmp_path / "shelf").ensure("key", whole, needs_bytes=1)
    assert contents(tmp_path / "shelf") == ["key", "key/whole"]
    assert (precious / "file").exists()


def test_links_in_a_leftover_are_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "link").symlink_to(tmp_path / "precious")
    remove_tree(tmp_path / "left")
    assert contents(tmp_path) == ["precious"]


def test_a_build_is_not_even_tried_without_the_space_it_needs(tmp_path):
    with pytest.raises(DiskFull, match=r"MiB free, this build needs \d+ MiB"):
        Shelf(tmp_path).ensure("key", never, needs_bytes=1 << 60)


def test_running_out_of_space_in_mid_build_says_so(tmp_path):
    def full(work: Workshop) -> None:
        Path("/dev/full").write_bytes(b"x" * 100_000)

    with pytest.raises(DiskFull, match="no space left"):
        Shelf(tmp_path).ensure("key", full, needs_bytes=1)


def test_old_builds_are_pruned_and_used_ones_kept(tmp_path):
    shelf = Shelf(tmp_path)
    for age, key in enumerate(("now", "hour", "day", "week")):
        built = shelf.ensure(key, whole, needs_bytes=1)
        then = time.time() - (0, 3600, 86_400, 604_800)[age]
        os.utime(built, (then, then))
    shelf.touch("week")
    shelf.prune(keep=2, min_age_s=7200)
    assert [key for key in ("now", "hour", "day", "week") if shelf.find(key)] == ["now", "hour", "week"]


def test_a_build_can_be_read_by_everyone_whatever_the_builders_umask(tmp_path):
    """The VMM runs under a user of its own."""
    old = os.umask(0o077)
    try:
        built = Shelf(tmp_path / "shelf").ensure("key", whole, needs_bytes=1)
    finally:
        os.umask(old)
    modes = [oct(path.stat().st_mode & 0o777) for path in (built.parent, built, built / "whole")]
    assert modes == ["0o755", "0o755", "0o444"]
