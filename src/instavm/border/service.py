"""The node's side: does what control asks, and tells what became of it. What control sends is checked."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import anyio
from anyio.abc import TaskGroup

from instavm.border.calls import ENDED, METHODS, Bytes, Callback, Method, dump_error, dumped, loaded
from instavm.border.flow import Receiving, Sending
from instavm.border.link import Kind, Link, linked
from instavm.contract.node import Node
from instavm.errors import InstaVMError, NetworkError

log = logging.getLogger(__name__)


async def serve(node: Node, end: socket.socket, signals: AsyncIterator[int] | None = None) -> None:
    """Serve `node` until control is gone. Its sandboxes stay as they are: control has ended those that shall end.

    signals: that ask the server to end; control is told, and decides.
    """
    async with anyio.create_task_group() as tasks:
        service = Service(node, tasks)
        service.link = link = await linked(end, service.take)
        node.on_end(lambda ended: link.send(Kind.ENDED, 0, dumped(ENDED, ended)))
        if signals is not None:
            tasks.start_soon(_pass_on, signals, link)
        try:
            await link.closed.wait()
            tasks.cancel_scope.cancel()
        finally:
            link.close()


async def _pass_on(signals: AsyncIterator[int], link: Link) -> None:
    async for number in signals:
        link.send(Kind.SIGNAL, 0, int(number))


class Call:
    """One that is under way."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.incoming: Receiving | None = None
        self.outgoing = Sending()


class Service:
    link: Link

    def __init__(self, node: Node, tasks: TaskGroup) -> None:
        self._node = node
        self._tasks = tasks
        self._calls: dict[int, Call] = {}

    def take(self, kind: Kind, number: int, body: Any) -> None:
        """Raises ValueError, TypeError: it is no message that control may send."""
        if kind is Kind.CALL:
            name, given = body
            if number in self._calls or name not in METHODS or not isinstance(given, dict):
                raise ValueError(f"call {number} of {str(name)[:40]}")
            call = self._calls[number] = Call()
            if any(isinstance(kind, Bytes) for kind in METHODS[name].parameters.values()):
                call.incoming = Receiving(lambda size: self.link.send(Kind.MORE, number, size))
            self._tasks.start_soon(self._run, number, call, METHODS[name], given, name=f"{name} {number}")
            return
        if kind is Kind.PING:
            self.link.send(Kind.PONG, number)
            return
        known = self._calls.get(number)
        if known is None:
            return  # it has ended, which control hears or has heard
        if kind is Kind.CANCEL:
            known.scope.cancel()
        elif kind is Kind.MORE:
            known.outgoing.more(int(body))
        elif kind is Kind.PIECE and known.incoming is not None:
            self._arrived(known.incoming, body)
        else:
            raise ValueError(f"kind {kind} from control")

    def _arrived(self, incoming: Receiving, piece: object) -> None:
        if isinstance(piece, bytes):
            incoming.put(piece)
        else:
            incoming.end(None if piece is True else NetworkError("what was being sent was broken off"))

    async def _run(self, number: int, call: Call, method: Method, given: dict[str, Any]) -> None:
        kind, told = Kind.ERROR, None
        try:
            with call.scope:
                told = await self._result(number, call, method, given)
                kind = Kind.RESULT
        except InstaVMError as exc:
            told = dump_error(exc)
        except Exception:
            log.exception("%s failed in a way that nobody foresaw", method.name)
            told = dump_error(InstaVMError(f"{method.name}: internal error of the node"))
        finally:
            del self._calls[number]
            self.link.send(kind, number, told)

    async def _result(self, number: int, call: Call, method: Method, given: dict[str, Any]) -> Any:
        arguments = {name: self._argument(number, call, method, name, value) for name, value in given.items()}
        asked = getattr(self._node, method.name)(**arguments)
        if not isinstance(method.returns, Bytes):
            return dumped(method.returns, await asked)
        async with aclosing(cast("AsyncGenerator[bytes, None]", asked)) as source:
            async for piece in call.outgoing.pieces(source):
                self.link.send(Kind.ITEM, number, piece)
        return None

    def _argument(self, number: int, call: Call, method: Method, name: str, value: Any) -> Any:
        """Raises ValueError."""
        parameter = method.parameters.get(name)
        if isinstance(parameter, Bytes):
            assert call.incoming is not None
            return aiter(call.incoming)
        if isinstance(parameter, Callback):
            if not value:
                return None
            return lambda *told: self.link.send(Kind.TOLD, number, (name, dumped(parameter, told)))
        if parameter is None:
            raise ValueError(f"{method.name} has no parameter {name[:40]}")
        return loaded(parameter, value)
