"""Files through the whole stack: SDK, HTTP, control, node, agent, courier, and the server's memory while they pass.

One sandbox, a file up and the same file down again, compared byte by byte: a middling one again and again, and once one that
is larger than the sandbox's memory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Final

from instavm.bench import memory, report
from instavm.bench.host import KEY, server
from instavm.bench.timing import took_ms
from instavm.client.sync import InstaVM

MIDDLING_MIB: Final = 64
LARGE_MIB: Final = 1024
PIECE: Final = 1 << 20
THERE: Final = "/app/big"


def measure(count: int, vcpus: int, memory_mib: int) -> report.Results:
    """Raises: as the client does; RuntimeError for a file that is another one afterwards."""
    up, down = [], []
    with server() as settings, InstaVM(KEY, cpu_count=vcpus, memory_mb=memory_mib, timeout=86_400) as vm:
        vm.execute("1")
        for _ in range(count):
            up_ms, down_ms = passed(vm, MIDDLING_MIB)
            up.append(up_ms)
            down.append(down_ms)
        with memory.peaks(settings) as found:
            up_ms, down_ms = passed(vm, LARGE_MIB)
    large = f"{LARGE_MIB} MiB, a sandbox of {memory_mib} MB"
    rates = {
        "up_mib_per_s": round(LARGE_MIB * 1000 / up_ms, 1),
        "down_mib_per_s": round(LARGE_MIB * 1000 / down_ms, 1),
    }
    return {
        f"upload of {MIDDLING_MIB} MiB": report.spread(up),
        f"download of {MIDDLING_MIB} MiB": report.spread(down),
        large: {**rates, "n": 1},
        f"{large}: memory of the server": {**found, "n": 1},
    }


def passed(vm: InstaVM, mib: int) -> tuple[float, float]:
    """Milliseconds that a file takes up, and down."""
    with tempfile.TemporaryDirectory(prefix="ivm-bench-") as folder:
        ours, back = Path(folder) / "ours", Path(folder) / "back"
        digest = made(ours, mib)
        up_ms = took_ms(partial(vm.upload_file, ours, THERE))
        inside = vm.execute(f"sha256sum < {THERE}", language="bash", timeout=600).stdout.split()[0]
        down_ms = took_ms(partial(vm.download_file, THERE, back))
        if not inside == digest == digest_of(back):
            raise RuntimeError(f"a file of {mib} MiB changed on its way")
    return up_ms, down_ms


def made(path: Path, mib: int) -> str:
    """A file of random bytes; its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(mib):
            piece = os.urandom(PIECE)
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
