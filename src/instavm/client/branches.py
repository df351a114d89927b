"""Trying several ways from where a sandbox is: `with vm.branch(3) as tries:`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio

from instavm.errors import InvalidInput

if TYPE_CHECKING:
    from instavm.client.aio import AsyncInstaVM
    from instavm.client.sync import InstaVM

T = TypeVar("T")
C = TypeVar("C")


class _Branches(Generic[C]):
    def __init__(self, tries: Sequence[C]) -> None:
        self._tries = list(tries)
        self.kept: C | None = None

    def __getitem__(self, index: int) -> C:
        return self._tries[index]

    def __len__(self) -> int:
        return len(self._tries)

    def __iter__(self) -> Iterator[C]:
        return iter(self._tries)

    def keep(self, one: C) -> None:
        """This copy is what the sandbox goes on as after the block. Raises: InvalidInput, if it is none of these."""
        if one not in self._tries:
            raise InvalidInput("keep", one, "one of the copies of this branch")
        self.kept = one


class Branches(_Branches["InstaVM"]):
    """Copies of one sandbox, each a client of its own. Those that are not kept end with the block."""

    def run(self, work: Callable[[InstaVM], T]) -> list[T]:
        """`work` with every copy at the same time, in threads; what each returned, in order. Raises what one of them raised."""
        with ThreadPoolExecutor(len(self._tries)) as threads:
            return list(threads.map(work, self._tries))


class AsyncBranches(_Branches["AsyncInstaVM"]):
    """As `Branches`."""

    async def run(self, work: Callable[[AsyncInstaVM], Awaitable[T]]) -> list[T]:
        """`work` with every copy at the same time; what each returned, in order. Raises what one of them raised."""
        done: dict[int, T] = {}

        async def one(index: int) -> None:
            done[index] = await work(self._tries[index])

        async with anyio.create_task_group() as tasks:
            for index in range(len(self._tries)):
                tasks.start_soon(one, index)
        return [done[index] for index in sorted(done)]
