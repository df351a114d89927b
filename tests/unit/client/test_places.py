"""Local files: what is uploaded of one that changes, and where a download lands."""

import os
import stat
import tempfile
import threading
from pathlib import Path

import anyio
import pytest

from instavm.client.places import in_threads, landing, local_path, source
from instavm.errors import FileError, InvalidInput


def read(file):
    return b"".join(iter(file.read, b""))


def write(local, data=b"new", remote="/app/x.txt"):
    with landing(remote, local) as (file, result):
        result["size"] = file.write(data)
    return result


def mode(file):
    return stat.S_IMODE(file.stat().st_mode)


def test_what_is_appended_meanwhile_is_not_uploaded(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"before")
    with source(log) as file, log.open("ab") as more:
        more.write(b"after")
        more.flush()
        assert (file.size, read(file)) == (6, b"before")


def test_a_file_that_becomes_shorter_is_an_error_of_ours(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"x" * 1_000_000)
    with source(log) as file:
        log.write_bytes(b"short")
        with pytest.raises(FileError, match="shorter while it was uploaded"):
            read(file)


def test_a_file_whose_size_nobody_knows_is_read_to_its_end(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"z" * 300_000,))
    writer.start()
    with source(pipe) as file:
        assert (file.size, len(read(file))) == (None, 300_000)
    writer.join()
    with source(local_path("/proc/self/status", "file_path")) as file:
        assert file.size is None and b"Name:" in read(file)


def test_a_file_that_cannot_be_read_is_an_error_of_ours():
    with source(local_path("/proc/self/mem", "file_path")) as file, pytest.raises(FileError, match="cannot be read"):
        file.read()


@pytest.mark.parametrize("wrong", ["", "a\0b", b"bytes", 5, None])
def test_what_is_no_local_path_is_refused_by_name(wrong):
    with pytest.raises(InvalidInput, match="file_path"):
        local_path(wrong, "file_path")


def test_a_new_file_gets_the_mode_that_open_gives(tmp_path):
    (tmp_path / "opened").write_bytes(b"")
    assert write(tmp_path / "landed")["size"] == 3
    assert mode(tmp_path / "landed") == mode(tmp_path / "opened")


def test_a_file_that_is_there_keeps_its_mode(tmp_path):
    place = tmp_path / "script"
    place.write_text("old")
    place.chmod(0o750)
    write(place)
    assert (place.read_bytes(), mode(place)) == (b"new", 0o750)


def test_a_broken_download_leaves_what_was_there(tmp_path):
    place = tmp_path / "file"
    place.write_text("old")
    with pytest.raises(ZeroDivisionError), landing("/app/x", place) as (file, _):
        file.write(b"half")
        raise ZeroDivisionError
    assert [one.read_text() for one in tmp_path.iterdir()] == ["old"]


@pytest.fixture
def nobody(tmp_path_factory):
    """A folder of a user who is not root, who is us for the test."""
    if os.geteuid() != 0:
        yield tmp_path_factory.mktemp("nobody")
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)


def test_a_file_that_may_not_be_written_is_refused_before_anything_comes(nobody):
    place = nobody / "file"
    place.touch(0o444)
    with pytest.raises(PermissionError), landing("/app/x", place):
        raise AssertionError("it was opened")
    assert [one.name for one in nobody.iterdir()] == ["file"]


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "folder").mkdir()
    link, chain = tmp_path / "link", tmp_path / "chain"
    link.symlink_to("folder/file")  # which is not there yet
    chain.symlink_to(link)
    write(chain)
    assert link.is_symlink() and chain.is_symlink()
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"
    assert [one.name for one in (tmp_path / "folder").iterdir()] == ["file"]


def test_a_pipe_is_written_to(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write(pipe)
    reader.join()
    assert got == [b"new"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_only_the_kernel_leads_to_is_written_to(tmp_path):
    with (tmp_path / "out").open("wb") as out:
        inode = os.fstat(out.fileno()).st_ino
        write(f"/dev/fd/{out.fileno()}")
    assert ((tmp_path / "out").read_bytes(), (tmp_path / "out").stat().st_ino) == (b"new", inode)
    write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_takes_a_file_under_its_remote_name(tmp_path):
    assert write(tmp_path, remote="/app/data/x.csv")["local_path"] == str(tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == b"new"
    for remote in ("/", "/app/..", "."):
        with pytest.raises(InvalidInput, match="local_path"):
            write(tmp_path, remote=remote)


def test_a_long_name_can_be_downloaded(tmp_path):
    assert write(tmp_path / ("x" * 255))["size"] == 3


def test_a_download_that_is_cancelled_leaves_nothing(tmp_path):
    async def cancelled():
        with anyio.CancelScope() as scope:
            async with in_threads(landing("/app/x", tmp_path / "file")) as (file, _):
                file.write(b"half")
                scope.cancel()
                await anyio.sleep_forever()

    anyio.run(cancelled)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told_with_the_name_that_was_asked_for(tmp_path):
    place = tmp_path / "absent" / "x.txt"
    with pytest.raises(FileNotFoundError) as found:
        write(place)
    assert found.value.filename == str(place)
