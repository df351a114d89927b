"""Whether one more sandbox may be started: what its tenant may have, and what the host can bear.

Nothing is awaited between looking and taking, and everything runs on one event loop: two creates never both get the last
place. The promise of memory is the policy: all sandboxes together are promised at most
`memory_overcommit` times the host's memory without `memory_reserve_mib`, and a new one is only started while the host could
hand out `memory_reserve_mib` and the new one's first pages without swapping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from instavm import limits
from instavm.contract.egress import NOTHING, Egress
from instavm.contract.host import HostMemory
from instavm.control.store.accounts import Quota, Tenant
from instavm.control.vms import Vms
from instavm.errors import ForbiddenError, NoCapacity, QuotaExceededError
from instavm.settings import Settings

FIRST_PAGES_MIB: Final = 128
"""What a sandbox makes its own within its first seconds, whatever its size; the rest is shared with its template."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What this server allows. `quota`: of tenants that have none of their own; a None in it means without limit."""

    quota: Quota = field(default_factory=Quota)
    memory_overcommit: float = 1.0
    memory_reserve_mib: int = 0
    requests_per_s: float = 1000.0
    requests_burst: int = 10_000
    egress: Egress = NOTHING
    """Of sandboxes for which no policy was set."""

    @classmethod
    def of(cls, settings: Settings) -> Policy:
        return cls(
            Quota(
                settings.quota_sandboxes,
                settings.quota_vcpus,
                settings.quota_memory_mib,
                settings.quota_lifetime_s,
                settings.quota_disk_mib,
            ),
            settings.memory_overcommit,
            settings.memory_reserve_mib,
            settings.requests_per_s,
            settings.requests_burst,
            _egress(settings),
        )

    @classmethod
    def of_one_user(cls, settings: Settings) -> Policy:
        """Behind a private socket: no quotas and no rate, only what the host can bear."""
        return cls(
            memory_overcommit=settings.memory_overcommit,
            memory_reserve_mib=settings.memory_reserve_mib,
            egress=_egress(settings),
        )


def _egress(settings: Settings) -> Egress:
    return Egress(packages=settings.egress_default == "packages")


class Quotas:
    def __init__(self, policy: Policy, vms: Vms, memory: Callable[[], HostMemory]) -> None:
        self._policy = policy
        self._vms = vms
        self._memory = memory
        self._booting: list[tuple[str, int, int]] = []
        """Tenant, vCPUs and memory of templates that are booted for nobody's sandbox."""

    @contextmanager
    def booting(self, tenant: Tenant, vcpus: int, memory_mib: int) -> Iterator[None]:
        """For the time of the block, a boot counts as a sandbox of that size. Raises: QuotaExceededError, NoCapacity."""
        self.admit(tenant, vcpus, memory_mib, 0)
        one = (tenant.id, vcpus, memory_mib)
        self._booting.append(one)
        try:
            yield
        finally:
            self._booting.remove(one)

    def admit(self, tenant: Tenant, vcpus: int, memory_mib: int, lifetime_s: float, count: int = 1) -> None:
        """Raises: ForbiddenError (lifetime), QuotaExceededError, NoCapacity. The caller starts all at once or none.

        count: so many alike.
        """
        quota = self.of(tenant)
        self.lifetime(tenant, lifetime_s)
        mine = [
            *(
                (vm.spec.vcpus, vm.spec.memory_mib)
                for vm in self._vms.live()
                if vm.tenant_id == tenant.id and vm.usable
            ),
            *((cpus, memory) for whose, cpus, memory in self._booting if whose == tenant.id),
        ]
        for what, limit, sum_with_it in (
            ("sandboxes", quota.sandboxes, len(mine) + count),
            ("vCPUs", quota.vcpus, sum(cpus for cpus, _ in mine) + count * vcpus),
            ("MB of memory", quota.memory_mib, sum(memory for _, memory in mine) + count * memory_mib),
        ):
            if limit is not None and sum_with_it > limit:
                raise QuotaExceededError(
                    f"this account may have {limit} {what} at one time, this would make {sum_with_it}"
                )
        self._host_can_bear(memory_mib, count)

    def lifetime(self, tenant: Tenant, lifetime_s: float) -> None:
        """Raises: ForbiddenError."""
        limit = self.of(tenant).lifetime_s
        if limit is not None and lifetime_s > limit:
            raise ForbiddenError(
                f"vm lifetime cannot exceed {limit}s: vm_lifetime_seconds (`timeout` of a client) asks for {lifetime_s:g},"
                " more than the account's lifetime quota"
            )

    def default_lifetime(self, tenant: Tenant, lifetime_s: int) -> int:
        """The default, which clients send as well when nobody chose one, cut to the quota; others come back as they are."""
        limit = self.of(tenant).lifetime_s
        if limit is None or lifetime_s != limits.LIFETIME_S_DEFAULT:
            return lifetime_s
        return max(limits.LIFETIME_S_MIN, min(lifetime_s, limit))

    def store(self, tenant: Tenant, has_bytes: int) -> None:
        """Whether a tenant that has so much at rest may put more there. Raises: QuotaExceededError."""
        limit = self.of(tenant).disk_mib
        if limit is not None and has_bytes >> 20 >= limit:
            raise QuotaExceededError(
                f"this account may keep {limit} MB of snapshots and suspended sandboxes, it has {has_bytes >> 20}"
            )

    def of(self, tenant: Tenant) -> Quota:
        """What holds for a tenant: its own numbers, else the server's."""
        own, default = tenant.quota, self._policy.quota
        return Quota(
            sandboxes=default.sandboxes if own.sandboxes is None else own.sandboxes,
            vcpus=default.vcpus if own.vcpus is None else own.vcpus,
            memory_mib=default.memory_mib if own.memory_mib is None else own.memory_mib,
            lifetime_s=default.lifetime_s if own.lifetime_s is None else own.lifetime_s,
            disk_mib=default.disk_mib if own.disk_mib is None else own.disk_mib,
        )

    def _host_can_bear(self, memory_mib: int, count: int) -> None:
        host, reserve = self._memory(), self._policy.memory_reserve_mib
        promised = sum(vm.spec.memory_mib for vm in self._vms.live() if not vm.at_rest) + count * memory_mib
        promised += sum(memory for *_, memory in self._booting)
        bearable = int((host.total_mib - reserve) * self._policy.memory_overcommit)
        if promised > bearable:
            raise NoCapacity(
                f"this host is full: {promised} MB would be promised to sandboxes, it bears {bearable}",
                self._vms.next_end_s(),
            )
        if host.available_mib < reserve + count * min(memory_mib, FIRST_PAGES_MIB):
            raise NoCapacity(
                f"this host is full: {host.available_mib} MB of its memory are left", self._vms.next_end_s()
            )
