"""Everything static that a guest boots from: made from Debian's packages, cached by content.

store.py      what others call: `ImageStore`
recipes.py    where package lists and scripts are, and digests over them
shelf.py      a folder of finished builds: locked, atomic, cleaned up after killed builders
workshop.py   runs the tools of a build so that they die with it
archive.py    the host's Debian sources and apt settings
kernel.py initramfs.py system.py rootfs.py    the four things that are built
"""

from __future__ import annotations

from instavm.node.images.kernel import Kernel
from instavm.node.images.store import GuestBase, Image, ImageStore
from instavm.node.images.workshop import Progress, silent

__all__ = ["GuestBase", "Image", "ImageStore", "Kernel", "Progress", "silent"]
