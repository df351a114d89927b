"""Files over HTTP: streamed, byte-exact, and refused in words that arrive."""

import base64
import os
import threading
import tracemalloc
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

import httpx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from instavm import DiskFull, FileError, FileMissing, InvalidInput
from instavm.client.calls import files
from instavm.client.places import Source, source


@pytest.fixture
def local(tmp_path):
    """A file of some megabytes, with a name that nobody should rely on."""
    file = tmp_path / 'a "b" c.bin'
    file.write_bytes(os.urandom(5_000_001))
    return file


def test_a_file_goes_in_and_comes_out(vm, local, tmp_path):
    answer = vm.upload_file(local, "in.bin")
    assert (answer.remote_path, answer.size) == ("/app/in.bin", 5_000_001)
    back = vm.download_file("in.bin", tmp_path / "back")
    assert (back.size, back.local_path) == (5_000_001, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == local.read_bytes()
    assert vm.download_file("/app/in.bin").content == local.read_bytes()


def test_the_default_answer_is_json_with_base64(vm, http):
    vm.execute("open('x', 'wb').write(bytes(range(256)) * 1000); open('empty', 'w').close()")
    for kind in ("data", "json"):
        answer = http.post("/download", **{kind: {"filename": "x", "session_id": vm.session_id}})
        assert answer.headers["content-type"] == "application/json"
        told = answer.json()
        assert base64.b64decode(told["content"], validate=True) == bytes(range(256)) * 1000
        assert (told["filename"], told["size"]) == ("x", 256_000)
    empty = http.post("/download", data={"filename": "empty", "session_id": vm.session_id}).json()
    assert (empty["content"], empty["size"]) == ("\n", 0)
    assert vm.download_file("empty").content == b""


def test_what_cannot_be_fetched(vm, tmp_path):
    for path, kind in (("nope", FileMissing), (".", FileError), ("/app", FileError)):
        with pytest.raises(kind):
            vm.download_file(path, tmp_path / "never")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidInput):
        vm.download_file("")
    with pytest.raises(InvalidInput):
        vm.download_file("a\0b")


def test_a_full_disk_is_an_error_that_arrives_even_while_the_client_still_sends(vm, tmp_path):
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(DiskFull, match="the sandbox's own disk"):
        vm.upload_file(big, "big")


def test_server_memory_stays_flat(vm, tmp_path):
    """The server runs in this process, so what Python allocates shows it."""
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(50 << 20)
    tracemalloc.start()
    try:
        vm.upload_file(big, "big")
        vm.download_file("big", tmp_path / "back")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "back").stat().st_size == 50 << 20
    assert peak < 16 << 20


def parts(session_id, *, path="x", file=("f", b"data")):
    return {"data": {"remote_path": path, "session_id": session_id, "recursive": "false"}, "files": {"file": file}}


def test_as_the_official_client_sends_it(vm, http):
    answer = http.post("/upload", **parts(vm.session_id, path="d/", file=("/home/me/../me/x.txt", b"hello")))
    assert answer.json() == {"status": "success", "remote_path": "/app/d/x.txt", "size": 5}


@pytest.mark.parametrize("name", ["", ".", "..", "a/..", "\\..\\x", "a\\.."])
def test_the_name_that_a_client_gives_leads_nowhere(vm, http, name):
    answer = http.post("/upload", **parts(vm.session_id, path="d/", file=(name or "upload", b"1")))
    assert answer.json()["remote_path"] in ("/app/d/upload", "/app/d/x")


NAMES = ["Übersicht.txt", "数据.csv", "😀", 'say "hi"', "a\\b", "\\", "100%22", "%0A%", "two\nlines\r", "a;b='c'", "-", " ", "‮x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_goes_into_a_folder_under_its_own_name_whatever_that_is(vm, tmp_path, name):
    local = tmp_path / name
    local.write_bytes(b"1")
    assert vm.upload_file(local, "in/").remote_path == f"/app/in/{name}"
    back = tmp_path / "back"
    back.mkdir()
    assert vm.download_file(f"in/{name}", back).local_path == str(back / name)
    assert vm.upload_file(local, f"to/{name}x").remote_path == f"/app/to/{name}x"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
@given(name=st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=60))
def test_any_name_that_a_file_can_have_arrives(module_vm, name):
    assume(name not in (".", "..") and not (name + ".part").startswith("."))
    call, around = files.upload(module_vm.session_id, PurePath("/home", name), "in/")
    with source(Path("/proc/version")) as file:
        assert module_vm._link.upload(call, around, file).remote_path == f"/app/in/{name}"


def test_a_local_name_that_is_no_unicode_needs_a_remote_one(vm, tmp_path):
    local = tmp_path / os.fsdecode(b"caf\xe9")
    local.write_bytes(b"1")
    with pytest.raises(InvalidInput, match="file_path"):
        vm.upload_file(local, "in/")
    assert vm.upload_file(local, "in/coffee").remote_path == "/app/in/coffee"


