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
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import anyio

from instavm.contract.executions import Command
from instavm.errors import BootFailed, CorruptTemplate, ExecutionError, GuestProtocolError, HostNotReady
from instavm.node import identity, inventory, patience
from instavm.node.agent import Agent, connected
from instavm.node.console import last_lines
from instavm.node.images.store import GuestBase, Image
from instavm.node.layers import Layers
from instavm.node.network.guard import Networks
from instavm.node.network.policy import Registry
from instavm.node.registries import ASKED, Known, ask, from_json, to_json
from instavm.node.snapshots import BELOW, pin
from instavm.node.sparse import digest
from instavm.node.trust import Trust
from instavm.node.vmm.base import Driver, Machine, MachineSpec, Saved
from instavm.settings import Settings

VERSION = 11
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
DESCRIPTION = "template.json"
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
    workdir: str
    image: str
    """Name of the image that was booted."""
    image_digest: str
    guest: str
    """Digest of what it was booted with."""
    registries: tuple[Registry, ...] = ()
    """Where the image's package managers get packages from."""

    @property
    def disk(self) -> Path:
        return self.folder / "disk.qcow2"

    @property
    def blank(self) -> Path:
        """An empty overlay on `disk`; a copy of it is a sandbox's own disk."""
        return self.folder / "blank.qcow2"


class Templates:
    """Those of the default image lie in the cache, for all servers; those of a snapshot beside it, and go with it."""

    def __init__(
        self,
        settings: Settings,
        driver: Driver,
        guest: GuestBase,
        networks: Networks | None = None,
        trust: Trust | None = None,
    ) -> None:
        """networks: None, or networks that this host can't make = machines without a network device."""
        self._shared = settings.cache_dir / "templates"
        self.own = settings.state_dir / "templates"
        self._layers = Layers(settings)
        self._driver = driver
        self._guest = guest
        self._boot_timeout_s = settings.boot_timeout_s
        self._networks = networks
        self._network = networks is not None and networks.refusal is None
        self._trust = trust or Trust(None)
        self._registries = Known(settings.cache_dir / "registries")
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
            async with _locked(template.folder.with_name(f"{key}.lock")):
                cold = not await self._usable(template)
                if cold:
                    await self._build(template, image)
            registries = await anyio.to_thread.run_sync(_registries, template.folder)
            layers = await anyio.to_thread.run_sync(self._layers.under, template.blank, template.folder)
            saved = replace(template.saved, layers=layers)
            self._verified[key] = template = replace(template, saved=saved, registries=registries)
            return template, cold

    async def by_key(self, key: str) -> Template:
        """One that was made before, by whatever version of us. Raises CorruptTemplate: it is gone, or not what it was."""
        await self._driver.version()
        if (known := self._verified.get(key)) is not None:
            return known
        for folder in (self._shared / key, self.own / key):
            if not folder.is_dir():
                continue
            try:
                await anyio.to_thread.run_sync(verify, folder)
                told = json.loads((folder / DESCRIPTION).read_text())
                kernel, initrd, system = (Path(told[name]) for name in ("kernel", "initrd", "system"))
                spec = MachineSpec(
                    *(kernel, initrd, system, told["vcpus"], told["memory_mib"]),
                    network=told["network"],
                    hardware=told.get("hardware", 1),
                )
                self._verified[key] = Template(
                    key,
                    folder,
                    Saved(
                        spec, folder / "memory", folder / "state", self._layers.under(folder / "blank.qcow2", folder)
                    ),
                    told["env"],
                    told["workdir"],
                    told["image"],
                    told["image_digest"],
                    told["guest"],
                    from_json(told["registries"]),
                )
            except (OSError, ValueError, KeyError, TypeError) as exc:
                raise CorruptTemplate(f"template {key} can't be read: {exc}") from exc
            return self._verified[key]
        raise CorruptTemplate(f"template {key} is not on this host any more")

    def forget(self, image: str) -> list[str]:
        """The image is gone: nothing new starts from its templates. Their keys; their files go with the next `sweep`."""
        keys = [key for key, template in self._verified.items() if template.image == image]
        for key in keys:
            del self._verified[key]
        return keys

    def sweep(self, images: Mapping[str, str]) -> None:
        """Remove the templates of snapshots that are gone or others now, and that no machine and no snapshot stands on.

        images: snapshots by name, with their digests.
        """
        while any(self._swept(folder, images) for folder in list(self._folders())):
            pass  # one that went may have been all that stood on another

    def clear(self) -> None:
        """Remove what servers that were killed have left half-made, here and in the shared cache. Only at start."""
        for dead in self.own.glob(".*"):
            inventory.remove_unfinished(dead)
        for dead in self._shared.glob(".*-*"):
            key = dead.name[1:].partition("-")[0]
            with _unlocked(dead.with_name(f"{key}.lock")) as nobody_builds:
                if nobody_builds:
                    inventory.remove_unfinished(dead)

    def _folders(self) -> Iterator[Path]:
        for folder in self.own.iterdir() if self.own.is_dir() else ():
            if folder.is_dir() and not folder.name.startswith("."):
                yield folder

    def _swept(self, folder: Path, images: Mapping[str, str]) -> bool:
        try:
            description = folder / DESCRIPTION
            told = json.loads(description.read_text())
            if description.stat().st_nlink > 1 or images.get(told["image"]) == told["image_digest"]:
                return False
        except (OSError, ValueError, KeyError):
            pass  # of no use to anybody
        self._verified.pop(folder.name, None)
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
        return True

    def registries(self, image: Image) -> tuple[Registry, ...]:
        """Those of an image that has been asked for them; none of others."""
        return self._registries.of(image.digest) or ()

    def _key(self, image: Image, vcpus: int, memory_mib: int) -> str:
        parts = [VERSION, self._driver.fingerprint(), self._guest.digest, image.digest, vcpus, memory_mib, str(WARM_UP)]
        parts += [self._network, self._trust.fingerprint(), ASKED, patience.RETRIES, patience.APT]
        if image.owner is not None:
            parts.append(image.name)
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]

    def _describe(self, key: str, image: Image, vcpus: int, memory_mib: int) -> Template:
        folder = (self._shared if image.owner is None else self.own) / key
        guest = self._guest
        spec = MachineSpec(guest.kernel, guest.initrd, guest.system, vcpus, memory_mib, network=self._network)
        saved = Saved(spec, folder / "memory", folder / "state", ())  # what it stands on is known once it is there
        return Template(key, folder, saved, dict(image.env), image.workdir, image.name, image.digest, guest.digest)

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
            await qemu_img("create", "-q", "-f", "qcow2", "-b", image.rootfs, "-F", image.format, disk)
            if image.owner is not None:
                await anyio.to_thread.run_sync(self._layers.share, image.owner, folder)
                await anyio.to_thread.run_sync(pin, image.owner, folder, BELOW)
            registries = await self._boot(template, image, disk, folder)
            size = str(image.size_bytes)
            blank = folder / "blank.qcow2"
            await qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", template.disk, "-F", "qcow2", blank, size)
            for leftover in folder.iterdir():
                if leftover.is_socket() or leftover.is_fifo():
                    leftover.unlink()
            await anyio.to_thread.run_sync(_seal, folder, template, registries)

    async def _boot(self, template: Template, image: Image, disk: Path, folder: Path) -> tuple[Registry, ...]:
        layers = await anyio.to_thread.run_sync(self._layers.under, disk, folder)
        saved = Saved(template.saved.spec, folder / "memory", folder / "state", layers)
        network = None if self._networks is None else await self._networks.make()
        try:
            tap = None if network is None else network.tap
            machine = await self._driver.boot(saved, disk, folder, tap=tap)
            return await self._furnish(machine, template, image, folder)
        finally:
            if network is not None:
                await network.aclose()

    async def _furnish(self, machine: Machine, template: Template, image: Image, folder: Path) -> tuple[Registry, ...]:
        """From power on to saved; the machine is closed. Returns: the image's package registries."""
        try:
            try:
                async with connected(await machine.dial()) as agent:
                    await agent.hello(self._boot_timeout_s)
                    await agent.configure({**patience.RETRIES, **template.env}, template.workdir)
                    trusted = await self._trust.install(agent)
                    registries = await self._ask_registries(agent, image)
                    for command in (patience.APT, *WARM_UP):
                        await agent.execute(command)
                    await agent.identify(identity.fresh(NOBODY, trusted))
                    await agent.rest()
                    await anyio.sleep(SETTLE_S)
                    await machine.pause()
                    await machine.save(folder / "state")
                    return registries
            except TimeoutError as exc:
                raise BootFailed(f"the guest did not come up within {self._boot_timeout_s:.0f} s") from exc
            except (GuestProtocolError, ExecutionError) as exc:
                raise BootFailed(f"the guest did not come up: {exc}") from exc
        except BaseException as exc:
            if isinstance(exc, BootFailed):
                with anyio.CancelScope(shield=True):
                    exc.console = await last_lines(machine)
                    exc.add_note(f"console of the guest:\n{exc.console}")
            raise
        finally:
            await machine.aclose()

    async def _ask_registries(self, agent: Agent, image: Image) -> tuple[Registry, ...]:
        known = self._registries.of(image.digest)
        if known is None:
            known = await ask(agent)
            self._registries.keep(image.digest, known)
        return known


