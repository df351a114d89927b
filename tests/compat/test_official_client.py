"""The published client, unmodified: each check of `official_checks.py` in a process of its own."""

import os
import re
import subprocess
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("official_checks.py")
NAMES = re.findall(r"^def (check_\w+)", CHECKS.read_text(), re.MULTILINE)
SLOW = {"check_07_a_lifetime_runs_out"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES])
def test_official_client(official, served, name, tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **served.environment()}
    done = subprocess.run([official, CHECKS, name], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