FILENAMES = {"Übersicht".encode(): "Übersicht", "naïve".encode("latin-1"): "naïve", b"say %22hi%22%0A": 'say "hi"\n'}


@pytest.mark.parametrize("sent", FILENAMES)
def test_names_are_read_as_browsers_and_older_clients_send_them(vm, http, sent):
    form = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % part
        for part in ((b"remote_path", b"in/"), (b"session_id", vm.session_id.encode()))
    )
    form += b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n1\r\n--b--\r\n' % sent
    answer = http.post("/upload", content=form, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.json()["remote_path"] == f"/app/in/{FILENAMES[sent]}"


def test_text_that_is_not_utf_8_is_refused_and_not_changed(vm, http):
    form = b'--b\r\nContent-Disposition: form-data; name="remote_path"\r\n\r\ncaf\xe9\r\n--b\r\n'
    form += b'Content-Disposition: form-data; name="file"; filename="f"\r\n\r\n1\r\n--b--\r\n'
    answer = http.post("/upload", content=form, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert (answer.status_code, answer.json()["field"]) == (422, "remote_path")
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    for body in (b"filename=caf%E9", b"filename=caf\xe9"):
        assert http.post("/download", content=body, headers=kind).status_code == 400


@pytest.mark.parametrize("path", ["~", "~/x"])
def test_a_home_folder_is_not_guessed(vm, http, tmp_path, path):
    (tmp_path / "x").touch()
    with pytest.raises(InvalidInput, match="write the home folder out"):
        vm.upload_file(tmp_path / "x", path)
    assert http.post("/upload", **parts(vm.session_id, path=path)).status_code == 422
    with pytest.raises(InvalidInput, match="filename"):
        vm.download_file(path)


def test_paths_may_be_path_objects(vm, tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    assert vm.upload_file(str(tmp_path / "x"), PurePosixPath("/app/p")).remote_path == "/app/p"
    assert vm.upload_file(tmp_path / "x", PureWindowsPath("d\\p")).remote_path == "/app/d/p"
    assert vm.download_file(PurePosixPath("p")).content == b"1"
    with pytest.raises(InvalidInput, match="remote_path"):
        vm.upload_file(tmp_path / "x", b"/app/x")


def test_files_that_change_or_have_no_size_are_uploaded_as_far_as_they_go(vm, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"z" * 300_000,))
    writer.start()
    assert vm.upload_file(pipe, "pipe").size == 300_000
    writer.join()
    assert vm.upload_file("/proc/self/status", "status").size > 100


def test_a_file_that_becomes_shorter_stores_nothing(vm, tmp_path, monkeypatch):
    local, first = tmp_path / "log", Source.read
    local.write_bytes(b"x" * 3_000_000)

    def shrinks(self):
        local.write_bytes(b"x" * 10)
        return first(self)

    monkeypatch.setattr(Source, "read", shrinks)
    with pytest.raises(FileError, match="shorter while it was uploaded"):
        vm.upload_file(local, "log")
    assert vm.execute("import os; print(os.listdir('.'))").stdout == "[]\n"


def test_local_files_that_cannot_be_opened_are_told_as_python_tells_them(vm, tmp_path):
    with pytest.raises(FileNotFoundError):
        vm.upload_file(tmp_path / "nope", "x")
    with pytest.raises(IsADirectoryError):
        vm.upload_file(tmp_path, "x")


def test_forms_that_cannot_be_read(vm, http):
    assert http.post("/upload", json={}).status_code == 400
    assert (
        http.post("/upload", content=b"x", headers={"Content-Type": "multipart/form-data; boundary=b"}).status_code
        == 400
    )
    assert http.post("/upload", data={"remote_path": "x"}, files={"other": b"1"}).status_code == 400
    assert http.post("/upload", files={"file": b"1"}).status_code == 422
    long = {"data": {"remote_path": "x" * 100_000, "session_id": vm.session_id}, "files": {"file": b"1"}}
    assert http.post("/upload", **long).status_code == 413
    cut = b'--b\r\nContent-Disposition: form-data; name="remote_path"\r\n\r\nx\r\n--b\r\n'
    cut += f'Content-Disposition: form-data; name="session_id"\r\n\r\n{vm.session_id}\r\n--b\r\n'.encode()
    cut += b'Content-Disposition: form-data; name="file"; filename="f"\r\n\r\nhalf'
    answer = http.post("/upload", content=cut, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 400
    assert vm.execute("import os; print(os.listdir('.'))").stdout == "[]\n"


def test_an_upload_needs_a_key_which_may_be_a_part(server, vm):
    ask = parts(vm.session_id)
    assert httpx.post(f"{server.url}/upload", **ask).status_code == 401
    ask["data"]["api_key"] = server.key
    assert httpx.post(f"{server.url}/upload", **ask).status_code == 200
    ask["data"]["api_key"] = server.other_key
    assert httpx.post(f"{server.url}/upload", **ask).status_code == 404
    wrong = httpx.post(f"{server.url}/upload", headers={"X-API-Key": server.key}, **ask)
    assert wrong.status_code == 401
