"""What may hold a secret and has to be kept all the same is kept sealed: the database alone does not tell it."""

from __future__ import annotations

from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from instavm.private import write_key


class Seal:
    """Encrypts with a key of its own beside the database, made with mode 0600 when it is not there."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            write_key(path, Fernet.generate_key())
        self._fernet = Fernet(path.read_bytes())

    def close(self, text: str) -> str:
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str | None:
        """Returns: None, when it was sealed with another key."""
        try:
            return self._fernet.decrypt(sealed).decode()
        except InvalidToken:
            return None
