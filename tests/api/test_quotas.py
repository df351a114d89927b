"""What an account may have, how fast it may ask, and what the host can bear."""

import anyio
import pytest
from local_node import open_local_node

from instavm.contract.host import HostMemory
from instavm.control.accounts import KeyedAccounts, Keys, LocalAccounts
from instavm.control.control import open_control
from instavm.control.quotas import Policy
from instavm.control.rates import Rates
from instavm.control.store.accounts import Quota, Tenant
from instavm.control.store.database import open_store
from instavm.errors import ForbiddenError, NoCapacity, QuotaExceededError, RateLimitError
from instavm.wire.sessions import CreateSession

pytestmark = pytest.mark.anyio
ME = Tenant("local", "me", None)


async def creates(control, tenant, count, **more):
    """How many of `count` concurrent creates made a session, and what the others were told."""
    made, refused = [], []

    async def one():
        try:
            made.append(await control.sessions.create(tenant, CreateSession(**more)))
        except (QuotaExceededError, NoCapacity) as exc:
            refused.append(exc)

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(one)
    return made, refused


async def test_fifty_creates_at_once_against_a_quota_of_ten_give_ten(tmp_path):
    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts), Policy(Quota(sandboxes=10))) as control,
    ):
        made, refused = await creates(control, ME, 50)
        assert (len(made), len(refused)) == (10, 40)
        assert "10 sandboxes" in str(refused[0])
        for session in made:
            await session.vm.settled.wait()
        assert len(node.places) == 10
        await control.sessions.kill(made[0])
        assert len((await creates(control, ME, 5))[0]) == 1


@pytest.mark.parametrize(
    ("quota", "fit"), [(Quota(vcpus=8), 4), (Quota(memory_mib=1536), 3), (Quota(sandboxes=0), 0), (Quota(), 6)]
)
async def test_each_limit_counts_on_its_own(tmp_path, quota, fit):
    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts), Policy(quota)) as control,
    ):
        assert len((await creates(control, ME, 6))[0]) == fit


async def test_a_tenants_own_quota_goes_before_the_servers(tmp_path):
    mine = Tenant("local", "me", None, Quota(sandboxes=2, lifetime_s=60))
    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts), Policy(Quota(sandboxes=1))) as control,
    ):
        assert len((await creates(control, mine, 3, vm_lifetime_seconds=60))[0]) == 2
        with pytest.raises(ForbiddenError, match="vm lifetime cannot exceed 60s"):
            await control.sessions.create(mine, CreateSession(vm_lifetime_seconds=61))


async def test_a_lifetime_quota_below_the_default_cuts_the_default_and_refuses_what_was_chosen(tmp_path):
    mine = Tenant("local", "me", None, Quota(lifetime_s=60))
    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts)) as control,
    ):
        for given in ({}, {"vm_lifetime_seconds": None}, {"vm_lifetime_seconds": 300}):
            assert (await control.sessions.create(mine, CreateSession(**given))).row.lifetime_s == 60
        assert (await control.sessions.create(mine, CreateSession(vm_lifetime_seconds=20))).row.lifetime_s == 20
        with pytest.raises(ForbiddenError, match=r"vm_lifetime_seconds .*asks for 301.*quota"):
            await control.sessions.create(mine, CreateSession(vm_lifetime_seconds=301))


async def test_no_more_memory_is_promised_than_the_policy_says(tmp_path):
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        node.host = HostMemory(4096, 4096)
        policy = Policy(memory_overcommit=1.5, memory_reserve_mib=1024)
        async with open_control(node, store, LocalAccounts(store.accounts), policy) as control:
            made, refused = await creates(control, ME, 20)
            assert len(made) == (4096 - 1024) * 1.5 // 512
            assert isinstance(refused[0], NoCapacity)
            assert refused[0].retry_after_s is None or refused[0].retry_after_s <= 300
            node.host = HostMemory(4096, 1100)
            await control.sessions.kill(made[0])
            assert (await creates(control, ME, 1))[0] == [], "it would have to swap"


async def test_an_expired_session_is_respawned_within_the_quota_only(tmp_path):
    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts), Policy(Quota(sandboxes=1))) as control,
    ):
        first = await control.sessions.create(
            ME, CreateSession.model_construct(**{**CreateSession().model_dump(), "vm_lifetime_seconds": 0.01})
        )
        await first.vm.gone.wait()
        await control.sessions.create(ME, CreateSession())
        with pytest.raises(QuotaExceededError):
            await control.sessions.ready(first)


async def test_a_key_has_its_own_bucket_of_requests(tmp_path):
    now = [100.0]
    rates = Rates(10, 3, clock=lambda: now[0])
    async with open_store(tmp_path / "db") as store:
        keys, accounts = Keys(store.accounts), KeyedAccounts(store.accounts, rates)
        (_, one), (_, two) = await keys.create("one"), await keys.create("two")
        for _ in range(3):
            await accounts.tenant_of(one)
        with pytest.raises(RateLimitError) as caught:
            await accounts.tenant_of(one)
        assert caught.value.retry_after_s == pytest.approx(0.1)
        await accounts.tenant_of(two)
        now[0] += 0.1
        await accounts.tenant_of(one)


def test_a_rate_limit_over_http_says_when_to_come_back(server, http, monkeypatch):
    monkeypatch.setattr(server.control.accounts, "_rates", Rates(0.5, 1))
    assert http.get("/v1/users/me").status_code == 200
    answer = http.get("/v1/users/me")
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (429, "rate_limited", "2")
