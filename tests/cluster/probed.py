"""What this host's probe has found, asked once for all tests: each state directory of its own would wait for it again.

Where /dev/kvm opens and boots nothing, that takes the whole deadline of the probe. A record of another boot, kernel or VMM
is not believed (`choose.recorded`), so what is kept here can be no older than the machine's last boot.
"""

from __future__ import annotations

import fcntl
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio

from instavm.node.vmm import choose
from instavm.settings import Settings


def tell(settings: Settings, state_dir: Path) -> None:
    """Put what the probe found into `state_dir`, which is made when it is not there, as a server would have left it."""
    if settings.driver == "firecracker" or settings.acceleration != "auto" or choose.closed() is not None:
        return  # none of them is probed
    home = settings.cache_dir / "tests" / "probe"
    home.mkdir(parents=True, exist_ok=True)
    asked = settings.model_copy(update={"state_dir": home})
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if choose.recorded(asked) is None:
            with ThreadPoolExecutor(1) as aside:  # a loop may run here already
                aside.submit(anyio.run, choose._remembered, asked).result()
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(home / choose.RECORD, state_dir / choose.RECORD)


def at(settings: Settings, state_dir: Path, **more) -> Settings:
    """The same settings with another state directory, and `more` changed; its servers need not probe the host."""
    tell(settings, state_dir)
    return settings.model_copy(update={**more, "state_dir": state_dir})
