"""Values of variables, keys and file contents are written nowhere: canaries are planted, and everything is searched."""

import contextlib
import os
import secrets
import signal
import stat
from pathlib import Path

import psutil
import pytest

from instavm import InstaVM, InstaVMError


@pytest.fixture
def own_server(short_folder, settings, monkeypatch):
    """An embedded server of its own; its folders stay to be looked at after it ended."""
    home = short_folder / "secrets"
    chosen = {"STATE_DIR": home / "state", "RUNTIME_DIR": home / "run", "CACHE_DIR": settings.cache_dir}
    for name, value in chosen.items():
        monkeypatch.setenv(f"INSTAVM_{name}", str(value))
    monkeypatch.delenv("INSTAVM_BASE_URL", raising=False)
    yield home
    stop(home)


def stop(home):
    with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
        server = psutil.Process(int((home / "state" / "server.lock").read_text()))
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def written(home):
    """Every regular file below, but a sandbox's disk, which holds what is in the sandbox."""
    for path in home.rglob("*"):
        if path.name != "disk.qcow2" and stat.S_ISREG(path.lstat().st_mode):
            yield path


def found_in_files(home, canaries):
    return [
        (name, path)
        for path in written(home)
        for name, value in canaries.items()
        if value.encode() in path.read_bytes()
    ]


def found_in_processes(canaries):
    """In the arguments of every process of this host, and in the environment of those that run a sandbox."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            said = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            if b"qemu-system" in said:
                said += Path(f"/proc/{process.pid}/environ").read_bytes()
            yield from ((name, process.pid) for name, value in canaries.items() if value.encode() in said)


def test_no_secret_is_written_anywhere(own_server, tmp_path, capfd):
    names = ("api_key", "env", "staged", "bad_env", "code", "file", "output", "error", "task")
    canaries = {name: f"canary-{name}-{secrets.token_hex(8)}" for name in names}
    local = tmp_path / "upload.txt"
    local.write_text(canaries["file"])
    with InstaVM(canaries["api_key"], env={"TOKEN": canaries["env"]}) as vm:
        assert vm.execute("import os; print(os.environ['TOKEN'])").stdout.strip() == canaries["env"]
        vm.execute(f"secret = '{canaries['code']}'")
        vm.execute(f"raise ValueError('{canaries['error']}')")
        vm.execute(f"echo {canaries['output']}", language="bash")
        vm.upload_file(local, "/app/upload.txt")
        assert vm.download_file("/app/upload.txt")["content"] == canaries["file"].encode()
        vm.get_task_result(
            vm.execute_async(f"x = '{canaries['task']}'; print('{canaries['output']}')")["task_id"], poll_interval=0.2
        )
        for _ in vm.stream(f"print('{canaries['output']}')"):
            pass
        with pytest.raises(InstaVMError) as refused:
            InstaVM(canaries["api_key"], env={"NOT A NAME": canaries["bad_env"]})
        assert canaries["bad_env"] not in str(refused.value)
        with contextlib.suppress(InstaVMError):
            vm.download_file("/app/none-of-it")
        kept = {"output"}  # what a task printed is kept in the database for its owner: it is asked for later
        asked = {name: value for name, value in canaries.items() if name not in kept}
        assert found_in_files(own_server, asked) == []
        assert list(found_in_processes(canaries)) == []
        open_to_others = [
            path for path in own_server.rglob("*") if path.lstat().st_mode & 0o007 and not path.is_symlink()
        ]
        assert [path for path in open_to_others if reachable(path, own_server)] == []
    stop(own_server)
    assert found_in_files(own_server, asked) == []
    assert not any(value in "".join(capfd.readouterr()) for value in canaries.values())


def reachable(path, home):
    """Whether somebody else gets that far: a folder that is closed to them hides what is in it."""
    return all(above.stat().st_mode & 0o001 for above in path.parents if home in above.parents)


def test_the_state_directory_is_its_owners_alone(own_server):
    with InstaVM("key") as vm:
        vm.execute("print(1)")
        for folder in (own_server / "state", own_server / "run", own_server / "state" / "machines"):
            about = folder.stat()
            assert (stat.S_IMODE(about.st_mode), about.st_uid) == (0o700, os.getuid()), folder


def test_the_search_finds_what_is_there(tmp_path):
    """So that the first test can fail."""
    (tmp_path / "log").write_text("something canary-x something")
    assert found_in_files(tmp_path, {"x": "canary-x"}) == [("x", tmp_path / "log")]
