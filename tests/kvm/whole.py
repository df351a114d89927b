"""Everything that the rig can show, and the tables of docs/kvm.md made of it.

The same tests on each row: natively where the row needs no hardware virtualisation, else in a rig, each in one of its own. And
with `--bench`, in place of the tests, its VMMs measured beside each other.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from rig import ROOT, Rig, RigFailed

from instavm.bench import report

PAGE = ROOT / "docs" / "kvm.md"
BEGIN, END = "<!-- results: made by ./scripts/kvm --write -->\n", "<!-- end of results -->\n"
BENCH_BEGIN, BENCH_END = "<!-- figures: made by ./scripts/kvm --bench --write -->\n", "<!-- end of figures -->\n"
FIGURES = ROOT / "bench" / "results" / "kvm.json"
PICTURE = ROOT / "docs" / "pictures" / "drivers-nested.svg"
ROUNDS = 3
NOTE = "nested, emulated; for relation only"
TESTS = (
    "tests/driver",
    "tests/vm/test_clones.py::test_what_clones_do_share_is_known_and_explained",
    "tests/vm/test_clones.py::test_the_clock_is_right_although_the_template_is_older",
    "tests/vm/test_clones.py::test_what_one_clone_writes_the_other_never_sees",
    "tests/vm/test_network.py::test_loopback_works_and_one_wire_leads_to_a_gateway",
    "tests/vm/test_network.py::test_root_reaches_neither_the_internet_nor_the_host",
    "tests/vm/test_suspend.py::test_everything_is_there_again_and_the_clock_is_right",
    "tests/vm/test_jail.py::test_each_vmm_runs_as_a_uid_and_gid_of_its_own",
    "tests/vm/test_jail.py::test_its_control_groups_hold_what_was_asked_for",
    "tests/vm/test_jail.py::test_nothing_of_a_jail_outlives_its_sandbox",
    "tests/vm/test_mission.py::test_the_three_programs_print_what_the_mission_says",
)
"""The driver contract with templates saved and restored; clones, egress, suspend, limits; and the mission's programs."""
NATIVE = "qemu-tcg"
ROWS = {
    NATIVE: {"INSTAVM_TEST_DRIVERS": "tcg", "INSTAVM_DRIVER": "qemu", "INSTAVM_ACCELERATION": "tcg"},
    "qemu-kvm": {"INSTAVM_TEST_DRIVERS": "kvm", "INSTAVM_DRIVER": "qemu", "INSTAVM_ACCELERATION": "kvm"},
    "firecracker": {"INSTAVM_TEST_DRIVERS": "firecracker", "INSTAVM_DRIVER": "firecracker"},
}
SIZES = ("1x256", "2x512", "4x4096")
"""vCPUs and MiB of the sandboxes that they start; in a rig their templates are booted once and kept."""
DEADLINE_S = 1500.0
REPORT = "/scratch/report.xml"
_printing = threading.Lock()


class Told:
    """What a row prints, line by line with its name in front, since rows run beside each other."""

    def __init__(self, row):
        self._row = row
        self._rest = ""

    def __call__(self, text):
        *lines, self._rest = (self._rest + text).split("\n")
        with _printing:
            for line in lines:
                print(f"{self._row}: {line}", flush=True)


def in_a_rig(rig, row):
    env = dict(ROWS[row])
    arguments = [*TESTS, f"--junitxml={REPORT}"]
    driver = env.pop("INSTAVM_TEST_DRIVERS")
    how = {"deadline_s": DEADLINE_S, "output": Told(row)}
    scratch = rig.templates(row, env, SIZES, **how)
    done = rig.pytest([driver], arguments, env=env, files=[REPORT], scratch=scratch, **how)
    return done.files.get(REPORT, b"<none/>")


def natively(row):
    with tempfile.TemporaryDirectory(prefix="ivm-kvm-") as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", "--tb=short"]
        command = [*pytest, *TESTS, f"--junitxml={report}"]
        told = Told(row)
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **ROWS[row]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            for line in process.stdout:
                told(line)
        return report.read_bytes() if report.exists() else b"<none/>"


def outcomes(report, driver):
    """Test → what became of it, and its seconds."""
    found = {}
    for case in ET.fromstring(report).iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name').replace(f'[{driver}]', '')}"
        name = name.replace(f"[{driver}-", "[")
        found[name] = (bad[0] if bad else "passed", float(case.get("time")))
    return found


def table(found):
    names = sorted({name for row in found.values() for name in row})
    rows = [f"| test | {' | '.join(found)} |", f"| --- {'| --- ' * len(found)}|"]
    for name in names:
        cells = [f"{row[name][0]}, {row[name][1]:.1f} s" if name in row else "not run" for row in found.values()]
        rows.append(f"| `{name.removeprefix('tests/')}` | {' | '.join(cells)} |")
    day = time.strftime("%Y-%m-%d", time.gmtime())
    about = (
        f"{day}, Linux {platform.release()}. {NATIVE}: on the host itself. The others: in a rig each, nested and emulated; their"
        " seconds are for relation only, and the first test of a kind waits for its template to be booted.\n"
    )
    return f"{about}\n" + "\n".join(rows) + "\n"


def put(begin, end, text):
    """Into the page, between these two, when it is to be written."""
    if "--write" in sys.argv:
        before, _, rest = PAGE.read_text().partition(begin)
        PAGE.write_text(before + begin + text + end + rest.partition(end)[2])


def measure(rig):
    """The bench of drivers. Raises RigFailed."""
    kept = "/scratch/kvm.json"
    command = ["instavm", "bench", "drivers", "--count", ROUNDS, "--json", kept]
    done = rig.run(command, deadline_s=DEADLINE_S, files=[kept], output=Told("bench"))
    if done.status:
        raise RigFailed(f"the bench ended with status {done.status}")
    told = json.loads(done.files[kept])
    facts = {**told["machine"], "note": NOTE}
    put(BENCH_BEGIN, BENCH_END, report.markdown(facts, told["results"]))
    if "--write" in sys.argv:
        report.save(FIGURES, facts, told["results"])
        report.plot(PICTURE, facts, told["results"])


def main():
    rig = Rig()
    rig.prepare()
    if "--bench" in sys.argv:
        measure(rig)
    else:
        test(rig)


def test(rig):
    found = {row: {} for row in ROWS}

    def run(row):
        try:
            report = natively(row) if row == NATIVE else in_a_rig(rig, row)
        except RigFailed as exc:
            print(f"THE KVM TIER WAS NOT TESTED on {row}: {exc}")
        else:
            found[row] = outcomes(report, ROWS[row]["INSTAVM_TEST_DRIVERS"])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a rig keeps one processor busy
        list(pool.map(run, sorted(ROWS, key=lambda row: row == NATIVE)))
    made = table(found)
    print(made)
    put(BEGIN, END, made)
    every = [outcome for row in found.values() for outcome, _ in row.values()]
    bad = [outcome for outcome in every if outcome not in ("passed", "skipped")]
    print(f"{every.count('passed')} passed, {len(bad)} failed, {every.count('skipped')} skipped")
    sys.exit(bool(bad) or not all(found.values()))


if __name__ == "__main__":
    main()
