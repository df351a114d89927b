"""Egress policies over the API: where they are kept, whom they hold for, and what is answered."""

import json

import pytest
from local_node import open_local_node

from instavm import AsyncInstaVM
from instavm.cli.app import run
from instavm.contract.egress import NOTHING, Egress, EgressLog, Seen
from instavm.control.accounts import LocalAccounts
from instavm.control.control import open_control
from instavm.control.quotas import Policy
from instavm.control.store.accounts import Tenant
from instavm.control.store.database import open_store
from instavm.errors import HostNotReady, InvalidInput
from instavm.wire.sessions import CreateSession

ME = Tenant("local", "me", None)
CLOSED = {
    "allow_package_managers": False,
    "allow_public_repos": False,
    "allow_http": False,
    "allow_https": False,
    "allowed_domains": [],
    "allowed_cidrs": [],
}
WEB = Egress(https=True, domains=("a.test",))


def place(server, vm):
    return server.node.places[vm.get_session_info()["vm_id"]]


def test_closed_until_told_otherwise(server, vm):
    vm.execute("1")
    assert vm.get_session_egress() == {**CLOSED, "status": "applied"}
    assert place(server, vm).egress == NOTHING


def test_the_last_write_holds_for_the_sandbox(server, vm):
    vm.execute("1")
    vm_id = vm.get_session_info()["vm_id"]
    answer = vm.set_session_egress(allow_package_managers=False, allow_http=False, allowed_domains=["A.test"])
    assert answer["status"] == "applied" and place(server, vm).egress == WEB
    vm.egress.set_vm(vm_id, allow_package_managers=True, allow_http=False, allow_https=False)
    assert place(server, vm).egress == Egress(packages=True)
    assert vm.get_session_egress()["allow_public_repos"] and vm.egress.get_vm(vm_id) == vm.get_session_egress()
    vm.egress.set_session(allow_package_managers=False, allow_http=False, allow_https=False)
    assert vm.get_vm_egress(vm_id) == {**CLOSED, "status": "applied"}


def test_without_arguments_the_sdk_opens_the_web(vm):
    answer = vm.set_session_egress()
    assert answer["allow_package_managers"] and answer["allow_http"] and answer["allow_https"]


def test_at_creation_and_for_what_follows(server, http):
    policy = {"allow_public_repos": True, "allowed_cidrs": ["10.0.0.0/8"]}
    made = http.post("/v1/vms", json={"egress_policy": policy}).json()
    want = Egress(packages=True, cidrs=("10.0.0.0/8",))
    assert server.node.places[made["vm_id"]].egress == want
    server.portal.call(server.node.crash, made["vm_id"])
    again = http.post("/v1/vms", json={"session_id": made["session_id"]}).json()
    assert again["vm_id"] != made["vm_id"] and server.node.places[again["vm_id"]].egress == want
    assert http.get(f"/v1/egress/vm/{made['vm_id']}").status_code == 410
    assert http.post(f"/v1/egress/vm/{made['vm_id']}", json={}).status_code == 410
    http.post("/kill", json={"session_id": made["session_id"]})
    assert http.post(f"/v1/egress/session/{made['session_id']}", json={}).status_code == 410


@pytest.mark.parametrize("of", ["session", "vm"])
def test_somebody_elses_is_not_there(server, vm, of):
    vm.execute("1")
    target = vm.session_id if of == "session" else vm.get_session_info()["vm_id"]
    import httpx

    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.other_key}) as other:
        path = f"/v1/egress/{of}/{target}"
        assert {
            other.get(path).status_code,
            other.post(path, json={}).status_code,
            other.get(f"{path}/log").status_code,
            other.get(f"{path}/check", params={"host": "a.test"}).status_code,
            other.post(f"{path}/check", json={"host": "a.test"}).status_code,
        } == {404}


def test_a_refusal_names_field_value_and_what_is_allowed(http, vm):
    answer = http.post(f"/v1/egress/session/{vm.session_id}", json={"allowed_domains": ["https://a.test"]})
    assert answer.status_code == 422
    told = answer.json()
    assert (
        told["field"] == "allowed_domains"
        and "https://a.test" in str(told["detail"])
        and "host names" in told["allowed"]
    )


def test_the_log(http, vm):
    assert http.get(f"/v1/egress/session/{vm.session_id}/log").json()["entries"] == []
    assert vm.egress.log()["open_connections"] == 0


TRIED = EgressLog((Seen("evil.test", None, 53, "dns", False, "no_rule", 2, 1.0, 2.0),), 3, 4, 1)


