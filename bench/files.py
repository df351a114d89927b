"""Files through the whole stack: SDK, HTTP, control, node, agent, courier, and the server's memory while they pass.

    python bench/files.py [--mib 1024] [--memory 512] [--json FILE]

One sandbox, one file up and the same file down again, compared byte by byte. The server's peak is its resident memory as the
kernel counts it (VmHWM), beside what it was before the first byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from instavm import InstaVM
from instavm.bench import report
from instavm.bench.host import KEY, server
from instavm.settings import Settings

PIECE = 1 << 20


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


def memory_mib(name: str) -> float:
    """A line of the server's /proc/<pid>/status, in MiB."""
    status = Path(f"/proc/{Settings().server_lock.read_text().strip()}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return round(int(line.split()[1]) / 1024, 1)


def measured(mib: int, sandbox_mib: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, InstaVM(KEY, memory_mb=sandbox_mib, timeout=3600) as vm:
        there, back = Path(folder) / "there", Path(folder) / "back"
        digest = made(there, mib)
        vm.execute("1")
        before = memory_mib("VmRSS")
        began = time.perf_counter()
        vm.upload_file(there, "/app/big")
        up_s = time.perf_counter() - began
        inside = vm.execute("sha256sum < /app/big", language="bash", timeout=600).stdout.split()[0]
        began = time.perf_counter()
        vm.download_file("/app/big", back)
        down_s = time.perf_counter() - began
        assert inside == digest == digest_of(back), "the file changed on its way"
        return {
            "file_mib": mib,
            "sandbox_memory_mib": sandbox_mib,
            "upload_mib_per_s": round(mib / up_s, 1),
            "download_mib_per_s": round(mib / down_s, 1),
            "server_rss_before_mib": before,
            "server_peak_rss_mib": memory_mib("VmHWM"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--memory", type=int, default=512)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "files.json")
    asked = parser.parse_args()
    facts = report.machine()
    with server():
        results = measured(asked.mib, asked.memory)
    asked.json.write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n")
    for name, value in results.items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
