"""Layers compressed with zstd, made plain: neither umoci 0.4 nor Python's tarfile can read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import anyio

from instavm.errors import SnapshotError

ZSTD: Final = "+zstd"


async def make_plain(layout: Path, most_bytes: int, within: Sequence[str]) -> bool:
    """Rewrite the image of an OCI layout that has such layers. within: what to run zstd in. Returns: whether it had any.

    Raises SnapshotError: one can't be read, or all of them together are more than `most_bytes`.
    """
    index = json.loads((layout / "index.json").read_bytes())
    blobs = layout / "blobs" / "sha256"
    manifest = json.loads(_blob(blobs, index["manifests"][0]).read_bytes())
    found = [layer for layer in manifest["layers"] if str(layer.get("mediaType")).endswith(ZSTD)]
    for layer in found:
        packed = _blob(blobs, layer)
        digest, size = await _unpack(packed, blobs, most_bytes, within)
        most_bytes -= size
        packed.unlink(missing_ok=True)
        layer.update(mediaType=layer["mediaType"].removesuffix(ZSTD), digest=f"sha256:{digest}", size=size)
    if found:
        body = json.dumps(manifest).encode()
        digest = hashlib.sha256(body).hexdigest()
        (blobs / digest).write_bytes(body)
        index["manifests"][0].update(digest=f"sha256:{digest}", size=len(body))
        (layout / "index.json").write_text(json.dumps(index))
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


def _blob(blobs: Path, about: dict[str, Any]) -> Path:
    """What skopeo has just written there, and checked."""
    return blobs / str(about["digest"]).removeprefix("sha256:")