@pytest.mark.parametrize("end", ["killed", "crashed", "suspended"])
def test_the_log_outlives_its_sandbox(server, http, end):
    made = http.post("/v1/vms", json={}).json()
    server.node.logs[made["vm_id"]] = TRIED
    if end == "killed":
        http.delete(f"/v1/vms/{made['vm_id']}")
    elif end == "crashed":
        server.portal.call(server.node.crash, made["vm_id"])
    else:
        http.post(f"/v1/vms/{made['vm_id']}/suspend")
    for path in (f"session/{made['session_id']}", f"vm/{made['vm_id']}"):
        told = http.get(f"/v1/egress/{path}/log").json()
        assert told["vm_id"] == made["vm_id"]
        assert [(one["name"], one["count"], one["rule"]) for one in told["entries"]] == [("evil.test", 2, "no_rule")]
        assert (told["bytes_sent"], told["bytes_received"]) == (3, 4)
    http.post("/kill", json={"session_id": made["session_id"]})


def test_the_records_show_what_is_in_force(server, http):
    """Of a VM and of its session; of one that has ended nothing is in force, and one at rest keeps what it had."""
    policy = {"allow_package_managers": True, "allowed_domains": ["a.test"]}
    made = http.post("/v1/vms", json={"egress_policy": policy}).json()
    want = {**CLOSED, **policy, "allow_public_repos": True}
    vm, session = f"/v1/vms/{made['vm_id']}", f"/v1/sessions/session/{made['session_id']}"
    assert made["egress_policy"] == {**want, "status": "applied"}
    assert http.get(vm).json()["egress_policy"] == http.get(session).json()["egress_policy"] == made["egress_policy"]
    http.post(f"/v1/egress/vm/{made['vm_id']}", json={})
    shown = [one["egress_policy"] for one in http.get("/v1/vms").json() if one["vm_id"] == made["vm_id"]]
    assert shown == [{**CLOSED, "status": "applied"}]
    http.post(f"{vm}/suspend")
    assert http.get(vm).json()["egress_policy"] == {**CLOSED, "status": "pending"}
    http.post(f"/v1/egress/session/{made['session_id']}", json=policy)
    assert http.get(vm).json()["egress_policy"] == {**want, "status": "pending"}
    http.post("/kill", json={"session_id": made["session_id"]})
    assert http.get(vm).json()["egress_policy"] is None
    assert {one["vm_id"]: one["egress_policy"] for one in http.get("/v1/vms/").json()}[made["vm_id"]] is None


@pytest.mark.parametrize(
    ("policy", "host", "port", "allowed", "rule", "source", "remedy"),
    [
        (None, "a.test", 443, False, "no_rule", "default", "--domain a.test"),
        ({"allowed_domains": ["a.test"]}, "a.test", 22, False, "port", "session", "80 or 443"),
        ({"allowed_cidrs": ["1.1.1.0/24"]}, "1.1.1.1", 53, True, "cidr", "session", None),
        ({"allowed_cidrs": ["0.0.0.0/0"]}, "10.1.2.3", 80, False, "private", "special_address", "--cidr 10.1.2.3/32"),
        ({"allow_https": True}, "::1", 443, False, "no_ipv6", "network", "IPv4"),
        ({"allow_https": True}, "0x7f.1", 443, False, "bad_name", "network", "plain host name"),
        ({}, "index.test", 443, False, "no_rule", "session", "--allow-package-managers"),
    ],
)
def test_a_destination_can_be_asked_about_before_anybody_goes_there(
    http, vm, policy, host, port, allowed, rule, source, remedy
):
    if policy is not None:
        http.post(f"/v1/egress/session/{vm.session_id}", json=policy)
    said = vm.egress.check(host, port)
    assert (said.allowed, said.rule, said.source, said.applied) == (allowed, rule, source, True)
    assert (said.remedy is None) == allowed and (remedy or "") in (said.remedy or "") and said.detail
    assert said == vm.egress.check(host, port, vm_id=said.vm_id)
    asked = {"host": host, "port": port}
    assert http.get(f"/v1/egress/session/{vm.session_id}/check", params=asked).json() == said


def test_a_policy_can_be_tried_without_setting_it(vm):
    tried = {"allow_package_managers": True, "allowed_cidrs": ["10.0.0.0/8"]}
    said = vm.egress.check("10.0.0.1", 5432, policy=tried)
    assert (said.allowed, said.rule, said.source, said.applied) == (True, "cidr", "given", False)
    assert not vm.egress.check("10.0.0.1", 5432).allowed


def test_a_policy_of_a_vm_and_a_session_without_a_sandbox_are_told_apart(server, vm):
    vm.execute("1")
    vm.egress.set_vm(vm.get_session_info()["vm_id"], allowed_cidrs=["10.0.0.0/8"])
    assert vm.egress.check("10.0.0.1").source == "vm"
    vm.egress.set_session(allowed_cidrs=["11.0.0.0/8"])
    server.portal.call(server.node.crash, vm.get_session_info()["vm_id"])
    said = vm.egress.check("11.0.0.1")
    assert (said.allowed, said.source, said.vm_id, said.applied) == (True, "session", None, False)


