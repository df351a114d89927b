"""The version of the package, where every layer can read it."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
"""The same as in pyproject.toml; a test compares the two."""
