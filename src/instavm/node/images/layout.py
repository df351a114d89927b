"""An OCI layout that skopeo has written, as an image of a stranger: what is in it is checked before it is used."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, Literal, cast

from instavm.errors import SnapshotError

LAYERS_MAX: Final = 1000
_READERS: Final[dict[bytes, Callable[[Path, Literal["rb"]], object]]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


def parsed(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises SnapshotError."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise SnapshotError("the image's description can't be read")
    return told


def objects(value: object, what: str) -> list[dict[str, Any]]:
    """A list of JSON objects. Raises SnapshotError."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise SnapshotError(f"the image's list of {what} can't be read")
    return value


def index(layout: Path) -> dict[str, Any]:
    """Raises SnapshotError."""
    told = parsed((layout / "index.json").read_bytes())
    if not objects(told.get("manifests"), "manifests"):
        raise SnapshotError("the image has no manifest")
    return told


def manifest(layout: Path) -> dict[str, Any]:
    """The first image's. Raises SnapshotError."""
    return parsed(blob(layout, index(layout)["manifests"][0].get("digest")).read_bytes())


def layers(described: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a manifest. Raises SnapshotError: there are none, or too many."""
    found = objects(described.get("layers"), "layers")
    if not found:
        raise SnapshotError("the image has no layers, so there is nothing to start from")
    if len(found) > LAYERS_MAX:
        raise SnapshotError(f"the image has {len(found)} layers; at most {LAYERS_MAX} are taken")
    return found


def blob(layout: Path, digest: object) -> Path:
    """Raises SnapshotError: it is not there, or the name is none."""
    kind, _, name = str(digest).partition(":")
    if kind != "sha256" or len(name) != 64 or not name.isalnum():
        raise SnapshotError(f"the image has a digest that can't be read: {str(digest)[:100]!r}")
    path = layout / "blobs" / kind / name
    try:
        plain = stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        raise SnapshotError(f"the image lacks {digest}") from None
    if not plain:
        raise SnapshotError("the image's layout has something else than files in it")
    return path


def opened(layer: Path) -> IO[bytes]:
    """A layer's tar archive, all of it: one compressed in several pieces is read to its very end, as umoci does.

    (`tarfile` itself stops behind the first piece, and would let through what comes in the second one.) Raises OSError.
    """
    with layer.open("rb") as file:
        start = file.read(6)
    reader = next((reader for magic, reader in _READERS.items() if start.startswith(magic)), None)
    return layer.open("rb") if reader is None else cast(IO[bytes], reader(layer, "rb"))
