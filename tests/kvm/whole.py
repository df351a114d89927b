"""Everything that the rig can show, and the table of docs/kvm.md made of it."""

import platform
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from rig import ROOT, Rig, RigFailed

PAGE = ROOT / "docs" / "kvm.md"
BEGIN, END = "<!-- results: made by ./scripts/kvm --write -->\n", "<!-- end of results -->\n"
CONTRACT = ("tests/driver",)
WHOLE = (
    "tests/vm/test_mission.py",
    "tests/vm/test_clones.py",
    "tests/vm/test_suspend.py",
    "tests/vm/test_network.py",
    "tests/vm/test_jail.py",
)
ROWS = {
    "qemu-kvm": {"driver": "kvm", "INSTAVM_DRIVER": "qemu", "INSTAVM_ACCELERATION": "kvm"},
    "firecracker": {"driver": "firecracker", "INSTAVM_DRIVER": "firecracker"},
}
DEADLINE_S = 1500.0
REPORT = "/scratch/report.xml"


def run(rig, row, tests):
    """Test → outcome and seconds, and what the rig printed last when it did not end well."""
    env = dict(ROWS[row])
    driver = env.pop("driver")
    arguments = [*tests, f"--junitxml={REPORT}"]
    done = rig.pytest([driver], arguments, deadline_s=DEADLINE_S, output=show, env=env, files=[REPORT])
    found = {}
    for case in ET.fromstring(done.files.get(REPORT, b"<none/>")).iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name').replace('[' + driver + ']', '')}"
        found[name] = (bad[0] if bad else "passed", float(case.get("time")))
    return found


def show(text):
    print(text, end="", flush=True)


def table(found):
    names = sorted({name for row in found.values() for name in row})
    rows = [f"| test | {' | '.join(found)} |", f"| --- {'| --- ' * len(found)}|"]
    for name in names:
        cells = [f"{row[name][0]}, {row[name][1]:.1f} s" if name in row else "not run" for row in found.values()]
        rows.append(f"| `{name.removeprefix('tests/')}` | {' | '.join(cells)} |")
    day = time.strftime("%Y-%m-%d", time.gmtime())
    about = f"Nested and emulated, {platform.release()} outside, {day}: which tests passed; the seconds are for relation only.\n"
    return f"{about}\n" + "\n".join(rows) + "\n"


def main():
    rig = Rig()
    rig.prepare()
    found = {row: {} for row in ROWS}
    for row in ROWS:
        for tests in (CONTRACT, WHOLE):
            try:
                found[row] |= run(rig, row, tests)
            except RigFailed as exc:
                print(f"THE KVM TIER WAS NOT TESTED on {row}: {tests[0]}: {exc}")
    made = table(found)
    print(made)
    if "--write" in sys.argv:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + made + END + rest.partition(END)[2])
    outcomes = [outcome for row in found.values() for outcome, _ in row.values()]
    print(f"{outcomes.count('passed')} passed, {len(outcomes) - outcomes.count('passed')} failed")
    sys.exit(set(outcomes) != {"passed"})


if __name__ == "__main__":
    main()
