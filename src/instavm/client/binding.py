"""Which session a client is bound to: what both clients have in common."""

from __future__ import annotations

import os
from typing import Self

from instavm.client import forks
from instavm.client.config import Config
from instavm.client.explain import explain
from instavm.client.results import Execution, SessionInfo
from instavm.errors import SessionEnded, SessionError


def vm_of(info: SessionInfo) -> str:
    """Raises: SessionError, when the session has no sandbox yet."""
    if info["vm_id"] is None:
        raise SessionError(f"session {info['session_id']} has no sandbox yet: execute something first")
    return str(info["vm_id"])


class Binding:
    """`session_id` may be set to any session of the account; calls then go there."""

    session_id: str | None

    def _build(self, config: Config) -> None:
        """All that a client consists of. Both clients, and the copies that they make of themselves, are built here."""
        self._config = config
        self._over = False
        """No new session silently follows a killed one: what it held is lost, and the caller should know."""
        self.session_id = None
        self._owner = os.getpid()
        """The process whose leaving of the `with` block ends the sandbox."""
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        """In a forked process: no thread of the parent holds a lock here."""
        raise NotImplementedError

    def _copy(self, session_id: str) -> Self:
        """A client of another session, with whatever a subclass has added to this one."""
        copy = type(self).__new__(type(self))
        vars(copy).update(vars(self))
        copy._build(self._config)
        copy._bound(session_id)
        return copy

    def _own(self) -> None:
        self._owner = os.getpid()

    @property
    def _is_own(self) -> bool:
        return self._owner == os.getpid()

    def _known_session(self) -> str | None:
        """None = there is none yet. Raises: SessionEnded, after its end."""
        if self.session_id is None and self._over:
            raise SessionEnded("this client's session was killed; start_session() makes a new one")
        return self.session_id

    def __repr__(self) -> str:
        where = self._config.base_url or "embedded"
        return f"<{type(self).__name__} session {self.session_id} at {where}>"

    @staticmethod
    def explain(result: Execution) -> str:
        """How `result` came to be, in one sentence, with what to do when something else than its own code ended it."""
        return explain(result)

    def _bound(self, session_id: str) -> str:
        self.session_id, self._over = session_id, False
        self._own()
        return session_id

    def _forget(self, session_id: str | None) -> None:
        """After a kill of `session_id`; None = of the bound one."""
        if session_id is None or session_id == self.session_id:
            self.session_id, self._over = None, True
