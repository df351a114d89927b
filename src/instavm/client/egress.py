"""`vm.egress`: what a sandbox may reach."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Unpack

from instavm.client.calls import egress
from instavm.client.calls.egress import Policy
from instavm.client.results import EgressCheck, EgressLog, EgressPolicy
from instavm.client.transport import AsyncLink, Link


class Egress:
    """`vm.egress`: what sandboxes may reach, and where they went."""

    def __init__(self, link: Link, session: Callable[[], str]) -> None:
        self._link = link
        self._session = session

    def set_session(self, session_id: str | None = None, **policy: Unpack[Policy]) -> EgressPolicy:
        """What the session's sandbox may reach, and those that follow it; in force when this returns.

        allow_package_managers: the registries that the image's pip, npm and apt are set up for.
        allowed_domains: names, and `*.name` for all below one. allowed_cidrs: address ranges, any port.
        allow_http, allow_https: with nothing listed, ports 80 and 443 of every public address; else on which of the two
            ports the listed names are reached (both, when neither flag is set).
        The flags are True unless given, so without arguments this opens the web.
        Raises: InvalidInput; SessionNotFound, SessionEnded; HostNotReady (a server that cannot give sandboxes a network).
        """
        return self._link.send(egress.put("session", session_id or self._session(), policy))

    def get_session(self, session_id: str | None = None) -> EgressPolicy:
        """What is really in force for the session; by default nothing may be reached."""
        return self._link.send(egress.get("session", session_id or self._session()))

    def set_vm(self, vm_id: str, **policy: Unpack[Policy]) -> EgressPolicy:
        """The same for one sandbox; one that follows it in its session reaches what is set for the session."""
        return self._link.send(egress.put("vm", vm_id, policy))

    def get_vm(self, vm_id: str) -> EgressPolicy:
        """What is really in force for one sandbox."""
        return self._link.send(egress.get("vm", vm_id))

    def check(
        self,
        host: str,
        port: int = 443,
        *,
        protocol: str = "tcp",
        session_id: str | None = None,
        vm_id: str | None = None,
        policy: Policy | None = None,
    ) -> EgressCheck:
        """Whether the sandbox may reach `host`, by which rule where that rule comes from, and what to do if not.

        The filter decides, as it does for a connection; nothing is connected to. A name is looked up if it is allowed.
        protocol: "tcp" or "udp". policy: decide by this one instead (arguments of `set_session`), which is not set by that.
        Returns: `allowed`, `rule`, `source`, `detail`, `remedy` and more, see `EgressCheck`.
        Raises: InvalidInput; SessionNotFound, SessionEnded; HostNotReady.
        """
        if vm_id is not None:
            return self._link.send(egress.check("vm", vm_id, host, port, protocol, policy))
        return self._link.send(egress.check("session", session_id or self._session(), host, port, protocol, policy))

    def log(self, session_id: str | None = None, *, vm_id: str | None = None) -> EgressLog:
        """Where the sandbox went or tried to, by which rule, and how often: bounded, and gone with the sandbox."""
        if vm_id is not None:
            return self._link.send(egress.log("vm", vm_id))
        return self._link.send(egress.log("session", session_id or self._session()))


class AsyncEgress:
    """The same for `AsyncInstaVM`."""

    def __init__(self, link: AsyncLink, session: Callable[[], Awaitable[str]]) -> None:
        self._link = link
        self._session = session

    async def set_session(self, session_id: str | None = None, **policy: Unpack[Policy]) -> EgressPolicy:
        """As `Egress.set_session`."""
        return await self._link.send(egress.put("session", session_id or await self._session(), policy))

    async def get_session(self, session_id: str | None = None) -> EgressPolicy:
        """As `Egress.get_session`."""
        return await self._link.send(egress.get("session", session_id or await self._session()))

    async def set_vm(self, vm_id: str, **policy: Unpack[Policy]) -> EgressPolicy:
        """As `Egress.set_vm`."""
        return await self._link.send(egress.put("vm", vm_id, policy))

    async def get_vm(self, vm_id: str) -> EgressPolicy:
        """As `Egress.get_vm`."""
        return await self._link.send(egress.get("vm", vm_id))

    async def check(
        self,
        host: str,
        port: int = 443,
        *,
        protocol: str = "tcp",
        session_id: str | None = None,
        vm_id: str | None = None,
        policy: Policy | None = None,
    ) -> EgressCheck:
        """As `Egress.check`."""
        if vm_id is not None:
            return await self._link.send(egress.check("vm", vm_id, host, port, protocol, policy))
        target = session_id or await self._session()
        return await self._link.send(egress.check("session", target, host, port, protocol, policy))

    async def log(self, session_id: str | None = None, *, vm_id: str | None = None) -> EgressLog:
        """As `Egress.log`."""
        if vm_id is not None:
            return await self._link.send(egress.log("vm", vm_id))
        return await self._link.send(egress.log("session", session_id or await self._session()))
