"""The embedded server: started by the first who needs it, shared, and gone when nobody does."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest

from instavm import HostNotReady, InstaVM
from instavm.client import embedded
from instavm.client.embedded import Embedded
from instavm.settings import Settings

SERVER = (sys.executable, str(Path(__file__).with_name("embedded_server.py")), "--embedded")
PROGRAM = f"""
import sys
from instavm.client import embedded
embedded.COMMAND = {SERVER!r}
from instavm import InstaVM
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A user of our own: other folders, and no server yet."""
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"INSTAVM_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("INSTAVM_IDLE_EXIT_S", "60")
    monkeypatch.delenv("INSTAVM_BASE_URL", raising=False)
    monkeypatch.setattr(embedded, "COMMAND", SERVER)
    yield tmp_path
    if (pid := server_pid(tmp_path)) is not None:
        end(pid, signal.SIGTERM)


def server_pid(place):
    """Who holds the server lock now."""
    file = place / "state" / "server.lock"
    if not file.exists():
        return None
    pid = int(file.read_text() or 0)
    alive = Path(f"/proc/{pid}/cmdline")
    return pid if alive.exists() and b"embedded_server" in alive.read_bytes() else None


def end(pid, number):
    """Send a signal and wait until the process is gone, and the one that it started for the API."""
    server = psutil.Process(pid)
    both = [os.pidfd_open(one.pid) for one in (*server.children(recursive=True), server) if is_ours(one)]
    signal.pidfd_send_signal(both[-1], number)
    for process in both:
        wait_gone(process)


def is_ours(process):
    return any("serve" in word for word in process.cmdline())


def wait_gone(process):
    import select

    assert select.select([process], [], [], 60)[0], "the server did not end"
    os.close(process)


def program(code):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def test_the_first_client_starts_a_server_and_it_is_private(place):
    with InstaVM("any") as vm:
        assert vm.execute("print(6 * 7)").stdout == "42\n"
        assert vm.get_current_user().id == "local"
    settings = Settings()
    assert settings.runtime_dir.stat().st_mode & 0o777 == 0o700
    for file in (settings.socket, settings.server_log, settings.database, settings.server_lock):
        assert file.stat().st_mode & 0o777 == 0o600


def test_two_programs_share_one_server(place):
    """Both begin at the same moment, with no server there."""
    code = """
    with InstaVM("any") as vm:
        print(vm.execute("import os; print(os.getppid())").stdout, end="", flush=True)
        sys.stdin.readline()
    """
    both = [program(code) for _ in range(2)]
    pids = {int(one.stdout.readline()) for one in both}
    assert pids == {server_pid(place)}
    for one in both:
        assert one.communicate("\n") is not None
        assert one.returncode == 0


def test_many_threads_start_one_server(place):
    pids = []

    def run():
        with InstaVM("any") as vm:
            pids.append(int(vm.execute("import os; print(os.getppid())").stdout))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(pids) == {server_pid(place)}
    assert len(pids) == 4


def test_ctrl_c_in_a_program_does_not_reach_the_server(place):
    """The whole process group gets the signal, as from a terminal."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, time\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests that run in a shell's background ignore it
            + PROGRAM
            + "vm = InstaVM('any')\nprint(vm.execute('1').vm_id, flush=True)\n"
            "while True: time.sleep(0.05)",  # one long wait would miss a signal that comes just ahead of it
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    child.stdout.readline()
    pid = server_pid(place)
    os.killpg(child.pid, signal.SIGINT)
    child.wait()
    child.stdout.close()
    assert os.getsid(pid) != os.getsid(0)
    assert server_pid(place) == pid
    with InstaVM("any") as vm:
        assert vm.execute("print(1)").stdout == "1\n"


def test_a_server_that_was_killed_is_replaced(place):
    """Its socket is still there, and nobody listens."""
    InstaVM("any").close()
    old = server_pid(place)
    end(old, signal.SIGKILL)
    assert Settings().socket.exists()
    with InstaVM("any") as vm:
        assert vm.execute("print(1)").stdout == "1\n"
    assert server_pid(place) != old