def _registries(folder: Path) -> tuple[Registry, ...]:
    return from_json(json.loads((folder / "template.json").read_text())["registries"])


def verify(folder: Path) -> None:
    """Raises FileNotFoundError (not there) or CorruptTemplate (there, but not what was saved)."""
    try:
        recorded = json.loads((folder / DESCRIPTION).read_text())["sha256"]
        for name, known in recorded.items():
            if digest(folder / name) != known:
                raise CorruptTemplate(f"template {folder.name}: {name} is not what was saved")
    except FileNotFoundError:
        if folder.exists():
            raise CorruptTemplate(f"template {folder.name}: a file of it is missing") from None
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CorruptTemplate(f"template {folder.name}: its description can't be read: {exc}") from exc


def _seal(folder: Path, template: Template, registries: tuple[Registry, ...]) -> None:
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
        "kernel": str(spec.kernel),
        "initrd": str(spec.initrd),
        "system": str(spec.system),
        "env": template.env,
        "workdir": template.workdir,
        "image": template.image,
        "image_digest": template.image_digest,
        "guest": template.guest,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "network": spec.network,
        "hardware": spec.hardware,
        "registries": to_json(registries),
        "sha256": {name: digest(folder / name) for name in names},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))
    (folder / DESCRIPTION).chmod(0o400)


async def qemu_img(*arguments: str | Path) -> None:
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


@contextmanager
def _unlocked(path: Path) -> Iterator[bool]:
    """Whether nobody holds `path`; then we do, for as long as the block lasts."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
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
            inventory.remove_unfinished(dead)
        self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self._final.parent))
        return self._folder

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._folder is not None
        if kind is None:
            self._folder.rename(self._final)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)
