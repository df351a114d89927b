"""Where an image's package managers get packages from, as they themselves say: asked once, in the image's first template.

An image can name what it likes: its answer opens nothing but public hosts, and only to who allows package managers in
a sandbox of that image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from instavm import hostnames
from instavm.contract.executions import Command
from instavm.node import npmrc
from instavm.node.agent import Agent
from instavm.node.network.policy import HTTP, HTTPS, Registry

ASK_S: Final = 120.0
HOSTS_MAX: Final = 64
ANSWER_MAX: Final = 64 << 10
APT: Final = 'command -v apt-get >/dev/null && apt-get --print-uris update | cut -d "\'" -f 2'
PIP: Final = r"""python=$(command -v python3 || command -v python) && "$python" - <<'END'
import configparser, os, sys
from pip._internal.models.index import PyPI
def normal(name):
    return name.lower().replace("_", "-").lstrip("-")
home, own = os.path.expanduser("~"), os.environ.get("PIP_CONFIG_FILE", "")
places = [path + "/pip" for path in os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")] + ["/etc"]
if not os.path.exists(own):
    places += [home + "/.pip", os.environ.get("XDG_CONFIG_HOME", home + "/.config") + "/pip"]
files = [place + "/pip.conf" for place in [*places, sys.prefix]] + [own]
given = {}
for path in files if own != os.devnull else []:
    parser = configparser.RawConfigParser()
    parser.read(path)
    for section in parser.sections():
        given.update(((section, normal(name)), value) for name, value in parser.items(section))
for name, value in os.environ.items():
    if name.startswith("PIP_"):
        given[":env:", normal(name[4:])] = value
chosen = {}
for wanted in ("global", "install", ":env:"):
    chosen.update((name, value) for (section, name), value in given.items() if section == wanted and value)
index = chosen.get("index-url") or chosen.get("pypi-url") or PyPI.simple_url
print(index, *chosen.get("extra-index-url", "").split(), *chosen.get("find-links", "").split(), sep="\n")
if index.rstrip("/") == PyPI.simple_url.rstrip("/"):
    print("https://" + PyPI.file_storage_domain)
END"""
"""pip's own order of files and environment, and its own defaults; all of pip takes ten times as long to start under emulation."""
ASKED: Final = hashlib.sha256(f"{APT}\n{PIP}\n{npmrc.FACTS}".encode()).hexdigest()[:16]
"""Changes with the questions."""


async def ask(agent: Agent) -> tuple[Registry, ...]:
    """What apt, pip and npm are set up for; those that are not there have nothing to say."""

    async def run(code: str) -> str:
        done = await agent.execute(Command(code, "sh", ASK_S))
        return done.stdout[:ANSWER_MAX] if done.exit_code == 0 else ""

    urls = [*(await run(APT)).splitlines(), *(await run(PIP)).splitlines(), *await npmrc.registries(run)]
    return tuple(found(urls))[:HOSTS_MAX]


def found(urls: Iterable[str]) -> Iterator[Registry]:
    """The hosts in them, each once, with the ports that they are reached on besides the usual two."""
    hosts: dict[str, set[int]] = {}
    for url in urls:
        try:
            parts = urlsplit(url.strip())
            host, port = hostnames.read(parts.hostname or ""), parts.port
        except ValueError:
            continue
        if parts.scheme in ("http", "https"):
            hosts.setdefault(host, {HTTP, HTTPS}).update({port} if port else ())
    for host, ports in hosts.items():
        yield Registry(host, tuple(sorted(ports)))


class Known:
    """What images answered, kept by digest beside the templates, so that the next size need not ask again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, digest: str) -> tuple[Registry, ...] | None:
        try:
            return from_json(json.loads((self._folder / f"{digest}-{ASKED}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def keep(self, digest: str, registries: Iterable[Registry]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = self._folder / f".{digest}.{id(self)}"
        new.write_text(json.dumps(to_json(registries)))
        new.rename(self._folder / f"{digest}-{ASKED}.json")


def to_json(registries: Iterable[Registry]) -> list[list[Any]]:
    return [[one.host, list(one.ports)] for one in registries]


def from_json(kept: Iterable[Any]) -> tuple[Registry, ...]:
    """Raises ValueError, TypeError."""
    return tuple(Registry(str(host), tuple(int(port) for port in ports)) for host, ports in kept)
