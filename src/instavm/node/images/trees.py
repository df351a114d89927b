"""Small changes to the tree of an image before it becomes a disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from instavm.node.images import recipes


def remove(tree: Path, patterns: Iterable[str]) -> None:
    """Remove what the glob patterns, relative to `tree`, match, never through a link: it may lead outside."""
    tree = tree.resolve()
    for pattern in patterns:
        for path in list(tree.glob(pattern)):
            if path.parent.resolve() != path.parent:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def copy(source: Path, tree: Path) -> None:
    """Copy the files below `source` over `tree`: ours, 0644, or 0755 if executable; links are replaced."""
    for path in recipes.files(source):
        target = tree / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_bytes(path.read_bytes())
        target.chmod(0o755 if os.access(path, os.X_OK) else 0o644)