@pytest.mark.parametrize(
    ("given", "field"),
    [({"port": 0}, "port"), ({"port": "x"}, "port"), ({"host": ""}, "host"), ({"protocol": "icmp"}, "protocol")],
)
def test_a_question_that_cannot_be_meant_is_refused_by_name(http, vm, given, field):
    answer = http.get(f"/v1/egress/session/{vm.session_id}/check", params={"host": "a.test", **given})
    assert answer.status_code == 422 and answer.json()["field"] == field
    if given != {"port": "x"}:
        with pytest.raises(InvalidInput) as refused:
            vm.egress.check(**{"host": "a.test", **given})
        assert refused.value.field == field


@pytest.mark.anyio
async def test_the_same_question_asynchronously(server):
    async with AsyncInstaVM(server.key, server.url) as vm:
        assert (await vm.egress.check("a.test")).rule == "no_rule"
        assert (await vm.egress.check("10.0.0.1", policy={"allowed_cidrs": ["10.0.0.1"]})).allowed


def test_a_result_carries_what_was_refused_and_is_explained(server, vm, monkeypatch):
    assert vm.execute("1").refused == []
    monkeypatch.setattr(
        server.node, "refused", (Seen("index.test", None, 53, "dns", False, "no_rule", 3, registry=True),)
    )
    done = vm.execute("1")
    (refused,) = done.refused
    assert refused == {
        "name": "index.test",
        "address": None,
        "port": 53,
        "protocol": "dns",
        "rule": "no_rule",
        "count": 3,
        "registry": True,
    }
    assert "index.test" in vm.explain(done) and "--allow-package-managers" in vm.explain(done)
    *_, last = vm.stream("1")
    assert last.result.refused == done.refused


def test_the_command_line_asks_too(server, vm, capsys):
    def said(*words):
        code = run(
            ["egress", "check", *words, "--session", vm.session_id, "--api-key", server.key, "--base-url", server.url]
        )
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    code, told = said("a.test:80")
    assert code == 1 and told.startswith("refused a.test tcp/80\nrule: no_rule") and "INSTAVM_EGRESS_DEFAULT" in told
    vm.set_session_egress(allowed_cidrs=["1.1.1.1"])
    assert said("1.1.1.1:53", "--udp") == (
        0,
        "allowed 1.1.1.1 udp/53\nrule: cidr (allowed_cidrs holds it)\nfrom: the session's policy\n",
    )
    assert (
        "tcp/443" in said("[2001:db8::1]")[1]
        and "no_ipv6" in said("2001:db8::1")[1]
        and "tcp/22" in said("[::1]:22")[1]
    )
    assert json.loads(said("a.test", "--json")[1])["rule"] == "no_rule"
    assert said("a.test:x")[1].startswith("Error: port: 'x' is not allowed")


@pytest.mark.anyio
async def test_a_policy_set_while_at_rest_holds_after_a_restart(tmp_path):
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        async with open_control(node, store, LocalAccounts(store.accounts)) as control:
            session = await control.sessions.create(ME, CreateSession())
            await control.sessions.ready(session)
            await control.egress.set_vm(session, session.vm.id, WEB)
            await control.sessions.suspend(session)
            assert not await control.egress.set_session(session, NOTHING)
        async with open_control(node, store, LocalAccounts(store.accounts)) as control:
            session = await control.sessions.get(ME, session.id)
            vm = await control.sessions.resume(session)
            assert vm.egress == NOTHING
            await control.sessions.kill(session)


@pytest.mark.anyio
async def test_the_next_server_puts_it_in_force_again(tmp_path):
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        async with open_control(node, store, LocalAccounts(store.accounts)) as control:
            ids = [(await control.sessions.create(ME, CreateSession())).id for _ in range(2)]
            for session_id in ids:
                await control.sessions.ready(await control.sessions.get(ME, session_id))
            first, second = [await control.sessions.get(ME, session_id) for session_id in ids]
            await control.egress.set_session(first, WEB)
            await control.egress.set_session(second, WEB)
            await control.egress.set_vm(second, second.vm.id, Egress(packages=True))
            await control.leave()
        for one in node.places.values():
            one.egress = NOTHING
        async with open_control(node, store, LocalAccounts(store.accounts)) as control:
            kept = {session_id: (await control.sessions.get(ME, session_id)).vm.id for session_id in ids}
            assert node.places[kept[ids[0]]].egress == WEB
            assert node.places[kept[ids[1]]].egress == Egress(packages=True)


@pytest.mark.anyio
async def test_the_operators_default_and_a_node_that_cannot(tmp_path, monkeypatch):
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        policy = Policy(egress=Egress(packages=True))
        async with open_control(node, store, LocalAccounts(store.accounts), policy) as control:
            session = await control.sessions.create(ME, CreateSession())
            await control.sessions.ready(session)
            assert node.places[session.vm.id].egress == Egress(packages=True)

            async def cannot(*_):
                raise HostNotReady("no network here")

            monkeypatch.setattr(node, "set_egress", cannot)
            with pytest.raises(HostNotReady):
                await control.egress.set_session(session, WEB)
            assert control.egress.of_session(session) == (Egress(packages=True), True), "what is answered is in force"
