"""One settings object. Only entry points build it; everyone else is handed what they need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def _root() -> bool:
    return os.geteuid() == 0


def _state_dir() -> Path:
    return Path("/var/lib/instavm") if _root() else Path(platformdirs.user_state_dir("instavm"))


def _cache_dir() -> Path:
    return Path("/var/cache/instavm") if _root() else Path(platformdirs.user_cache_dir("instavm"))


def _runtime_dir() -> Path:
    return Path("/run/instavm") if _root() else Path(platformdirs.user_runtime_dir("instavm"))


class Settings(BaseSettings):
    """Read from `INSTAVM_*` in the environment. Times are seconds, sizes MiB, unless a name says more."""

    model_config = SettingsConfigDict(env_prefix="INSTAVM_", frozen=True, extra="ignore")

    cache_dir: Path = Field(default_factory=_cache_dir)
    """Images and kernels: can be made again, worth keeping between runs."""
    state_dir: Path = Field(default_factory=_state_dir)
    """Database, templates and running sandboxes. Root (or the user) only, mode 0700."""
    runtime_dir: Path = Field(default_factory=_runtime_dir)
    """Sockets. Mode 0700."""

    driver: Literal["auto", "qemu"] = "auto"
    acceleration: Literal["auto", "kvm", "tcg"] = "auto"
    """`auto` boots a small guest under KVM once, with a deadline, and remembers whether it came up."""

    boot_timeout_s: float = Field(120.0, gt=0)
    """VMM started → agent's hello, when a template is booted cold."""
    restore_timeout_s: float = Field(20.0, gt=0)
    """VMM started → sandbox ready, when a template is restored."""
    spare_machines: int = Field(2, ge=0, le=64)
    """Empty VMM processes (with overlay and sockets, no guest memory loaded) kept ready per template in use.
    """
    disk_gib: int = Field(10, ge=1, le=1024)
    """Size of a sandbox's root disk as the guest sees it; blocks are only used when written."""

    idle_exit_s: float = Field(300.0, gt=0)
    """The embedded server ends after so long without a client and without a sandbox."""

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
    def database(self) -> Path:
        return self.state_dir / "control.db"

    @property
    def server_log(self) -> Path:
        """Log of the embedded server."""
        return self.state_dir / "server.log"
