"""Templates: an image booted once with a given size, warm, and saved. Starting a sandbox is restoring one of these.

They live under the cache directory, content-addressed by all that they depend on, so that servers share them and a
change of agent, kernel, image or VMM makes new ones. A build happens beside the final place and is renamed into it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from instavm.errors import BootFailed, CorruptTemplate, ExecutionError, GuestProtocolError, HostNotReady
from instavm.node import identity
from instavm.node.agent import connected
from instavm.node.images.store import GuestBase, Image
from instavm.node.vmm.base import Driver, MachineSpec, Saved
from instavm.sandbox import Command

VERSION = 3
"""Raise it when what is done to a template at build time changes."""
WARM_UP = (
    Command("print(1)", "python", 60),
    Command("1/0", "python", 60),
    Command("exec('import random, uuid, subprocess, json; print(random.random(), uuid.uuid4())', {})", "python", 60),
    Command("print(1)", "python", 60),
    Command("!true", "python", 60),
    Command("import asyncio; await asyncio.sleep(0)", "python", 60),
    Command("echo 1", "bash", 60),
    Command("ls / | wc -l", "bash", 60),
)
"""Run in every template before it is saved, so that every sandbox finds this code in memory."""
NOBODY = "vm-0000000000"
"""Who a template is: a name as long as a sandbox's, so that taking its own changes no file's length."""
SETTLE_S = 2.0
"""Time for the guest's kernel to finish what it put off (RCU callbacks, freed groups); clones would all do it again."""


@dataclass(frozen=True, slots=True)
class Template:
    key: str
    folder: Path
    saved: Saved
    env: dict[str, str]

    @property
    def disk(self) -> Path:
        return self.folder / "disk.qcow2"

    @property
    def blank(self) -> Path:
        """An empty overlay on `disk`; a copy of it is a sandbox's own disk."""
        return self.folder / "blank.qcow2"


class Templates:
    def __init__(self, cache_dir: Path, driver: Driver, guest: GuestBase, boot_timeout_s: float) -> None:
        self._folder = cache_dir / "templates"
        self._driver = driver
        self._guest = guest
        self._boot_timeout_s = boot_timeout_s
        self._verified: dict[str, Template] = {}
        self._locks: dict[str, anyio.Lock] = {}

    async def get(self, image: Image, vcpus: int, memory_mib: int) -> tuple[Template, bool]:
        """The template of this image and size, and whether it had to be booted for this.

        Raises: BootFailed, HostNotReady.
        """
        await self._driver.version()
        key = self._key(image, vcpus, memory_mib)
        if (known := self._verified.get(key)) is not None:
            return known, False
        async with self._locks.setdefault(key, anyio.Lock()):
            if (known := self._verified.get(key)) is not None:
                return known, False
            template = self._describe(key, image, vcpus, memory_mib)
            async with _locked(self._folder / f"{key}.lock"):
                cold = not await self._usable(template)
                if cold:
                    await self._build(template, image)
            self._verified[key] = template
            return template, cold

    def _key(self, image: Image, vcpus: int, memory_mib: int) -> str:
        parts = [VERSION, self._driver.fingerprint(), self._guest.digest, image.digest, vcpus, memory_mib, str(WARM_UP)]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]

    def _describe(self, key: str, image: Image, vcpus: int, memory_mib: int) -> Template:
        folder = self._folder / key
        spec = MachineSpec(self._guest.kernel, self._guest.initrd, self._guest.system, vcpus, memory_mib)
        layers = (folder / "disk.qcow2", image.rootfs)
        return Template(key, folder, Saved(spec, folder / "memory", folder / "state", layers), dict(image.env))

    async def _usable(self, template: Template) -> bool:
        """Whether it is there and whole. One that is there but altered is moved aside, so that it is made again."""
        try:
            await anyio.to_thread.run_sync(verify, template.folder)
        except FileNotFoundError:
            return False
        except CorruptTemplate:
            await anyio.to_thread.run_sync(shutil.rmtree, template.folder)
            return False
        return True

    async def _build(self, template: Template, image: Image) -> None:
        with _building(template.folder) as folder:
            disk = folder / "disk.qcow2"
            await _qemu_img("create", "-q", "-f", "qcow2", "-b", image.rootfs, "-F", "raw", disk)
            await self._boot(template, image, disk, folder)
            size = str(image.size_bytes)
            blank = folder / "blank.qcow2"
            await _qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", template.disk, "-F", "qcow2", blank, size)
            for leftover in ("qmp.sock", "agent.sock", "vmm.log"):
                (folder / leftover).unlink(missing_ok=True)
            await anyio.to_thread.run_sync(_seal, folder, template)

    async def _boot(self, template: Template, image: Image, disk: Path, folder: Path) -> None:
        saved = Saved(template.saved.spec, folder / "memory", folder / "state", (image.rootfs,))
        machine = await self._driver.boot(saved, disk, folder)
        try:
            try:
                async with connected(await machine.dial()) as agent:
                    await agent.hello(self._boot_timeout_s)
                    await agent.configure(template.env, image.workdir)
                    for command in WARM_UP:
                        await agent.execute(command)
                    await agent.identify(identity.fresh(NOBODY, {}))
                    await agent.rest()
                    await anyio.sleep(SETTLE_S)
                    await machine.pause()
                    await machine.save(folder / "state")
            except TimeoutError as exc:
                raise BootFailed(f"the guest did not come up within {self._boot_timeout_s:.0f} s") from exc
            except (GuestProtocolError, ExecutionError) as exc:
                raise BootFailed(f"the guest did not come up: {exc}") from exc
        except BaseException as exc:
            if isinstance(exc, BootFailed):
                with anyio.CancelScope(shield=True):
                    exc.add_note(f"console of the guest:\n{(await machine.console())[-4000:]}")
            raise
        finally:
            await machine.aclose()


