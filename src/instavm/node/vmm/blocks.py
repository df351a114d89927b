"""A sandbox's disk in QEMU's words: an overlay in the machine's folder, on layers that are given as descriptors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path


def added(descriptors: Sequence[int]) -> list[str]:
    """Descriptors that files can be opened from: the first as `/dev/fdset/1`, and so on."""
    return [argument for number, fd in enumerate(descriptors, 1) for argument in ("-add-fd", f"fd={fd},set={number}")]


def root_drive(root: Path, layers: Sequence[Path], first_set: int) -> list[str]:
    """The drive `root`. Its layers are named here and not by the disk; the nearest is `/dev/fdset/<first_set>`."""
    backing = "".join(
        _layer(depth, layer, f"/dev/fdset/{first_set + depth - 1}", len(layers))
        for depth, layer in enumerate(layers, 1)
    )
    return [
        "-drive",
        f"if=none,id=root,driver=qcow2,file.driver=file,file.filename={root},cache=unsafe,discard=unmap,"
        f"detect-zeroes=unmap,werror=report{backing}",
    ]


def node(layer: Path) -> str:
    """What a layer is called in QEMU, which knows it by a descriptor and not by its path."""
    return "layer-" + hashlib.sha256(os.fsencode(layer)).hexdigest()[:24]


def _layer(depth: int, layer: Path, file: str, depths: int) -> str:
    """Options of one layer under the root disk; the deepest is a plain image, the others are overlays themselves."""
    at = ".".join(["backing"] * depth)
    kind = "raw" if depth == depths else "qcow2"
    name = f"{at}.node-name={node(layer)}"
    return f",{at}.driver={kind},{name},{at}.file.driver=file,{at}.file.filename={file},{at}.file.locking=off"
