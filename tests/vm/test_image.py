"""The default image: what the mission promises is there and works."""

import re

import pytest

pytestmark = pytest.mark.anyio


async def test_languages_and_tools_answer(start):
    sandbox = await start()
    result = await sandbox.bash(
        "python --version; python3 --version; node --version; npm --version; pip --version\n"
        "which curl wget git gcc g++ make ffmpeg convert sudo tmux realpath base64 tar find timeout nohup",
        timeout_s=280,  # npm and pip take their time under emulation
    )
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    for line in lines[:2]:
        major, minor = map(int, re.match(r"Python (\d+)\.(\d+)", line).groups())
        assert (major, minor) >= (3, 11)
    assert int(re.match(r"v(\d+)", lines[2]).group(1)) >= 18
    assert re.match(r"\d+\.\d+", lines[3]) and lines[4].startswith("pip ")


async def test_the_file_system_is_writable_and_speaks_utf8(sandbox):
    result = await sandbox.bash(
        "echo 'ä€' > /app/f && cat /app/f && touch /etc/x /usr/x /root/x && id -u && df -k / | tail -1"
    )
    assert result.stdout.splitlines()[:2] == ["ä€", "0"], result.stderr
    assert int(result.stdout.split()[-3]) > 5 << 20, "at least 5 GiB are free"


async def test_a_c_program_compiles_and_runs(sandbox):
    result = await sandbox.bash(
        "printf '#include <stdio.h>\\nint main(){puts(\"compiled\");}' > a.c && gcc a.c -o a && ./a", timeout_s=120
    )
    assert result.stdout == "compiled\n", result.stderr


async def test_the_users_world_is_the_users_alone(sandbox):
    """Its own pid 1, a small /dev, no sight of the agent, and no block device of the host's making in reach."""
    result = await sandbox.bash("ps -eo comm= | sort -u | tr '\\n' ' '; ls /dev; cat /proc/1/comm")
    assert "instavm" not in result.stdout
    assert not re.search(r"\bvd[a-z]\b|vport", result.stdout)


async def test_root_can_not_end_the_agent(sandbox):
    """Killing everything that can be seen leaves the sandbox usable, and the next answer says what was lost."""
    await sandbox.python("kept = 1")
    await sandbox.bash("kill -9 -1")
    done = await sandbox.python("print('still here'); kept")
    assert done.stdout == "still here\n"
    assert "NameError: name 'kept'" in done.stderr
    assert "the interpreter ended; its variables are gone" in done.stderr


async def test_programs_from_another_place_than_app_and_signals_are_as_usual(sandbox):
    """SIGPIPE ends a writer quietly, as in any shell."""
    result = await sandbox.bash("yes | head -1; echo ${PIPESTATUS[0]}")
    assert result.stdout == "y\n141\n"


async def test_a_message_queue_is_a_file_in_dev_mqueue(sandbox):
    made = await sandbox.python("import ctypes; ctypes.CDLL(None).mq_open(b'/q', 0o102, 0o600, None) >= 0")
    assert made.stderr == ""
    result = await sandbox.bash("ls /dev/mqueue; rm /dev/mqueue/q")
    assert (result.stdout, result.exit_code) == ("q\n", 0), result.stderr


async def test_a_user_without_rights_may_open_many_files(sandbox):
    result = await sandbox.bash("ulimit -Sn; su appuser -c 'ulimit -n 524288 && ulimit -n'")
    assert result.stdout == "1024\n524288\n", result.stderr


async def test_etc_mtab_tells_what_is_mounted(sandbox):
    """Programs older than /proc/self/mounts read it."""
    result = await sandbox.bash("cmp /etc/mtab /proc/mounts && grep -c ' / ext4 ' /etc/mtab")
    assert result.stdout == "1\n", result.stderr


async def test_everybody_may_lock_in_var_lock(sandbox):
    result = await sandbox.bash("su appuser -c 'flock /var/lock/mine echo locked'")
    assert result.stdout == "locked\n", result.stderr
