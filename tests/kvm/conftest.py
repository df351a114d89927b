"""The rig, made ready once for a run. Where it can't be, the run says so in its last lines."""

import pytest
from rig import Rig, RigFailed

from instavm.errors import InstaVMError

LACKS = pytest.StashKey()


@pytest.fixture(scope="session")
def rig(request):
    made = Rig()
    try:
        made.prepare()
    except (RigFailed, InstaVMError, OSError) as exc:
        request.config.stash[LACKS] = str(exc)
        pytest.skip(f"the nested rig can't be made here: {exc}")
    return made


def pytest_terminal_summary(terminalreporter, config):
    if LACKS in config.stash:
        terminalreporter.section("THE KVM TIER WAS NOT TESTED", red=True, bold=True)
        terminalreporter.line(config.stash[LACKS])
