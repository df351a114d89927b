"""What confines one sandbox, read from the kernel at this moment, and signed with this host's key.

Nothing in a report is remembered or assumed: a VMM that lost a part of its jail is reported without it, and `weaker` says in
words what it lacks.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from instavm.contract.host import NodeInfo
from instavm.contract.isolation import Isolation, Tier
from instavm.errors import HostNotReady, SessionEnded
from instavm.node import parts
from instavm.node.jail.bubblewrap import NAMESPACES
from instavm.node.jail.cgroups import CONTROLLERS, Cgroups
from instavm.node.network.guard import InForce
from instavm.node.parts import Part
from instavm.private import write_key
from instavm.wire.isolation import signed_bytes

KEY_FILE = "isolation.key"
CAPABILITIES = {
    "CapInh": "inheritable",
    "CapPrm": "permitted",
    "CapEff": "effective",
    "CapBnd": "bounding",
    "CapAmb": "ambient",
}
SECCOMP = {0: "off", 1: "strict", 2: "filter"}
LIMITS = ("Max core file size", "Max file size", "Max open files", "Max processes")


class Signer:
    """The host's key: made when it is first needed, mode 0600 in the state directory."""

    def __init__(self, state_dir: Path) -> None:
        """Raises HostNotReady: there is a key that can't be read."""
        path = state_dir / KEY_FILE
        try:
            self._key = _load(path) if path.exists() else _make(path)
        except (OSError, ValueError) as exc:
            raise HostNotReady(f"{path}: the key that signs isolation reports can't be used: {exc}") from exc

    @property
    def public_key(self) -> str:
        """PEM."""
        kind, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        return self._key.public_key().public_bytes(kind, form).decode()

    def sign(self, report: Mapping[str, Any]) -> Isolation:
        signature = base64.b64encode(self._key.sign(signed_bytes(report))).decode()
        return Isolation(report, signature, self.public_key)


def _load(path: Path) -> Ed25519PrivateKey:
    if path.stat().st_mode & 0o077:
        raise ValueError("others may read it; remove it, and a new one is made")
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("it is not an Ed25519 key")
    return key


def _make(path: Path) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_key(path, pem)
    return key


def report(
    vm_id: str,
    machine: str,
    pid: int,
    info: NodeInfo,
    jail: str,
    cgroups: Cgroups | None,
    egress: InForce | None,
    made_of: Sequence[Part] = (),
) -> dict[str, Any]:
    """What confines process `pid`, which runs `machine`. egress: None: it has no network.

    made_of: what there is to confine it with, whose known faults are told. Raises SessionEnded: it is gone."""
    try:
        process = _process(pid)
        groups = {} if cgroups is None else _groups(cgroups, machine, pid)
        process["control_groups"] = _member_of(pid)
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise SessionEnded(f"sandbox {vm_id} is not running") from exc
    told: dict[str, Any] = {
        "vm_id": vm_id,
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "tier": str(info.tier),
        "driver": info.driver,
        "driver_version": info.driver_version,
        "established_by": info.probe,
        "jail": jail,
        "process": process,
        "limits": groups,
        "egress": None if egress is None else asdict(egress),
    }
    told["parts"] = [part.told() for part in made_of]
    told["known_bad_as_of"] = parts.as_of()
    return {**told, "weaker": [*_weaker(told), *parts.worse(made_of)]}


def _process(pid: int) -> dict[str, Any]:
    place = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines() if ":\t" in line)
    return {
        "uid": sorted({int(one) for one in status["Uid"].split()}),
        "gid": sorted({int(one) for one in status["Gid"].split()}),
        "groups": [int(one) for one in status.get("Groups", "").split()],
        "capabilities": {name: status[line] for line, name in CAPABILITIES.items()},
        "no_new_privileges": status["NoNewPrivs"] == "1",
        "seccomp": SECCOMP.get(int(status["Seccomp"]), status["Seccomp"]),
        "seccomp_filters": int(status.get("Seccomp_filters", "0")),
        "namespaces": {name: _namespace(pid, name) for name in (*NAMESPACES, "user")},
        "mounts": [{"at": at, "writable": writable} for at, writable in _mounts(place)],
        "descriptors": [_descriptor(place, int(entry.name)) for entry in sorted((place / "fd").iterdir())],
        "limits": dict(_rlimits(place)),
    }


