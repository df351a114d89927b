"""Runs in the rig: boots the templates of the sizes that it is called with (`2x512`: vCPUs, MiB), for later jobs to restore."""

import shutil
import sys
from pathlib import Path

import anyio

from instavm.node.runtime import Runtime
from instavm.settings import Settings


async def main():
    state = Path("/scratch/templates")
    async with Runtime.open(Settings(state_dir=state)) as node:
        for size in sys.argv[1:]:
            print(f"a template of {size}", flush=True)
            await node.prepare("default", *map(int, size.split("x")))
    shutil.rmtree(state)


anyio.run(main)
