"""Importing the SDK is cheap and brings no server along."""

import subprocess
import sys
import tomllib
from pathlib import Path

from instavm import __version__

ROOT = Path(__file__).parents[3]


def loaded_by(code):
    show = f"{code}\nimport sys\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout.split())


def test_the_package_alone_loads_nothing_heavy():
    assert not loaded_by("import instavm") & {"pydantic", "httpx", "anyio", "asyncio", "ssl"}


def test_the_client_loads_no_server_code():
    names = loaded_by("from instavm import InstaVM, AsyncInstaVM")
    assert not names & {"fastapi", "uvicorn", "sqlalchemy", "typer"}
    assert not {name for name in names if name.startswith(("instavm.control", "instavm.node", "instavm.serve"))}


def test_running_code_from_the_command_line_loads_no_server_code():
    names = loaded_by("import instavm.cli.app")
    assert not names & {"fastapi", "uvicorn", "sqlalchemy"}


def test_the_version_is_told_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