def _namespace(pid: int, name: str) -> dict[str, Any]:
    its = Path(f"/proc/{pid}/ns/{name}").readlink()
    return {"id": str(its), "own": its != Path(f"/proc/self/ns/{name}").readlink()}


def _mounts(place: Path) -> Iterator[tuple[str, bool]]:
    for line in (place / "mountinfo").read_text().splitlines():
        fields = line.split()
        yield fields[4], "rw" in fields[5].split(",")


def _descriptor(place: Path, fd: int) -> dict[str, Any]:
    """Names only: where on the host a file lies is nobody's business."""
    target = str((place / "fd" / str(fd)).readlink())
    flags = next(line for line in (place / "fdinfo" / str(fd)).read_text().splitlines() if line.startswith("flags:"))
    writable = int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    kind = "file" if target.startswith("/") else target.partition(":")[0]
    return {"fd": fd, "kind": kind, "name": Path(target).name if kind == "file" else "", "writable": writable}


def _rlimits(place: Path) -> Iterator[tuple[str, str]]:
    for line in (place / "limits").read_text().splitlines():
        for name in LIMITS:
            if line.startswith(name):
                yield name.removeprefix("Max "), line[len(name) :].split()[1]


def _groups(cgroups: Cgroups, machine: str, pid: int) -> dict[str, Any]:
    """Where its limits are, whether it is in there, and what they are."""
    places = cgroups.paths(machine)
    inside = [name for name, place in places.items() if str(pid) in (Path(place) / "cgroup.procs").read_text().split()]
    return {"at": places, "inside": inside, "set_to": cgroups.read(machine)}


def _member_of(pid: int) -> dict[str, str]:
    """Controllers of a tree → the group of the process in it."""
    lines = (line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    return {names or "unified": group for _, names, group in lines}


def _held(process: Mapping[str, Any]) -> Iterator[str]:
    """The bounding set says what a program could gain by starting others; without new privileges that is nothing."""
    for name, value in process["capabilities"].items():
        if name != "bounding" or not process["no_new_privileges"]:
            yield value


def _weaker(told: Mapping[str, Any]) -> Iterator[str]:
    """In words, what this sandbox lacks of what a host of ours can give."""
    process = told["process"]
    if told["tier"] != Tier.KVM:
        yield "the guest runs on an emulator, whose authors do not call it a security boundary by itself"
    if told["jail"] != "on":
        yield "INSTAVM_JAIL=off: the VMM is not confined and has all the rights of its server"
    if process["uid"] == [os.getuid()]:
        yield "the VMM has no uid of its own: it runs as its server's user"
    if any(int(value, 16) for value in _held(process)):
        yield "the VMM has capabilities"
    if process["seccomp"] != "filter" or not process["no_new_privileges"]:
        yield "the VMM's system calls are not filtered, or it may gain privileges"
    shared = [name for name in NAMESPACES if not process["namespaces"][name]["own"]]
    if shared:
        yield f"the VMM shares namespaces with its host: {', '.join(shared)}"
    if told["egress"] is not None and not told["egress"]["kernel_rules"]:
        yield "the kernel's egress rules were removed: only the filter decides what this sandbox reaches"
    missing = [name for name in CONTROLLERS if name not in told["limits"].get("at", {})]
    if missing:
        yield f"no control group limits of: {', '.join(missing)}"
    out = sorted(set(told["limits"].get("at", {})) - set(told["limits"].get("inside", [])))
    if out:
        yield f"the VMM is not in its control groups of: {', '.join(out)}"
