"""Files over HTTP: streamed, byte-exact, and refused in words that arrive."""

import base64
import os
import tracemalloc

import httpx
import pytest

from instavm import DiskFull, FileError, FileMissing, InvalidInput


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
