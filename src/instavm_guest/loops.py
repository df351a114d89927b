"""The event loop of cells: the one on which `await` at the top of a cell waits. Runs in the image's Python, see worker.py.

A cell without `await` runs beside the loop, not on it: so `asyncio.run()` works there as in a program. What such a cell gives
to the loop (`asyncio.create_task`) begins when the cell has ended, or when a cell awaits something.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from contextvars import copy_context
from typing import Any

CONTEXTS = sys.version_info >= (3, 11)
"""Whether a task can be given the context that it runs in; before that it always gets a copy."""


class Loops:
    def __init__(self, space: Any) -> None:
        self._space = space
        self._loop: Any = None
        self._main = threading.get_ident()

    def own(self) -> Any:
        """The loop of this interpreter; a new one when a cell has closed it."""
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        return self._loop

    def take(self) -> None:
        """Let asyncio find this loop also where none is running: in the cell itself, and after `asyncio.run`."""
        events = asyncio.events
        set_loop: Any = events.set_event_loop

        def get_running_loop() -> Any:
            running = events._get_running_loop()
            if running is not None:
                return running
            if not self._space.running or threading.get_ident() != self._main:
                raise RuntimeError("no running event loop")
            return self.own()

        def set_event_loop(loop: Any) -> None:
            if loop is None and threading.get_ident() == self._main:
                loop = self.own()
            set_loop(loop)

        for module in (events, asyncio):
            module.get_running_loop = get_running_loop  # type: ignore[attr-defined]
            module.set_event_loop = set_event_loop  # type: ignore[attr-defined]
        self.own()

    def run(self, coroutine: Any, then: Any, context: Any) -> None:
        """Run the coroutine of a cell, and what is done with its value; other tasks go on meanwhile."""
        loop = self.own()
        if asyncio._get_running_loop() is not None:
            coroutine.close()
            raise RuntimeError("a cell that awaits something can't be run from one that does")
        task = self._task(loop, self._whole(coroutine, then), context)
        try:
            loop.run_until_complete(task)
        except BaseException:
            if task.done() or loop.is_closed():
                raise
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            raise

    def busy(self) -> bool:
        """Whether something that a cell has left on the loop wants to go on."""
        loop = self._loop
        if loop is None or loop.is_closed() or loop.is_running():
            return False
        ready, later = getattr(loop, "_ready", True), getattr(loop, "_scheduled", True)
        watched: Any = getattr(getattr(loop, "_selector", None), "get_map", dict)()
        return bool(ready or later or len(watched) > 1 or asyncio.all_tasks(loop))

    def idle(self) -> None:
        """Let the loop go on until the agent asks something."""
        space, loop = self._space, self._loop
        space.idle = True
        try:
            while not space.line.waiting() and not loop.is_closed():
                loop.add_reader(space.line.fileno(), loop.stop)
                loop.run_forever()
        finally:
            space.idle = False
            if not loop.is_closed():
                loop.remove_reader(space.line.fileno())

    @staticmethod
    def _task(loop: Any, coroutine: Any, context: Any) -> Any:
        if CONTEXTS:
            return loop.create_task(coroutine, context=context)
        return context.run(loop.create_task, coroutine)

    async def _whole(self, coroutine: Any, then: Any) -> None:
        try:
            value = await coroutine
            if then is not None:
                then(value)
        finally:
            if not CONTEXTS and not self._space.within:
                self._space.context = copy_context()


def of(space: Any) -> Loops:
    """The loops of `space`, made by the first who asks."""
    if space.loops is None:
        space.loops = Loops(space)
    found: Loops = space.loops
    return found
