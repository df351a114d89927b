"""The host's Debian archive: its sources and the settings that make them reachable. No address is kept here.

Third-party sources of the host are left out: what runs in a sandbox comes from Debian, whoever builds it.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from instavm.errors import HostNotReady
from instavm.node.images.workshop import Workshop

ARCHITECTURE: Final = "amd64"
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_REACHING: Final = re.compile(
    r"Acquire::(https?::|ftp::|Check-|Max-FutureTime|Retries|ForceIPv|By-Hash)"
    r"|Dir::Etc::netrc",
    re.IGNORECASE,
)
"""Settings that the host's `apt-get` may need to reach the archive: proxies, certificates, clocks."""


@dataclass(frozen=True, slots=True)
class Archive:
    """Where packages come from.

    suite: code name, such as `bookworm`. sources: lines of a sources.list. options: lines of an apt.conf.
    """

    suite: str
    sources: tuple[str, ...]
    options: tuple[str, ...]


def suite() -> str:
    """The code name of the host's Debian release; images are made from the same release.

    Raises: HostNotReady on another distribution or architecture.
    """
    if platform.machine() != "x86_64":
        raise HostNotReady(f"images are built for x86_64 only; this host is {platform.machine()}")
    try:
        release = platform.freedesktop_os_release()
    except OSError as exc:
        raise HostNotReady("this host has no /etc/os-release; images are built on Debian") from exc
    if release.get("ID") != "debian" or not release.get("VERSION_CODENAME"):
        raise HostNotReady(f"images are built on Debian; this host is {release.get('PRETTY_NAME', 'unknown')}")
    return release["VERSION_CODENAME"]


def open_archive(shop: Workshop) -> Archive:
    """Find out what plain `apt-get` would use. Downloads package indices only if the host has none.

    Raises: HostNotReady when there is no Debian source among the host's.
    """
    lists: tuple[str, ...] = ()
    sources = debian_sources(_index_targets(shop, lists))
    if not sources:
        state = shop.folder / "apt"
        lists = _private_state(state)
        shop.progress("reading the host's apt sources")
        shop.run("apt-get", *lists, "update")
        sources = debian_sources(_index_targets(shop, lists))
    if not sources:
        raise HostNotReady(
            "none of this host's apt sources could be read as the Debian archive; "
            "is the network there? See /etc/apt/sources.list.d"
        )
    dumped = shop.run("apt-config", "dump", "--format", '%F "%v";%n', quiet=True).splitlines()
    options = tuple(line for line in dumped if _REACHING.match(line) and not line.endswith(' "";'))
    return Archive(suite(), tuple(sources), options)


def download(shop: Workshop, archive: Archive, name: str) -> Path:
    """Download the concrete package that `name`, a package or a metapackage of Debian, depends on first.

    Returns: the .deb in the workshop's folder. Raises: HostNotReady.
    """
    state = shop.folder / "apt-download"
    private = (*_private_state(state), *_only(archive, state))
    shop.progress("reading Debian's package list")
    shop.run("apt-get", *private, "-oAPT::Update::Error-Mode=any", "update")
    depends = shop.run("apt-cache", *private, "depends", "--important", name, quiet=True)
    found = re.search(rf"Depends: ({re.escape(name.rsplit('-', 2)[0])}-\S+)", depends)
    if found is None:
        raise HostNotReady(f"Debian {archive.suite} has no package {name} with a kernel of its own")
    concrete = found[1]
    into = state / "deb"
    into.mkdir()
    shop.progress(f"downloading {concrete}")
    shop.run("apt-get", *private, "download", concrete, cwd=into)
    return next(into.glob("*.deb"))


def debian_sources(targets: str) -> list[str]:
    """Lines of a sources.list for Debian's own sources among `apt-get indextargets`' answer."""
    found: list[str] = []
    for target in _stanzas(targets):
        if target.get("Created-By") != "Packages" or target.get("Target-Of") != "deb":
            continue
        if target.get("Origin") != "Debian" or target.get("Architecture") not in (ARCHITECTURE, "all"):
            continue
        signed_by = target.get("Signed-By", "")
        keyring = signed_by if signed_by.startswith("/") else str(_KEYRING) if _KEYRING.exists() else ""
        options = f"[signed-by={keyring}] " if keyring else ""
        line = f"deb {options}{target['Repo-URI']} {target['Release']} {target['Component']}"
        if line not in found:
            found.append(line)
    return found


def _index_targets(shop: Workshop, options: tuple[str, ...]) -> str:
    return shop.run("apt-get", *options, "indextargets", quiet=True)


def _private_state(state: Path) -> tuple[str, ...]:
    """Options that keep apt's hands off the host's own lists and caches."""
    (state / "lists" / "partial").mkdir(parents=True)
    (state / "cache" / "archives" / "partial").mkdir(parents=True)
    return (f"-oDir::State::lists={state}/lists", f"-oDir::Cache={state}/cache")


def _only(archive: Archive, state: Path) -> tuple[str, ...]:
    listed = state / "sources.list"
    listed.write_text("".join(f"{line}\n" for line in archive.sources))
    nothing = (
        "-oDir::Etc::sourceparts=/dev/null",
        "-oDir::Etc::preferences=/dev/null",
        "-oDir::Etc::preferencesparts=/dev/null",
    )
    return (f"-oDir::Etc::sourcelist={listed}", *nothing)


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    for block in text.split("\n\n"):
        pairs = (line.partition(": ") for line in block.splitlines() if not line.startswith(" "))
        yield {name: value for name, separator, value in pairs if separator}
