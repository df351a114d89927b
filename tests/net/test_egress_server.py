"""Egress through the whole of it: server, SDK and command line; and after the server was killed."""

import json
import signal

import httpx
import pytest
from servers import tidy

from instavm import InstaVM
from instavm.errors import InvalidInput, SessionError

CURL = "curl -skf -m 20 {} || echo curl $?"


@pytest.fixture(scope="module")
def server(settings, short_folder, internet):
    """It listens on every address of its host."""
    own = {"EGRESS_DNS": json.dumps([internet.a]), "ACCELERATION": "tcg", "SPARE_MACHINES": 0}
    with tidy(settings, short_folder, host="0.0.0.0", **own) as servers:
        servers.start()
        yield servers


def bash(vm, command):
    return vm.execute(command, language="bash").stdout.strip()


def test_a_policy_from_before_the_sandbox_to_after_a_killed_server(server, internet):
    internet.names({"good.test": [internet.a], "late.test": [internet.b]})
    with InstaVM(server.key, server.url) as vm:
        assert vm.set_session_egress(
            allow_package_managers=False, allow_http=False, allow_https=False, allowed_domains=["Good.test"]
        )["status"] in ("applied", "pending")
        assert bash(vm, CURL.format("http://good.test/")) == f"GET / at {internet.a}:80 0"
        assert bash(vm, CURL.format("http://late.test/")) == "curl 6"
        told = vm.get_session_egress()
        assert told["allowed_domains"] == ["good.test"] and told["status"] == "applied"
        assert not told["allow_public_repos"] and not told["allow_http"]
        control = f"http://{internet.host}:{server.port}/health"
        assert httpx.get(control).status_code == 200, "the host itself reaches it there"
        vm_id = vm.get_session_info()["vm_id"]
        vm.egress.set_vm(
            vm_id,
            allow_package_managers=False,
            allow_http=True,
            allow_https=False,
            allowed_domains=["late.test"],
            allowed_cidrs=["127.0.0.1/32", f"{internet.host}/32"],
        )
        assert vm.get_session_egress()["allowed_domains"] == ["late.test"], "the last write holds"
        assert bash(vm, CURL.format(control)).startswith("curl"), "the control plane is out of reach whatever is named"
        assert any(one["rule"] == "control_plane" for one in vm.egress.log()["entries"])
        server.end(signal.SIGKILL)
        server.start()
        assert bash(vm, CURL.format("http://late.test/")) == f"GET / at {internet.b}:80 0"
        assert bash(vm, CURL.format("http://good.test/")) == "curl 6"
        entries = vm.egress.log()["entries"]
        refused = next(one for one in entries if one["name"] == "good.test")
        assert (refused["allowed"], refused["rule"], refused["port"]) == (False, "no_rule", 53)
        assert "good.test" in server.run("egress", "log", "--vm", vm_id)
        suggested = server.run("egress", "suggest", "--vm", vm_id)
        assert suggested == (f"instavm egress set --vm {vm_id} --allow-http --domain good.test --domain late.test")
        server.run(*suggested.split()[1:])
        assert bash(vm, CURL.format("http://good.test/")) == f"GET / at {internet.a}:80 0"
        assert "allow_http: true" in server.run("egress", "get", "--vm", vm_id)
    log = server.run("egress", "log", "--vm", vm_id)
    assert "refused good.test dns/53" in log and "allowed good.test tcp/80" in log, "it is told after the end as well"


def test_what_cannot_be_meant_is_refused_by_name(server):
    with InstaVM(server.key, server.url) as vm:
        for given, field in (
            ({"allowed_domains": ["https://a.test"]}, "allowed_domains"),
            ({"allowed_cidrs": ["10.0.0.1/8"]}, "allowed_cidrs"),
            ({"allow_http": "yes"}, "allow_http"),
        ):
            with pytest.raises(InvalidInput) as refused:
                vm.set_session_egress(**given)
            assert refused.value.field == field
        session = vm.session_id
        vm.kill()
        with pytest.raises(SessionError):
            vm.set_session_egress(session)
