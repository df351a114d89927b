"""Recipes: package lists, scripts and files that say what an image is made of, and digests over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from instavm.errors import HostNotReady


def recipe_dir(name: str) -> Path:
    """The folder of recipe `name`: beside this file if installed, else in `images/` of the checkout.

    Raises: HostNotReady when the installation lacks it.
    """
    here = Path(__file__).resolve()
    for base in (here.parent / "recipes", here.parents[4] / "images"):
        if (base / name / "packages.txt").is_file():
            return base / name
    raise HostNotReady(f"this installation has no recipe for the {name} image; install instavm again")


def packages(recipe: Path) -> list[str]:
    """The names in `packages.txt`: one a line, `#` starts a comment."""
    lines = (recipe / "packages.txt").read_text().splitlines()
    return [name for line in lines if (name := line.partition("#")[0].strip())]


def files(root: Path) -> Iterator[Path]:
    """Every file below `root` that belongs to a recipe or package, sorted; caches of Python are left out."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def tree_digest(root: Path) -> str:
    """sha256, as hex, over names, executable bits and bytes below `root`. Times and owners don't count."""
    total = hashlib.sha256()
    for path in files(root):
        executable = bool(path.stat().st_mode & 0o100)
        body = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root)}\0{executable}\0{body}\n".encode())
    return total.hexdigest()


def key(inputs: Mapping[str, object]) -> str:
    """The name under which a build with these inputs is kept: 32 hex digits."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
