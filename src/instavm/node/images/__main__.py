"""`python -m instavm.node.images`: make all that sandboxes boot from. Run again, it says what is there."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Final, TypeVar

from rich.console import Console
from rich.markup import escape

from instavm.errors import InstaVMError
from instavm.node.images.store import GuestBase, Image, ImageStore
from instavm.node.images.workshop import Progress
from instavm.settings import Settings

_HEARTBEAT_S: Final = 15.0
"""Where there is no terminal to redraw: how often a running stage says what it is at."""

Result = TypeVar("Result")


def main() -> int:
    """Exit status: 0 all there, 1 something could not be made (said on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m instavm.node.images", description=__doc__)
    parser.add_argument("--only", choices=("guest", "default"), help="make this and nothing else")
    parser.add_argument("--json", action="store_true", help="print paths and digests to stdout")
    asked = parser.parse_args()
    settings = Settings()
    store = ImageStore(settings.cache_dir, settings.disk_gib)
    console = Console(stderr=True, highlight=False)
    made: dict[str, object] = {}
    try:
        if asked.only != "default":
            stage(console, "kernel", store.ensure_kernel, lambda kernel: f"Linux {kernel.version}")
            made["guest"] = stage(console, "guest base", store.ensure_guest, _guest)
        if asked.only != "guest":
            made["default"] = stage(console, "default image", store.ensure_default, _image)
    except InstaVMError as exc:
        console.print(f"[red]✗[/] {escape(str(exc))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; nothing unfinished is kept")
        return 130
    if asked.json:
        json.dump(made, sys.stdout, default=_plain, indent=2)
        sys.stdout.write("\n")
    return 0


def stage(console: Console, name: str, make: Callable[[Progress], Result], describe: Callable[[Result], str]) -> Result:
    """Run one step with a live line of what it is at, then one line of what came of it."""
    began = said = time.monotonic()
    with console.status(f"{name} …") as live:

        def progress(line: str) -> None:
            nonlocal said
            if console.is_terminal:
                live.update(f"{name}: {escape(line[: max(20, console.width - len(name) - 6)])}")
            elif time.monotonic() - said > _HEARTBEAT_S:
                said = time.monotonic()
                console.print(f"  {name}, {said - began:.0f} s: {escape(line)}", soft_wrap=True)

        result = make(progress)
    took = time.monotonic() - began
    console.print(
        f"[green]✓[/] {name}: {escape(describe(result))}" + (f" ({took:.0f} s)" if took >= 1 else ""),
        soft_wrap=True,
    )
    return result


def _guest(base: GuestBase) -> str:
    return f"system image of {base.system.stat().st_size >> 20} MiB, {base.digest[:12]}"


def _image(image: Image) -> str:
    return f"{image.used_bytes / 2**30:.1f} GiB of {image.size_bytes >> 30}, {image.digest[:12]}"


def _plain(value: object) -> object:
    if isinstance(value, GuestBase | Image):
        return {name: getattr(value, name) for name in value.__slots__}
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
