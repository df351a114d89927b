"""The driver seam: how to get a machine, talk to it, save it and be rid of it. No more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from anyio.abc import ByteStream

from instavm.contract.isolation import Tier

HARDWARE = 2
"""The present revision of the virtual hardware. A state can only be loaded into a machine of the revision that it was saved on.

1: versions without a number in a template's description. Guests see the processor's virtualization extensions, and disks
take more kinds of requests. Such machines can still be restored; new ones are never made.
2: no virtualization extensions; disks that do no more than read, write, flush and discard.
"""


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """What a machine is made of. Machines with equal specs can be restored from each other's saved state."""

    kernel: Path
    initrd: Path
    system: Path
    """Read-only system image: the agent and the Python that runs it."""
    vcpus: int
    memory_mib: int
    network: bool = False
    """Whether it has a network device."""
    hardware: int = HARDWARE


@dataclass(frozen=True, slots=True)
class Saved:
    """A machine at rest: what `Machine.save` wrote and `Driver.prepare` reads. None of the files may change any more."""

    spec: MachineSpec
    memory: Path
    """Guest memory; sparse. Mapped copy-on-write, so that all who restore it share its pages."""
    state: Path
    """Devices and vCPUs, in the VMM's own format."""
    layers: tuple[Path, ...]
    """What its disks are overlays of, nearest first. A VMM reads these and no other files, whatever its disk says."""
    changes: Path | None = None
    """Pages that differ from `memory`, as `Machine.save_changes` wrote them; None = none do."""


class Machine(Protocol):
    @property
    def pid(self) -> int: ...

    @property
    def alive(self) -> bool:
        """Whether the VMM process is there."""
        ...

    async def dial(self) -> ByteStream:
        """Raw bytes to and from the guest's agent. One line at a time; dial again after it broke."""
        ...

    async def load(self, *, background: bool = False) -> None:
        """On a prepared machine, once: bring in the saved state and run. Raises BootFailed.

        background: only while nothing else wants the CPU, until `resume`.
        """
        ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def save(self, state: Path) -> None:
        """Write devices and vCPUs. Only while paused, only on a machine that was booted, not restored."""
        ...

    @property
    def over_memory(self) -> bool:
        """Whether the host ended it for using more memory than it may; known after `aclose`."""

    async def save_changes(self, memory: Path, state: Path, changes: Path) -> None:
        """Write devices and vCPUs, and the pages that are not those of `memory`, the file that it was restored from.

        Only while paused, only on a machine that was restored. It can go on afterwards. Raises BootFailed, OSError.
        """
        ...

    async def new_layer(self, layer: Path) -> None:
        """Write to `layer`, an empty overlay on the present root disk, from now on. What was the disk is complete and at rest.

        Paused or not. Raises BootFailed.
        """
        ...

    async def merge_layers(self, base: Path) -> None:
        """Copy into the uppermost layer what lies between it and `base`, while the guest runs. Raises BootFailed."""
        ...

    async def wait(self) -> int:
        """Until the VMM process is gone; its exit status, negative for a signal."""
        ...

    async def console(self) -> str:
        """The last the guest's kernel printed, for people who look for what went wrong; bounded."""
        ...

    async def aclose(self) -> None:
        """Kill, reap. Twice is fine. Leaves the machine's folder to its owner."""
        ...

    async def detach(self) -> None:
        """Let go of it without ending it; another server may adopt it."""
        ...


class Driver(Protocol):
    name: str
    tier: Tier

    async def version(self) -> str:
        """Raises HostNotReady when the VMM is missing or too old."""
        ...

    def close(self) -> None:
        """Give back what it holds for all machines. Those that run go on."""
        ...

    def fingerprint(self, hardware: int = HARDWARE) -> str:
        """Everything about this driver that a saved state of this revision of the hardware depends on."""
        ...

    def processor(self) -> str:
        """What a saved state depends on of the host's processor. On a host that tells another one it is refused."""
        ...

    async def boot(self, saved: Saved, disk: Path, home: Path, *, tap: int | None = None) -> Machine:
        """Power on what is to be saved as `saved`, whose memory file is made here, in `home` as `disk` (qcow2) is.

        tap: a descriptor that the VMM inherits: the other end of the network device, for a spec that has one.
        Raises BootFailed.
        """
        ...

    async def prepare(
        self, saved: Saved, disk: Path, home: Path, *, background: bool, tap: int | None = None
    ) -> Machine:
        """A VMM process that waits for `load`; nothing of the guest runs yet. `tap` as in `boot`. Raises BootFailed.

        background: it starts up only while nothing else wants the CPU, and gets its full share with `load`.
        """
        ...

    async def adopt(self, pid: int, home: Path) -> Machine:
        """A machine that an earlier server started in `home` and that runs as process `pid`. Raises BootFailed."""
        ...
