"""The official client, as it is published, in an environment of its own, against a real server with real sandboxes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from instavm.settings import Settings

CLIENT = "instavm==0.26.1"
WHEEL_SHA256 = "8ac5dc160eba5115babec5f806c70d4fc5af291c77a9c04c5a21e3e87baf5f4c"
INSTAVM = Path(sys.executable).with_name("instavm")


@dataclass(frozen=True)
class Served:
    url: str
    key: str
    low_key: str
    origin: str
    """A server's address; it is `origin.test`, and `other.test` as well."""

    def environment(self):
        keys = {"IVM_BASE": self.url, "IVM_KEY": self.key, "IVM_KEY_LOW": self.low_key}
        return {**keys, "IVM_ORIGIN": self.origin}


@pytest.fixture(scope="session")
def official():
    """The Python of an environment that holds the unmodified client; made once, under the cache folder."""
    home = Settings().cache_dir / "tests" / "official-client" / WHEEL_SHA256[:16]
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "made").exists():
            python = home / "venv" / "bin" / "python"
            venv.create(home / "venv", with_pip=True, clear=True)
            pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "download", "--no-deps", "--dest", home, CLIENT], check=True)
            (wheel,) = home.glob("*.whl")
            assert hashlib.sha256(wheel.read_bytes()).hexdigest() == WHEEL_SHA256, "this is not the published client"
            subprocess.run([*pip, "install", wheel], check=True)
            (home / "made").touch()
    return home / "venv" / "bin" / "python"


@pytest.fixture(scope="session")
def served(short_folder, internet):
    """`instavm serve` on a free port, and three keys: of an account, and of one that may have little."""
    internet.names({"origin.test": [internet.a], "other.test": [internet.a]})
    environment = {
        **os.environ,
        "INSTAVM_EGRESS_DNS": json.dumps([internet.a]),
        "INSTAVM_STATE_DIR": str(short_folder / "served"),
        "INSTAVM_RUNTIME_DIR": str(short_folder / "served-run"),
    }

    def instavm(*arguments):
        done = subprocess.run([INSTAVM, *arguments], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    key = json.loads(instavm("key", "create", "compat", "--json"))["key"]
    low = json.loads(instavm("key", "create", "low", "--tenant", "low", "--json"))["key"]
    instavm("tenant", "quota", "low", "--sandboxes", "1", "--lifetime", "60")
    log = (short_folder / "served.log").open("w+")
    server = subprocess.Popen(
        [INSTAVM, "serve", "--port", "0"], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
    )
    try:
        said = server.stdout.readline()
        assert said.startswith("InstaVM on "), (short_folder / "served.log").read_text()
        yield Served(said.split()[-1], key, low, internet.a)
    finally:
        server.terminate()
        assert server.wait(60) == 0
        log.seek(0)
        text = log.read()
        log.close()
        assert key not in text and low not in text, "a key is in the log"
