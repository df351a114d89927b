"""Runs in the rig: boots the templates of the sizes that it is called with (`2x512`: vCPUs, MiB), for later jobs to restore."""

import shutil
import sys
from pathlib import Path

import anyio

from instavm.node.images.store import ImageStore
from instavm.node.runtime import Runtime
from instavm.node.templates import Templates
from instavm.settings import Settings


async def main():
    settings = Settings(state_dir=Path("/scratch/templates"))
    images = ImageStore(settings.cache_dir, settings.disk_gib)
    async with Runtime.open(settings) as node:
        for size in sys.argv[1:]:
            print(f"a template of {size}", flush=True)
            await node.prepare("default", *map(int, size.split("x")))
        print("the one of the driver's own tests, which has no network", flush=True)
        await Templates(settings, node._driver, images.ensure_guest()).get(images.ensure_default(), 2, 512)
    shutil.rmtree(settings.state_dir)


anyio.run(main)
