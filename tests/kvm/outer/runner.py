"""Runs in the outer machine: says that it is ready (the machine is saved then), and carries out one job.

The job is a line of JSON: `time`, `argv`, `env`. Back go lines of JSON: `out` while it runs, `status` and `files` at its end.
"""

import base64
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

WARM = (
    *(
        "pytest",
        "pytest_timeout",
        "anyio",
        "anyio.pytest_plugin",
        "anyio._backends._asyncio",
        "_pytest.assertion.rewrite",
    ),
    *(
        "httpx",
        "pydantic",
        "pydantic_settings",
        "platformdirs",
        "psutil",
        "msgpack",
        "qemu.qmp",
        "pyroute2",
        "dns.resolver",
    ),
    *(
        "cryptography.hazmat.primitives.serialization",
        "cryptography.x509",
        "h11",
        "httptools",
        "logging.config",
        "uvicorn",
    ),
)


def port():
    while True:
        for place in Path("/sys/class/virtio-ports").glob("*"):
            if (place / "name").read_text().strip() == "rig":
                return open(f"/dev/{place.name}", "r+b", buffering=0)
        time.sleep(0.1)


def say(line, **words):
    line.write(json.dumps(words).encode() + b"\n")


def hear(line):
    data = b""
    while not data.endswith(b"\n"):
        data += line.read(1) or b""
    return json.loads(data)


def run(command, **more):
    subprocess.run(command, check=True, **more)


def carry_out(line, job):
    time.clock_settime(time.CLOCK_REALTIME, job["time"])
    run(["mount", "-t", "squashfs", "-o", "ro", "/dev/vdc", "/job"])
    run(["mount", "-o", "noatime", "/dev/vdd", "/scratch"])
    for name, there in {"kernels": "/job/cache/kernels", "guests": "/job/cache/guests", "images": "/images"}.items():
        Path("/scratch/cache").mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):  # a disk that another job has left
            Path(f"/scratch/cache/{name}").symlink_to(there)
    environment = {
        "PATH": "/rig/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": "/scratch",
        "INSTAVM_CACHE_DIR": "/scratch/cache",
        "INSTAVM_FIRECRACKER": "/rig/bin/firecracker",
        **job["env"],
    }
    # a fork of this process, which has imported already what is the same in every job
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir("/job")
        sys.path[:0] = ["/job/src"]
        sys.dont_write_bytecode = True
        sys.argv = job["argv"]
        status = 70
        try:
            if job["argv"][0] == "pytest":
                import pytest

                status = int(pytest.main(job["argv"][1:]))
            else:
                os.execvp(job["argv"][0], job["argv"])
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as output:
        while data := output.read(4096):
            say(line, out=data.decode(errors="replace"))
    _, status = os.waitpid(child, 0)
    files = {}
    for place in job["files"]:
        with contextlib.suppress(OSError):
            files[place] = base64.b64encode(Path(place).read_bytes()).decode()
    os.sync()
    say(line, status=os.waitstatus_to_exitcode(status), files=files)


def main():
    for name in WARM:
        try:
            importlib.import_module(name)
        except ImportError as exc:
            print(f"rig: {exc}", flush=True)
    line = port()
    say(line, ready=True)
    try:
        carry_out(line, hear(line))
    except Exception as exc:
        say(line, status=71, files={}, out=f"the rig: {type(exc).__name__}: {exc}\n")
    time.sleep(0.5)
    Path("/proc/sysrq-trigger").write_text("o")
    time.sleep(60)


main()