def verify(folder: Path) -> None:
    """Raises FileNotFoundError (not there) or CorruptTemplate (there, but not what was saved)."""
    try:
        recorded = json.loads((folder / "template.json").read_text())["sha256"]
        for name, digest in recorded.items():
            if _digest(folder / name) != digest:
                raise CorruptTemplate(f"template {folder.name}: {name} is not what was saved")
    except FileNotFoundError:
        if folder.exists():
            raise CorruptTemplate(f"template {folder.name}: a file of it is missing") from None
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CorruptTemplate(f"template {folder.name}: its description can't be read: {exc}") from exc


def _seal(folder: Path, template: Template) -> None:
    names = ("memory", "state", "disk.qcow2", "blank.qcow2")
    folder.chmod(0o700)
    for name in names:
        os.chown(folder / name, os.geteuid(), os.getegid())  # the VMM that wrote it is gone, and so is its uid
        (folder / name).chmod(0o400)
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    spec = template.saved.spec
    description = {
        "vcpus": spec.vcpus,
        "memory_mib": spec.memory_mib,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sha256": {name: _digest(folder / name) for name in names},
    }
    (folder / "template.json").write_text(json.dumps(description, indent=1))


def _digest(path: Path) -> str:
    """SHA-256 over the places and bytes of all that is written in a sparse file, and over its size."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(b"%d" % size)
        for start, end in _extents(file.fileno(), size):
            digest.update(b"@%d" % start)
            file.seek(start)
            left = end - start
            while left:
                data = file.read(min(1 << 20, left))
                digest.update(data)
                left -= len(data)
    return digest.hexdigest()


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


async def _qemu_img(*arguments: str | Path) -> None:
    try:
        await anyio.run_process(["qemu-img", *map(str, arguments)])
    except FileNotFoundError as exc:
        raise HostNotReady("qemu-img is missing. Install it with: apt-get install qemu-utils") from exc
    except subprocess.CalledProcessError as exc:
        raise BootFailed(f"qemu-img: {exc.stderr.decode(errors='replace').strip()}") from exc


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Hold `path` against other processes; released by the kernel however we end."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await anyio.to_thread.run_sync(lambda: fcntl.flock(fd, fcntl.LOCK_EX), abandon_on_cancel=True)
        yield
    finally:
        os.close(fd)


class _building:
    """A folder beside `final` that becomes it when the block ends well, and goes when it does not.

    Called with the lock of `final` held, so whatever else is half-built beside it belongs to a builder that was killed.
    """

    def __init__(self, final: Path) -> None:
        self._final = final
        self._folder: Path | None = None

    def __enter__(self) -> Path:
        prefix = f".{self._final.name}-"
        for dead in self._final.parent.glob(prefix + "*"):
            shutil.rmtree(dead, ignore_errors=True)
        self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self._final.parent))
        return self._folder

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._folder is not None
        if kind is None:
            self._folder.rename(self._final)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)
