"""What a newcomer types: the mission's programs, the command line, the README's own snippets. Nothing is set up before."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from instavm.node import inventory

ROOT = Path(__file__).parents[2]
PATIENCE = float(os.environ.get("INSTAVM_TEST_PATIENCE", "1"))
"""How many times as long programs may take as on a host of today: more where even the host is emulated."""


@pytest.fixture(scope="module")
def user(settings, short_folder):
    """The environment of a user without a server; the one that the SDK starts is ended with the module."""
    state = short_folder / "user"
    chosen = {"STATE_DIR": state, "RUNTIME_DIR": short_folder / "user-run", "CACHE_DIR": settings.cache_dir}
    env = {**os.environ, **{f"INSTAVM_{name}": str(value) for name, value in chosen.items()}}
    env.pop("INSTAVM_BASE_URL", None)
    yield env
    if not (state / "server.lock").exists():
        return  # only some of these tests were run
    server = psutil.Process(int((state / "server.lock").read_text()))
    server.send_signal(signal.SIGTERM)
    server.wait(60 * PATIENCE)
    assert inventory.take(state) == inventory.Inventory(frozenset(), frozenset())


def run(user, *command, **more):
    return subprocess.run(command, env=user, cwd=ROOT, capture_output=True, text=True, timeout=280 * PATIENCE, **more)


def instavm(user, *arguments, **more):
    return run(user, Path(sys.executable).with_name("instavm"), *arguments, **more)


def test_the_three_programs_print_what_the_mission_says(user):
    done = run(user, sys.executable, "examples/mission.py")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "4 vCPUs, 4096 MB: 4"
    assert lines[2] == "environment: postgres://..."
    assert lines[4] == "state: 42"
    on = "(qemu, emulated|qemu, kvm|firecracker, kvm) tier"
    assert all(re.match(rf"  asked for → result: \d+ ms on {on}", line) for line in lines[1::2])


def test_the_snippets_of_the_readme_run(user):
    text = (ROOT / "README.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    assert run(user, sys.executable, "-c", first).stdout == "42\n 0\n"
    body = second.replace("async with", "async def main():\n  async with", 1).replace(
        "\n    print(await", "\n      print(await"
    )
    done = run(user, sys.executable, "-c", body + "\nimport anyio; anyio.run(main)")
    assert done.stdout.startswith("4\n"), done.stderr
    assert "postgres://…" in done.stdout and done.stdout.rstrip().endswith("42")


def test_exec_passes_output_and_exit_code_on(user):
    assert instavm(user, "exec", "print(6*7)").stdout == "42\n"
    failed = instavm(user, "exec", "--language", "bash", "echo out; echo err >&2; exit 7")
    assert (failed.stdout, failed.stderr, failed.returncode) == ("out\n", "err\n", 7)
    assert instavm(user, "exec", "-", input="print('from stdin')").stdout == "from stdin\n"


def test_doctor_finds_this_host_ready(user):
    done = instavm(user, "doctor")
    assert done.returncode == 0, done.stdout
    assert "qemu" in done.stdout and "default image" in done.stdout


def test_doctor_says_what_is_missing_and_how_to_get_it(user, tmp_path):
    done = instavm({**user, "PATH": str(tmp_path), "INSTAVM_CACHE_DIR": str(tmp_path)}, "doctor")
    assert done.returncode == 1
    for remedy in ("apt-get install qemu-system-x86", "apt-get install qemu-utils", "./scripts/start"):
        assert remedy in done.stdout
