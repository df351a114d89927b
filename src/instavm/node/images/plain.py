"""Layers compressed with zstd, made plain: neither umoci 0.4 nor Python's tarfile can read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import anyio

from instavm.errors import SnapshotError
from instavm.node.images import layout

ZSTD: Final = "+zstd"


async def make_plain(folder: Path, most_bytes: int, within: Sequence[str]) -> bool:
    """Rewrite the image of an OCI layout that has such layers. within: what to run zstd in. Returns: whether it had any.

    Raises SnapshotError: one can't be read, or all of them together are more than `most_bytes`.
    """
    index, manifest = layout.index(folder), layout.manifest(folder)
    blobs = folder / "blobs" / "sha256"
    found = [layer for layer in layout.layers(manifest) if str(layer.get("mediaType")).endswith(ZSTD)]
    unpacked: dict[str, tuple[str, int]] = {}
    for layer in found:
        packed = layout.blob(folder, layer.get("digest"))
        if packed.name not in unpacked:  # one layer may be there more than once
            unpacked[packed.name] = await _unpack(packed, blobs, most_bytes, within)
        digest, size = unpacked[packed.name]
        most_bytes -= size
        layer.update(mediaType=layer["mediaType"].removesuffix(ZSTD), digest=f"sha256:{digest}", size=size)
    for name in unpacked:
        (blobs / name).unlink(missing_ok=True)
    if found:
        body = json.dumps(manifest).encode()
        digest = hashlib.sha256(body).hexdigest()
        (blobs / digest).write_bytes(body)
        index["manifests"][0].update(digest=f"sha256:{digest}", size=len(body))
        (folder / "index.json").write_text(json.dumps(index))
    return bool(found)


async def _unpack(packed: Path, blobs: Path, most_bytes: int, within: Sequence[str]) -> tuple[str, int]:
    plain, total, size = blobs / "plain", hashlib.sha256(), 0
    with packed.open("rb") as source, plain.open("wb") as target:
        async with await anyio.open_process([*within, "zstd", "-dcq"], stdin=source) as zstd:
            assert zstd.stdout is not None
            assert zstd.stderr is not None
            async for chunk in zstd.stdout:
                total.update(chunk)
                size += target.write(chunk)
                if size > most_bytes:
                    zstd.kill()
                    raise SnapshotError("the image unpacks to more than its disk holds (build_args.disk_size_gb)")
            said = b"".join([words async for words in zstd.stderr])
            if await zstd.wait():
                raise SnapshotError(
                    f"a layer of the image can't be read: {said.decode(errors='replace').strip()[-300:]}"
                )
    digest = total.hexdigest()
    plain.rename(blobs / digest)
    return digest, size
