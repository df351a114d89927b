"""What a monitoring system asks for again and again: numbers of the node, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from instavm.contract.host import NodeInfo, NodeMetrics
from instavm.control.api.description import problems
from instavm.control.api.here import Caller, Here
from instavm.control.store.schema import LOCAL_TENANT
from instavm.errors import ForbiddenError

router = APIRouter(tags=["server"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **problems(403)})
async def metrics(here: Here, caller: Caller) -> Response:
    """For the server's own account: how busy a host is, is nobody else's business."""
    if caller.id != LOCAL_TENANT:
        raise ForbiddenError("metrics are for the server's own account")
    registry = CollectorRegistry()
    registry.register(Numbers(await here.node.info(), await here.node.metrics()))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class Numbers(Collector):
    def __init__(self, info: NodeInfo, now: NodeMetrics) -> None:
        self._info = info
        self._now = now

    def collect(self) -> Iterator[Metric]:
        now, info = self._now, self._info
        about = GaugeMetricFamily("instavm_node", "What sandboxes run on here.", labels=("driver", "version", "tier"))
        about.add_metric((info.driver, info.driver_version, str(info.tier)), 1)
        yield about
        yield GaugeMetricFamily("instavm_sandboxes", "Sandboxes that are live.", now.running)
        yield _by_machine(
            GaugeMetricFamily("instavm_machines_waiting", "Made ahead of a request.", labels=("machine",)), now.waiting
        )
        yield _by_machine(
            CounterMetricFamily("instavm_starts", "Sandboxes that came up, by what was there.", labels=("machine",)),
            now.starts,
        )
        yield _by_machine(
            CounterMetricFamily("instavm_start_seconds", "What these starts took in all.", labels=("machine",)),
            now.start_seconds,
        )
        yield CounterMetricFamily("instavm_cold_starts", "Those that had to boot a template first.", now.cold)
        yield CounterMetricFamily("instavm_failed_starts", "Starts that failed.", now.failed)


def _by_machine(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]
) -> GaugeMetricFamily | CounterMetricFamily:
    for machine, value in values.items():
        family.add_metric((machine,), value)
    return family
