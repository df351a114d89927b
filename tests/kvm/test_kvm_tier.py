"""The KVM tier, in the nested rig: the driver contract's own tests, run where hardware virtualisation works.

Here only its core, on Firecracker. All of it, on both drivers: scripts/kvm.
"""

import sys

import pytest
from rig import excused

CORE = (
    "tests/driver/test_contract.py::test_a_prepared_machine_loads_and_runs",
    "tests/driver/test_save_changes.py::test_parent_and_child_go_on_from_the_same_moment",
)
DEADLINE_S = 420.0


@pytest.mark.slow
@pytest.mark.timeout(2 * DEADLINE_S + 900)  # the first run builds the rig
def test_firecracker_boots_executes_saves_and_restores(rig):
    with excused():
        done = rig.pytest(["firecracker"], CORE, deadline_s=DEADLINE_S, output=sys.stdout.write, again=True)
    assert done.status == 0, done.output
    assert "2 passed" in done.output
