"""What a node has started, counted: for an operator who wants to know whether machines are there when they are asked for."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from instavm.contract.host import NodeMetrics
from instavm.errors import InstaVMError
from instavm.node.machines import Machines, Stage


class Tally:
    def __init__(self) -> None:
        self._starts: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._cold = self._failed = 0

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Counts a block that raises as a start that failed."""
        try:
            yield
        except InstaVMError:
            self._failed += 1
            raise

    def started(self, stage: Stage, steps_ms: dict[str, float], *, cold: bool) -> None:
        """One came up, from a machine that was so far when it was asked for."""
        self._starts[stage] += 1
        self._seconds[stage] += sum(steps_ms.values()) / 1000
        self._cold += cold

    def now(self, machines: Machines, running: int) -> NodeMetrics:
        waiting = Counter({"spare_machine": 0, "warm_machine": 0})
        waiting.update(one.stage for one in machines.prepared())
        return NodeMetrics(running, dict(waiting), dict(self._starts), dict(self._seconds), self._cold, self._failed)
