"""Images of others: fetched by skopeo, looked through, unpacked by umoci, and written to a disk. Nothing of them is run.

What an image holds comes from a stranger: every entry of every layer is looked at before anything is unpacked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import math
import os
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from instavm import limits
from instavm.contract.snapshots import Pull
from instavm.errors import DiskFull, SnapshotError
from instavm.node.images import layout
from instavm.node.images.plain import make_plain
from instavm.node.images.workshop import require

WORKDIR: Final = "/app"
LOCAL: Final = ("oci:", "oci-archive:", "docker-archive:")
"""References to what lies on this host's disk."""
SYSTEM: Final = "linux"
ARCHITECTURE: Final = "amd64"
WHITEOUT: Final = ".wh."
"""Begins the name of an entry that removes what lower layers have under the rest of that name."""
OPAQUE: Final = ".wh..wh..opq"
ENTRIES_MAX: Final = 2_000_000
HEADER_BYTES_MAX: Final = 1 << 20
"""Of one file's name, link and attributes."""
_HEADERS: Final = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_UNREADABLE: Final = (tarfile.TarError, EOFError, OSError, ValueError, IndexError, zlib.error, lzma.LZMAError)
"""What reading a broken archive raises: some of its parsers let their own errors through."""
DISK_GIB_DEFAULT: Final = 3
LOOPBACK: Final = ("localhost", "127.", "[::1]")
"""Registries there may speak plain HTTP."""
HUB: Final = "docker.io"
HUB_KEY: Final = "https://index.docker.io/v1/"
_DEADLINE_S: Final = 1800.0
_DIES_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")
_ALONE: Final = (*_DIES_WITH_US, "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--")
_EXT4: Final = (
    "-O",
    "^has_journal",
    "-m",
    "0",
    "-L",
    "instavm-root",
    "-E",
    "lazy_itable_init=0,assume_storage_prezeroed=1",
)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What is known of an image. `digest`: of its manifest, or of its index, as the registry has it."""

    digest: str
    env: Mapping[str, str]
    labels: Mapping[str, str]


def is_local(reference: str) -> bool:
    return reference.startswith(LOCAL)


class Image:
    """One image on its way to a disk. `folder` is its own, and its owner removes it."""

    def __init__(self, ask: Pull, folder: Path, progress: Progress) -> None:
        require("skopeo", "umoci", "mke2fs", "zstd")
        self._ask = ask
        self._folder = folder
        self._progress = progress
        self._source, self._options = self._where()

    async def resolve(self) -> Fetched:
        """What it is now; the caller is let in by the registry, or this raises. Raises SnapshotError."""
        self._progress(f"looking for {self._ask.reference}")
        raw = await self._skopeo("inspect", "--raw", *self._options, self._source)
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        if self._source.startswith("docker://") and "@" not in self._source:
            self._source = f"{_untagged(self._source)}@{digest}"
        config = layout.parsed(await self._skopeo("inspect", "--config", *self._options, self._source))
        found = (config.get("os", SYSTEM), config.get("architecture", ARCHITECTURE))
        if found != (SYSTEM, ARCHITECTURE):
            raise SnapshotError(
                f"{self._ask.reference} is for {found[0]}/{found[1]}; sandboxes are {SYSTEM}/{ARCHITECTURE}"
            )
        told = config.get("config") or {}
        if not isinstance(told, dict) or not isinstance(found_labels := told.get("Labels") or {}, dict):
            raise SnapshotError("the image's configuration can't be read")
        given = told.get("Env") or ()
        env = dict(one.split("=", 1) for one in given if isinstance(one, str) and "=" in one)
        labels = {str(name): str(value) for name, value in found_labels.items()}
        self._progress(f"it is {digest}")
        return Fetched(digest, {**env, **self._ask.env}, labels)

    async def write(self, disk: Path) -> int:
        """Fetch it and write it to `disk`, a raw ext4. Returns: the size of the disk in bytes. Raises SnapshotError, DiskFull."""
        fetched, tree = self._folder / "layout", self._folder / "tree"
        self._progress("fetching its layers")
        await self._skopeo("copy", "--quiet", *self._options_of_copy(), self._source, f"oci:{fetched}:image")
        most = (self._ask.disk_gib or limits.BUILD_DISK_GIB_MAX) << 30
        if await make_plain(fetched, most, _ALONE):
            self._progress("layers of zstd are unpacked")
        used = await anyio.to_thread.run_sync(look_through, fetched, most)
        size_gib = self._ask.disk_gib or min(
            limits.BUILD_DISK_GIB_MAX, max(DISK_GIB_DEFAULT, math.ceil(used * 1.5 / 2**30) + 1)
        )
        self._progress(f"unpacking {used >> 20} MiB")
        await self._run(*_ALONE, "umoci", "raw", "unpack", "--image", f"{fetched}:image", str(tree))
        self._progress(f"writing a disk of {size_gib} GB")
        await self._run(
            *_DIES_WITH_US, "mke2fs", "-q", "-t", "ext4", *_EXT4, "-d", str(tree), str(disk), f"{size_gib}G"
        )
        return size_gib << 30

    def _where(self) -> tuple[str, list[str]]:
        ask = self._ask
        if is_local(ask.reference):
            path = ask.reference.split(":", 1)[1]
            if not path.startswith("/"):
                raise SnapshotError(f"{ask.reference}: the path of an image on this host must be absolute")
            return ask.reference, []
        reference = ask.reference.removeprefix("docker://")
        if any(char.isspace() or ord(char) < 32 for char in reference) or reference.startswith("-"):
            raise SnapshotError(f"{ask.reference!r} is no reference to an image")
        host = _registry(reference)
        options = ["--tls-verify=false"] if host.startswith(LOOPBACK) else []
        if ask.username is None:
            return f"docker://{reference}", [*options, "--no-creds"]
        token = base64.b64encode(f"{ask.username}:{ask.password or ''}".encode()).decode()
        secret = self._folder / "auth.json"
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"auths": {HUB_KEY if host == HUB else host: {"auth": token}}}, file)
        return f"docker://{reference}", [*options, f"--authfile={secret}"]

    def _options_of_copy(self) -> list[str]:
        names = {"--tls-verify=false": "--src-tls-verify=false", "--no-creds": "--src-no-creds"}
        return [names.get(option, option) for option in self._options]

    async def _skopeo(self, *arguments: str) -> bytes:
        platform = (f"--override-os={SYSTEM}", f"--override-arch={ARCHITECTURE}")
        return await self._run(*_DIES_WITH_US, "skopeo", "--insecure-policy", *platform, *arguments)

    async def _run(self, *argv: str) -> bytes:
        """A tool's stdout. Ended when the task that waits for it is. Raises SnapshotError with its last words, DiskFull."""
        tool = next(word for word in argv if word in ("skopeo", "umoci", "mke2fs"))
        env = {name: value for name, value in os.environ.items() if name == "PATH" or name.lower().endswith("_proxy")}
        env |= {"HOME": str(self._folder), "TMPDIR": str(self._folder), "LC_ALL": "C.UTF-8"}
        try:
            with anyio.fail_after(_DEADLINE_S):
                done = await anyio.run_process(argv, check=False, env=env, stdin=subprocess.DEVNULL)
        except TimeoutError:
            raise SnapshotError(f"{tool} did not end within {_DEADLINE_S:.0f} s") from None
        if done.returncode:
            raise _failure(tool, self._ask, done.stderr.decode(errors="replace"))
        return done.stdout