def test_a_client_goes_on_with_the_next_server(place):
    """Its sandbox is lost with the server, its session is not."""
    with InstaVM("any") as vm:
        vm.execute("1")
        end(server_pid(place), signal.SIGKILL)
        assert vm.execute("print(1)").stdout == "1\n"


def test_the_server_ends_when_nobody_needs_it(place, monkeypatch):
    monkeypatch.setenv("INSTAVM_IDLE_EXIT_S", "0.3")
    with InstaVM("any") as vm:
        vm.execute("1")
        process = os.pidfd_open(server_pid(place))
        vm.execute("import time; time.sleep(0.8)")
    wait_gone(process)
    assert not Settings().socket.exists()
    with InstaVM("any") as vm:
        assert vm.execute("print(1)").stdout == "1\n"


def test_a_live_sandbox_keeps_the_server(place, monkeypatch):
    """No connection is open, but somebody's sandbox is: it ends only after that is killed."""
    monkeypatch.setenv("INSTAVM_IDLE_EXIT_S", "0.2")
    vm = InstaVM("any")
    vm.execute("1")
    pid = server_pid(place)
    vm.close()
    process = os.pidfd_open(pid)
    import select

    assert not select.select([process], [], [], 1)[0]
    vm.kill()
    vm.close()
    wait_gone(process)


def test_sigterm_ends_the_sandboxes(place):
    vm = InstaVM("any")
    python = int(vm.execute("import os; print(os.getpid())").stdout)
    end(server_pid(place), signal.SIGTERM)
    assert not Path(f"/proc/{python}").exists()
    vm.close()


def test_why_it_could_not_start_reaches_the_user(place, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from contextlib import asynccontextmanager
        from instavm.errors import HostNotReady
        from instavm.serve import run_embedded

        @asynccontextmanager
        async def nothing(settings, closed_ports):
            raise HostNotReady("this host has no QEMU: apt-get install it")
            yield

        sys.exit(run_embedded(sys.argv[1:], open_node=nothing))
        """)
    )
    server = Embedded(Settings(), (sys.executable, str(script), "--embedded"))
    with pytest.raises(HostNotReady, match="has no QEMU"):
        server.ensure()


def test_a_server_that_cannot_even_be_loaded_leaves_its_last_words(place):
    server = Embedded(Settings(), (sys.executable, "-c", "import no_such_module"))
    with pytest.raises(HostNotReady, match="no_such_module"):
        server.ensure()


def test_an_idle_server_of_another_version_is_replaced_and_a_busy_one_is_not(place, monkeypatch):
    vm = InstaVM("any")
    old = server_pid(place)
    monkeypatch.setattr(embedded, "__version__", "9.9.9")
    with pytest.raises(HostNotReady, match=r"1 sandboxes, and this is version 9\.9\.9"):
        Embedded(Settings()).ensure(again=True)
    assert server_pid(place) == old
    vm.kill()
    vm.close()
    Embedded(Settings()).ensure(again=True)
    assert server_pid(place) not in (old, None)


def test_missing_libraries_are_named_with_the_way_to_get_them(place, monkeypatch):
    monkeypatch.setattr(embedded, "NEEDS", ("no_such_library",))
    with pytest.raises(HostNotReady, match=r"pip install 'instavm-selfhosted\[server\]'"):
        InstaVM("any")


def test_a_folder_that_others_can_enter_is_refused(place):
    folder = Settings().runtime_dir
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(HostNotReady, match="mode 0700"):
        InstaVM("any")


def test_a_second_server_on_the_same_state_is_refused(place, monkeypatch, tmp_path):
    InstaVM("any").close()
    pid = server_pid(place)
    monkeypatch.setenv("INSTAVM_RUNTIME_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(HostNotReady, match=f"pid {pid}"):
        InstaVM("any")


def test_a_client_that_comes_while_a_server_ends_waits_for_the_next_one(place):
    with InstaVM("any") as vm:
        vm.execute("1")
        os.kill(server_pid(place), signal.SIGTERM)
        with InstaVM("any") as another:
            assert another.execute("print(1)").stdout == "1\n"


def test_an_empty_key_is_no_key_even_here(place):
    Embedded(Settings()).ensure()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(Settings().socket))
        raw.sendall(b"GET /v1/users/me HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 401")
