"""CPython's own tests and stress-ng's self-checks: what fails in a sandbox that passes on the host?

    python bench/guest_suites.py [--modules test_os,test_io] [--stressors cpu,vm] [--minutes 60] [--json FILE]

Both sides run the same builds, as root: Debian's Python with its test suite, and stress-ng, fetched by apt-get and unpacked
into a XX its verdict inside is another one than on the host: that it fails, or that it is skipped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple
from xml.etree import ElementTree

from instavm import InstaVM
from instavm.bench import report
from instavm.bench.host import KEY, server

PYTHON = "python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libpython3.11-testsuite"
STRESS = "stress-ng libapparmor1 libegl1 libgles2 libglvnd0 libipsec-mb1 libjudydebian1 libkmod2 libsctp1"
MODULES = (
    "test_subprocess test_io test_signal test_socket test_threading test_os test_posix test_mmap test_select test_poll"
    " test_epoll test_selectors test_fcntl test_time test_tempfile test_shutil test_resource test_pty test_openpty"
    " test_ioctl test_wait4 test_fork1 test_popen test_eintr test_threadsignals test_fileio test_file test_stat test_pwd"
    " test_grp test_locale test_posixpath test_float test_math test_struct test_zlib test_json test_re test_hashlib"
    " test_random test_pathlib test_ctypes test_uuid test_platform test_syslog"
)
LONG = 6
"""The modules that take longest begin first, then come the stressors."""
STRESSORS = (
    "cpu matrix str fp vecmath crypt hash vm mmap mremap madvise memcpy malloc stack brk shm shm-sysv"
    " fork vfork clone kill wait pipe fifo poll epoll eventfd sem sem-sysv futex mutex switch mq msg"
    " timer timerfd itimer nanosleep signal sigpipe sigq hdd io iomix dir link rename flock fallocate seek"
    " sock udp sockpair unshare dev-shm pty procfs get getrandom"
)
INSIDE = "/opt/suites"
LANES = 2
MEMORY_MB = 1024
LIFETIME_S = 3600
MODULE_S = 540
"""For all tests of a module. An emulated CPU takes some 17 times as long as the host's."""
IGNORED = "--ignore '*VSOCK*'"
"""Tests of sockets between a machine and its host: they hang on a host that is a virtual machine itself."""
STRESSOR_S = 2
SMALL = {"vm": "--vm-bytes 64M", "hdd": "--hdd-bytes 16M", "iomix": "--iomix-bytes 16M", "mmap": "--mmap-bytes 32M"}
STRESS_EXITS = {0: "passed", 2: "failed", 3: "no resource", 4: "not implemented", 124: "timeout"}

Told = dict[str, tuple[dict[str, str], float]]
"""Of each module or stressor: the verdict of every test, with what was said when it did not pass; and seconds."""
Work = list[tuple[str, Callable[["Place", str], dict[str, str]]]]
Waiting = SimpleQueue[tuple[str, Callable[["Place", str], dict[str, str]]]]


class Place(NamedTuple):
    """Where suites run: the folder that they are unpacked in, and what runs a shell command there."""

    folder: str
    run: Callable[[str, float], tuple[int, str]]
    read: Callable[[str], bytes]