class _Member(tarfile.TarInfo):
    """An entry whose extended header is bounded: `tarfile` reads all of it into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS and self.size > HEADER_BYTES_MAX:
            raise SnapshotError(f"the image has a file whose header alone takes {self.size} bytes")
        entry: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return entry


def look_through(folder: Path, most_bytes: int) -> int:
    """Blocking. Bytes that its layers unpack to. Raises SnapshotError: one holds what must not be unpacked, or too much, or
    all of them together hold nothing."""
    total, entries, files = 0, 0, 0
    for layer in layout.layers(layout.manifest(folder)):
        try:
            with (
                layout.opened(layout.blob(folder, layer.get("digest"))) as file,
                tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar,
            ):
                for member in tar:
                    entries += 1
                    total += max(0, member.size) + 512
                    _refuse(member)
                    files += not _base(member).startswith(WHITEOUT)
                    if total > most_bytes:
                        raise SnapshotError(
                            f"the image unpacks to more than {most_bytes >> 30} GB (build_args.disk_size_gb)"
                        )
                    if entries > ENTRIES_MAX:
                        raise SnapshotError(f"the image has more than {ENTRIES_MAX} files")
        except _UNREADABLE as exc:
            kind = layer.get("mediaType", "?")
            raise SnapshotError(f"a layer of the image ({kind}) is not a tar archive that can be read: {exc}") from exc
    if not files:
        raise SnapshotError("the image has layers, but no file in them, so there is nothing to start from")
    return total


def _refuse(member: tarfile.TarInfo) -> None:
    names = [member.name, *([member.linkname] if member.islnk() else [])]
    for name in names:
        if ".." in name.split("/"):
            raise SnapshotError(f"the image has a file that leads out of it: {name[:200]!r}")
    if not member.isdir() and member.name.strip("./") == "":
        raise SnapshotError(f"the image's root is something else than a folder: {member.name[:200]!r}")
    base = _base(member)
    if base.startswith(WHITEOUT) and base != OPAQUE and base.removeprefix(WHITEOUT).strip(".") == "":
        raise SnapshotError(f"the image removes what is not its own: {member.name[:200]!r}")
    if member.isdev() and not member.isfifo() and not member.name.lstrip("./").startswith("dev/"):
        raise SnapshotError(f"the image has a device that is not below /dev: {member.name[:200]!r}")


def _base(member: tarfile.TarInfo) -> str:
    return member.name.rsplit("/", 1)[-1]


def _registry(reference: str) -> str:
    first, slash, _ = reference.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else HUB


def _untagged(source: str) -> str:
    head, slash, last = source.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}"


def _failure(tool: str, ask: Pull, said: str) -> Exception:
    if "no space left on device" in said.lower():
        return DiskFull(f"no space left on the host's disk for {ask.reference}")
    words = said.strip().splitlines()[-3:] or ["it says nothing"]
    text = " ".join(word.strip() for word in words)[-600:]
    if tool == "mke2fs":
        return SnapshotError(f"{ask.reference} does not fit on a disk of {ask.disk_gib} GB (build_args.disk_size_gb)")
    if ask.password:
        text = text.replace(ask.password, "…")
    return SnapshotError(f"{ask.reference}: {tool}: {text}")
