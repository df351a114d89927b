"""One settings object. Only entry points build it; everyone else is handed what they need."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import platformdirs
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from instavm.errors import HostNotReady, InvalidInput

CLIENT_ONLY: Final[Mapping[str, str]] = {
    "INSTAVM_BASE_URL": "Address of the server that the SDK and the command line use; without it they start one of their own.",
    "INSTAVM_API_KEY": "Key that the command line sends.",
}
"""Variables that clients read and a server ignores, each with its meaning."""
SECRET: Final = frozenset({"egress_proxy"})
"""Settings that may hold a password."""
FOR_TESTS: Final = "INSTAVM_TEST_"
"""Prefix of variables that only the project's tests read."""


def _root() -> bool:
    return os.geteuid() == 0


def _state_dir() -> Path:
    return Path("/var/lib/instavm") if _root() else Path(platformdirs.user_state_dir("instavm"))


def _cache_dir() -> Path:
    return Path("/var/cache/instavm") if _root() else Path(platformdirs.user_cache_dir("instavm"))


def _runtime_dir() -> Path:
    return Path("/run/instavm") if _root() else Path(platformdirs.user_runtime_dir("instavm"))


class Places(BaseSettings):
    """Where things lie: all that a client needs to find its server. Read from `INSTAVM_*` in the environment."""

    model_config = SettingsConfigDict(env_prefix="INSTAVM_", frozen=True, extra="ignore")

    cache_dir: Path = Field(default_factory=_cache_dir)
    """Images and kernels: can be made again, worth keeping between runs. By default `/var/cache/instavm` for root, else a folder
    in the user's cache directory."""
    state_dir: Path = Field(default_factory=_state_dir)
    """Database, templates and running sandboxes. Root (or the user) only, mode 0700. By default `/var/lib/instavm` for root, else
    a folder in the user's state directory."""
    runtime_dir: Path = Field(default_factory=_runtime_dir)
    """Sockets. Mode 0700. By default `/run/instavm` for root, else a folder in the user's runtime directory."""

    def __init__(self, **given: Any) -> None:
        """Raises InvalidInput: a value is refused. It names the variable."""
        try:
            super().__init__(**given)
        except ValidationError as exc:
            problem = exc.errors(include_url=False)[0]
            name = str(problem["loc"][0])
            shown = "(not shown)" if name in SECRET else problem["input"]
            allowed = problem["msg"].removeprefix("Input should be ")
            raise InvalidInput(f"INSTAVM_{name.upper()}", shown, allowed) from None
        except SettingsError as exc:  # it names the field in its text alone
            name = f"INSTAVM_{str(exc).split(chr(34))[1].upper()}"
            raise InvalidInput(name, os.environ.get(name), "a list in JSON, such as [\"…\"]") from None

    @field_validator("cache_dir", "state_dir", "runtime_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def socket(self) -> Path:
        """Where the embedded server listens."""
        return self.runtime_dir / "server.sock"

    @property
    def start_lock(self) -> Path:
        """Held while the embedded server is started or ends, so that two programs never start two."""
        return self.runtime_dir / "start.lock"

    @property
    def server_lock(self) -> Path:
        """Held by the one server that uses `state_dir`."""
        return self.state_dir / "server.lock"

    @property
    def control_dir(self) -> Path:
        """Everything that control's process writes; the rest of `state_dir` is the node's."""
        return self.state_dir / "control"

    @property
    def database(self) -> Path:
        return self.control_dir / "control.db"

    @property
    def server_log(self) -> Path:
        """Log of the embedded server: its node's."""
        return self.state_dir / "server.log"

    @property
    def control_log(self) -> Path:
        """Log of the embedded server: its API's."""
        return self.control_dir / "control.log"


class Settings(Places):
    """All that a server can be told in `INSTAVM_*`. Times are seconds, sizes MiB, unless a name says more."""

    driver: Literal["auto", "qemu", "firecracker"] = "auto"
    """`auto`: Firecracker where it is installed and a guest boots on it, else QEMU."""
    firecracker: Path | None = None
    """The program; None = as found in PATH. Its jailer lies beside it."""
    known_bad_vmm: Literal["refuse", "allow"] = "refuse"
    """`allow`: use a Firecracker with a known hole all the same; every isolation report then names the hole."""
    firecracker_cpu_template: str | None = Field(None, pattern=r"^(T2|T2S|T2CL|T2A|C3|V1N1|/.+)$")
    """What Firecracker's guests see of the processor, so that suspended sandboxes resume on hosts with another one of the same
    maker: the name of a template of Firecracker's own, or the path of one in JSON. None = the host's own processor."""
    acceleration: Literal["auto", "kvm", "tcg"] = "auto"
    """Of QEMU. `auto` boots a small guest under KVM once, with a deadline, and remembers whether it came up."""
    probe_timeout_s: float = Field(8.0, gt=0)
    """That deadline. Hardware virtualisation needs well under a second; what takes longer is not what a sandbox should run on."""

    huge_pages: Literal["on", "off"] = "off"
    """`on`: guest memory in pages of 2 MiB out of the kernel's pool (`vm.nr_hugepages`), of which each sandbox reserves as many
    as its memory has (sizes of an odd number of MiB stay with small ones). QEMU only: Firecracker is not considered."""

    jail: Literal["on", "off"] = "on"
    """`off`: VMMs and the API run as the server's own user with all its rights. Only for a host that can't do better."""
    jail_uid_first: int = Field(1_950_000_000, ge=1000, lt=1 << 31)
    """The first of the uids that VMMs run under; no person or service of this host may have one of them."""
    jail_uid_count: int = Field(65_536, ge=1, le=1 << 24)
    """How many there are; each running VMM takes one."""
    io_mib_per_s: int = Field(256, ge=1)
    """What one sandbox may read, and what it may write, of the host's disk. (Pages that the host still holds in memory
    count for neither.)"""
    io_operations_per_s: int = Field(16_384, ge=16)
    """The same in operations."""

    boot_timeout_s: float = Field(120.0, gt=0)
    """VMM started → agent's hello, when a template is booted cold."""
    restore_timeout_s: float = Field(20.0, gt=0)
    """VMM started → sandbox ready, when a template is restored."""
    spare_machines: int = Field(2, ge=0, le=64)
    """Empty VMM processes (with overlay and sockets, no guest memory loaded) kept ready per template in use. 0 = none."""
    spare_machines_max: int = Field(16, ge=0, le=256)
    """As many as were asked for within the last minute are kept ready, but no more than this; each costs about 20 MiB."""
    warm_machines: int = Field(0, ge=0, le=256)
    """At most so many sandboxes kept restored, warmed up and paused, of all templates together; how many there are
    follows the demand. 0 = none, which is right for small hosts: each costs about 64 MiB and a second of CPU time."""
    warm_memory_mib: int = Field(2048, ge=0)
    """Memory that warm machines may take together."""
    disk_gib: int = Field(10, ge=1, le=1024)
    """Size of a sandbox's root disk as the guest sees it; blocks are only used when written."""

    egress_default: Literal["deny", "packages"] = "deny"
    """What a sandbox may reach for which no policy was set: nothing, or the package registries of its image."""
    egress_package_hosts: tuple[str, ...] = ()
    """Package registries besides those that the image's package managers are set up for: JSON list of `host` or
    `host:port`. These, since you name them, may be in a private network."""
    egress_dns: tuple[str, ...] = ()
    """Who is asked for allowed names: JSON list of addresses, `address` or `address:port`. Empty = as this host does."""
    egress_proxy: str | None = Field(None, pattern=r"^http://[^/\s]+/?$")
    """HTTP proxy through which sandboxes reach allowed names and public addresses: `http://[user:password@]host:port`.
    It then looks the names up, so what they resolve to is its business."""
    egress_ca_file: Path | None = Path("/etc/ssl/certs/ca-certificates.crt")
    """Certificates (PEM) that sandboxes trust besides their image's own."""
    egress_connections: int = Field(256, ge=1, le=4096)
    """Open connections of one sandbox; more are refused."""
    egress_mbit_per_s: float | None = Field(None, gt=0)
    """What one sandbox may send, and what it may receive, in megabits per second. None = no limit."""

    quota_sandboxes: int | None = Field(100, ge=0)
    """How many sandboxes a tenant without a quota of its own may have at one time. This and the next four hold for
    `serve`; the embedded server serves one user and has only the host's limits."""
    quota_vcpus: int | None = Field(None, ge=0)
    """How many vCPUs its sandboxes may have together. None = no limit."""
    quota_memory_mib: int | None = Field(None, ge=0)
    """How much memory its sandboxes may have together. None = no limit."""
    quota_lifetime_s: int | None = Field(30 * 86_400, ge=20)
    """The longest lifetime of one of its sandboxes."""
    quota_disk_mib: int | None = Field(50_000, ge=0)
    """What a tenant's snapshots and suspended sandboxes may take on the host's disk together."""
    memory_overcommit: float = Field(1.0, gt=0, le=16)
    """How often the host's memory (less the reserve) may be promised to sandboxes. With 1, every sandbox can use all of
    its memory at the same time as all others; more is more sandboxes and a bet that they won't."""
    memory_reserve_mib: int = Field(1024, ge=0)
    """Memory of the host that is never promised: for the server, the VMMs themselves and everybody else."""
    requests_per_s: float = Field(100.0, gt=0)
    """Per API key, on average; `requests_burst` of them may come at once. Not on a private socket."""
    requests_burst: int = Field(300, ge=1)
    """How many requests of one API key may come at once."""
    on_shutdown: Literal["stop", "leave"] = "stop"
    """What `serve` does with its sandboxes when it is told to end: end them too, or leave them to the next server on the
    same state directory. The embedded server always ends them."""

    idle_exit_s: float = Field(300.0, gt=0)
    """The embedded server ends after so long without a client and without a sandbox."""

    def model_post_init(self, _: Any) -> None:
        """Raises HostNotReady: a variable of the environment is misspelt, or of another version."""
        refuse_unknown(os.environ)

    def environment(self) -> dict[str, str]:
        """Variables from which another process makes the same settings, but for what is none of its business."""
        told = self.model_dump(mode="json", exclude=set(SECRET), exclude_none=True)
        return {
            f"INSTAVM_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
            for name, value in told.items()
        }


def refuse_unknown(environment: Mapping[str, str]) -> None:
    """Raises HostNotReady for the first name that looks like a setting and is none."""
    known = {f"INSTAVM_{name.upper()}" for name in Settings.model_fields} | CLIENT_ONLY.keys()
    for name in sorted(environment):
        if name.startswith("INSTAVM_") and name not in known and not name.startswith(FOR_TESTS):
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else "docs/settings.md lists them."
            raise HostNotReady(f"{name}: there is no such setting; {hint}")