@contextmanager
def packages() -> Iterator[Path]:
    """A folder with the .deb files, gone with the block."""
    with tempfile.TemporaryDirectory(prefix="ivm-suites-") as folder:
        Path(folder).chmod(0o755)  # some tests run programs as another user
        fetch = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *PYTHON.split(), *STRESS.split()]
        subprocess.run(fetch, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        yield Path(folder)


def unpacked(place: Place) -> Place:
    code, said = place.run(f"for deb in {place.folder}/*.deb; do dpkg -x $deb {place.folder} || exit; done", 120)
    if code:
        raise RuntimeError(f"the packages could not be unpacked: {said}")
    return place


def here(folder: Path) -> Place:
    def run(command: str, limit_s: float) -> tuple[int, str]:
        bounded = ["timeout", "--kill-after=5", str(limit_s), "bash", "-c", command]
        done = subprocess.run(
            bounded,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
        return done.returncode, done.stdout.decode(errors="replace")

    return unpacked(Place(str(folder), run, lambda path: Path(path).read_bytes()))


def sandbox(vm: InstaVM, debs: Path) -> Place:
    def run(command: str, limit_s: float) -> tuple[int, str]:
        done = vm.execute(command, language="bash", timeout=limit_s)
        return 124 if done.timed_out else done.exit_code or 0, done.stdout + done.stderr

    for deb in debs.glob("*.deb"):
        vm.upload_file(deb, f"{INSIDE}/{deb.name}")
    return unpacked(Place(INSIDE, run, lambda path: vm.download_file(path)["content"]))


def verdicts(report_xml: bytes) -> dict[str, str]:
    told = {}
    for case in ElementTree.fromstring(report_xml).iter("testcase"):
        name = case.get("name", "").removeprefix("test.")
        bad = [node for node in case if node.tag in ("failure", "error")]
        if bad:
            told[name] = "failed: " + (bad[0].text or bad[0].get("message") or "").strip()[-600:]
        elif case.find("skipped") is not None:
            told[name] = "skipped: " + (case.findtext("skipped") or "").strip()
        elif told.get(name, "passed") == "passed":
            told[name] = "passed"
    return told


def module(place: Place, name: str) -> dict[str, str]:
    """Runs a module of CPython's tests."""
    xml = f"{place.folder}/{name}.xml"
    command = f"cd {place.folder} && usr/bin/python3.11 -m test --timeout 1200 {IGNORED} --junit-xml {xml} {name}"
    code, said = place.run(command, MODULE_S)
    try:
        told = verdicts(place.read(xml))
    except (OSError, LookupError, ElementTree.ParseError):
        told = {}
    ended = "skipped" if code == 0 else f"ended with {code}"  # without a terminal, some modules have no test to run
    return told or {name: f"{ended}: {said.strip()[-600:]}"}


def stressor(place: Place, name: str) -> dict[str, str]:
    """Runs two workers of a stressor that check their own results."""
    libraries = f"{place.folder}/usr/lib/x86_64-linux-gnu"
    command = (
        f"cd {place.folder} && LD_LIBRARY_PATH={libraries} usr/bin/stress-ng --{name} 2 --timeout {STRESSOR_S}s"
        f" --verify --temp-path /tmp {SMALL.get(name, '')}"
    )
    code, said = place.run(command, 60)
    verdict = "skipped" if "skipping the stressor" in said else STRESS_EXITS.get(code, f"exit code {code}")
    return {name: verdict if verdict == "passed" else f"{verdict}: {said.strip()[-600:]}"}


def all_done(place: Place, waiting: Waiting, until: float) -> Told:
    """Takes from `waiting` until nothing is left, or the moment `until` (of time.monotonic) has come."""
    done: Told = {}
    while time.monotonic() < until:
        try:
            name, way = waiting.get_nowait()
        except Empty:
            break
        began = time.perf_counter()
        told = way(place, name)
        done[name] = told, round(time.perf_counter() - began, 1)
        counts = Counter(verdict.split(":")[0] for verdict in told.values())
        print(f"{place.folder} {name}: {dict(counts)}, {done[name][1]} s", file=sys.stderr, flush=True)
    return done


def queue(work: Work) -> Waiting:
    waiting: Waiting = SimpleQueue()
    for one in work:
        waiting.put(one)
    return waiting


def on_both_sides(debs: Path, work: Work, until: float) -> tuple[Told, Told]:
    """What the host found, and what the sandboxes found."""
    waiting = queue(work)

    def lane(_: int) -> Told:
        with InstaVM(KEY, timeout=LIFETIME_S, memory_mb=MEMORY_MB) as vm:
            return all_done(sandbox(vm, debs), waiting, until)

    with ThreadPoolExecutor(LANES + 1) as threads:
        inside = [threads.submit(lane, number) for number in range(LANES)]
        host = all_done(here(debs), queue(work), until)
        return host, {name: told for one in inside for name, told in one.result().items()}


def compared(host: Told, inside: Told) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name in [name for name in host if name in inside]:
        (expected, host_s), (found, inside_s) = host[name], inside[name]
        kinds = {test: (verdict.split(":")[0], expected.get(test, "absent")) for test, verdict in found.items()}
        other = {
            test: {"inside": found[test], "host": on_host[:300]}
            for test, (kind, on_host) in kinds.items()
            if kind != on_host.split(":")[0]
        }
        missing = sorted(expected.keys() - found.keys())
        told[name] = {
            "host": Counter(verdict.split(":")[0] for verdict in expected.values()),
            "inside": Counter(kind for kind, _ in kinds.values()),
            "host_s": host_s,
            "inside_s": inside_s,
            "other": other,
            "missing": len(missing),
        }
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", default=",".join(MODULES.split()), help="names, with commas; or nothing")
    parser.add_argument("--stressors", default=",".join(STRESSORS.split()), help="names, with commas; or nothing")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "guest_suites.json")
    asked = parser.parse_args()
    machine = report.machine()
    modules: Work = [(name, module) for name in asked.modules.split(",") if name]
    work = modules[:LONG] + [(name, stressor) for name in asked.stressors.split(",") if name] + modules[LONG:]
    with packages() as debs:
        began = time.perf_counter()
        with server():
            host, inside = on_both_sides(debs, work, time.monotonic() + 60 * asked.minutes)
        told: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 1), "suites": compared(host, inside)}
        told["not_run"] = [name for name, _ in work if name not in told["suites"]]
    asked.json.write_text(json.dumps({"machine": machine, "results": told}, indent=2) + "\n")
    failed = 0
    for name, one in told["suites"].items():
        other: dict[str, dict[str, str]] = one["other"]
        for test, both in other.items():
            if both["host"] == "passed":
                print(f"{name} {test}: {both['inside']}")
                failed += not both["inside"].startswith("skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
