"""Which session a client is bound to: what both clients have in common."""

from __future__ import annotations

from instavm.client.config import Config
from instavm.client.explain import explain
from instavm.client.results import Execution, SessionInfo
from instavm.errors import SessionError


def vm_of(info: SessionInfo) -> str:
    """Raises: SessionError, when the session has no sandbox yet."""
    if info["vm_id"] is None:
        raise SessionError(f"session {info['session_id']} has no sandbox yet: execute something first")
    return str(info["vm_id"])


class Binding:
    """`session_id` may be set to any session of the account; calls then go there."""

    session_id: str | None

    def __init__(self, config: Config) -> None:
        self._config = config
        self._over = False
        """No new session silently follows a killed one: what it held is lost, and the caller should know."""
        self.session_id = None

    def __repr__(self) -> str:
        where = self._config.base_url or "embedded"
        return f"<{type(self).__name__} session {self.session_id} at {where}>"

    @staticmethod
    def explain(result: Execution) -> str:
        """How `result` came to be, in one sentence, with what to do when something else than its own code ended it."""
        return explain(result)

    def _bound(self, session_id: str) -> str:
        self.session_id, self._over = session_id, False
        return session_id

    def _forget(self, session_id: str | None) -> None:
        """After a kill of `session_id`; None = of the bound one."""
        if session_id is None or session_id == self.session_id:
            self.session_id, self._over = None, True
