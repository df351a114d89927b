"""The rig, made ready once for a run. Where it can't be, or fails itself, the run's last lines say so."""

import pytest
from rig import Rig, excused


@pytest.fixture(scope="session")
def rig():
    with excused():
        made = Rig()
        made.prepare()
        return made
